"""Where nothing is shared between clients, for their privacy, log, commands and page say so."""

import json
from pathlib import Path

import pytest
import torch
from flwr.app import Context, RecordDict
from simulated_grid import SimulatedGrid, learning_site, start, weights

from pfedgpa_app.aggregation import GenerativeAggregator
from pfedgpa_app.config import Config, DiffusionConfig
from pfedgpa_app.model_spec import ModelSpec
from pfedgpa_app.page.runs import page_of
from pfedgpa_app.randomness import make_generator
from pfedgpa_app.report import Run
from pfedgpa_app.rounds import RoundRecord, describe, summarize
from pfedgpa_app.sharing import alone_in, alone_now, too_few
from server_app import app
from server_app.app import main
from server_app.strategies import PFedGPA

DIM = 300


def grouped(sizes: list[int], **settings) -> GenerativeAggregator:
    """Return what was learned from groups of clients, of so many each."""
    generator = make_generator(5)
    settings = {"train_steps": 5, "sharing": "affinity", **settings}
    aggregator = GenerativeAggregator(torch.zeros(DIM), DiffusionConfig(**settings))
    numbers = iter(range(100))
    for size in sizes:
        centre = torch.randn(DIM, generator=generator)
        for _ in range(size):
            noise = 0.3 * torch.randn(DIM, generator=generator)
            aggregator.observe(next(numbers), centre + noise)
    aggregator.fit(1)
    return aggregator


def given_of_others(aggregator: GenerativeAggregator) -> dict[int, float]:
    """Return how far what each client is given is from its own upload."""
    members = aggregator.bank.members
    return {
        client: float((aggregator.personalize(client) - upload).norm() / upload.norm())
        for client, upload in members.items()
    }


@pytest.mark.parametrize(
    ("sizes", "min_contributors", "alone"),
    [
        ([1], 3, [0]),
        ([2], 3, [0, 1]),
        ([2], 2, []),
        ([1, 1], 3, [0, 1]),
        ([3], 3, []),
        ([3], 4, [0, 1, 2]),
        ([2, 4], 3, [0, 1]),
        ([2, 4], 2, []),
        ([4, 2, 2], 3, [4, 5, 6, 7]),
    ],
)
def test_those_are_alone_whose_upload_comes_back(
    sizes: list[int], min_contributors: int, alone: list[int]
):
    aggregator = grouped(sizes, min_contributors=min_contributors)
    assert aggregator.alone(range(sum(sizes))) == alone
    moved = given_of_others(aggregator)
    assert all(moved[client] < 1e-3 for client in alone)
    assert all(moved[client] > 0.01 for client in moved if client not in alone)


def test_a_newcomer_is_alone_where_there_is_no_mean_for_it():
    newcomer = 50
    assert grouped([1], min_contributors=3).alone([0, newcomer]) == [0, newcomer]
    assert grouped([2], min_contributors=3).alone([0, newcomer]) == [0]
    assert grouped([3], min_contributors=3).alone([0, newcomer]) == []


def run(path: Path, monkeypatch: pytest.MonkeyPatch, num_clients: int, **settings) -> Run:
    """Run the ServerApp among clients that learn."""

    monkeypatch.setattr(app, "preflight", lambda config: ModelSpec.of_state(weights(0.0)))
    sites = {node: learning_site(2.0) for node in range(1, num_clients + 1)}
    settings = {
        "output-dir": str(path),
        "num-server-rounds": 2,
        "diffusion.train-steps": 5,
        **settings,
    }
    grid = SimulatedGrid(sites, {node: node - 1 for node in sites})
    main(grid, Context(1, 1, {}, RecordDict(), settings))
    return Run.read(path / "1")


def test_two_clients_are_told_at_the_start_in_each_round_and_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    alone = run(tmp_path, monkeypatch, 2)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    begin, *rounds = [text for text in warnings if text.startswith("pFedGPA")]
    assert begin.startswith("pFedGPA: 2 clients share nothing (diffusion.min-contributors = 3)")
    assert "diffusion.min-contributors=2" in begin
    assert rounds == [f"pFedGPA: {alone_now(2, 2, DiffusionConfig())}"] * 2
    assert "2 of them train alone" in caplog.text
    assert [row["num-alone"] for row in alone.metrics] == [2, 2]
    assert all(row["alone"] for row in alone.clients)
    notes = alone_in(alone.metrics, alone.config.diffusion)
    assert notes.startswith(
        "In 2 of 2 rounds no client got anything of the others: then each trains"
    )
    assert f'<p class="note">{notes.replace(chr(39), "&#x27;")}</p>' in page_of([alone])


@pytest.mark.parametrize(
    ("num_clients", "settings"),
    [(4, {}), (2, {"diffusion.min-contributors": 2}), (2, {"strategy": "local"})],
)
def test_nobody_is_told_where_clients_share_or_were_not_to(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    num_clients: int,
    settings: dict,
):
    shared = run(tmp_path, monkeypatch, num_clients, **settings)
    assert [row["num-alone"] for row in shared.metrics] == [0, 0]
    assert "share nothing" not in caplog.text
    assert "alone" not in caplog.text
    assert 'class="note"' not in page_of([shared])


def test_few_of_many_share_nothing_until_others_have_taken_part(caplog: pytest.LogCaptureFixture):
    """Of eight clients two train in a round: after the first, two have taken part."""
    grid = SimulatedGrid({node: learning_site(float(node)) for node in range(8)})
    strategy = PFedGPA(fraction_train=0.25, diffusion=DiffusionConfig(train_steps=5), seed=1)
    start(strategy, grid, num_rounds=4)
    notes = [record.getMessage() for record in caplog.records if "this round's" in record.message]
    assert len(notes) == 1
    assert "pFedGPA: 2 clients share nothing" in caplog.text
    assert len(strategy.aggregator.bank.members) >= 3


def test_rounds_in_which_some_are_alone_are_counted_apart():
    def row(num_alone: int) -> dict:
        record = RoundRecord(1)
        for client in range(4):
            record.trained(client, {}, 0)
        for client in range(num_alone):
            record.note(client, alone=True)
        return summarize(record, "pfedgpa", 1.0)

    diffusion = DiffusionConfig()
    assert alone_in([row(0), row(0)], diffusion) == ""
    assert alone_in([row(0), row(2), row(1)], diffusion).startswith(
        "In 2 of 3 rounds some clients got nothing of the others"
    )
    assert alone_in([row(4), row(2), row(0)], diffusion).startswith(
        "In 1 of 3 rounds no client got anything of the others"
    )
    assert describe(row(1), 3).endswith("; 1 of them train alone")
    # A file of an older version does not have it.
    assert alone_in([{"round": 1, "num-clients": 2}], diffusion) == ""


def test_layers_that_are_averaged_are_not_said_to_be_alone():
    some = Config.from_flat({"diffusion.generated-layers": "fc2.*"}).diffusion
    assert "and the rest is averaged" in too_few(2, some)
    assert "if there were no others" in too_few(2, DiffusionConfig())
    assert too_few(3, some) == ""


def test_a_row_of_a_client_in_json_is_true_or_nothing():
    record = RoundRecord(1)
    record.trained(0, {}, 0)
    record.trained(1, {}, 0)
    record.note(1, alone=True)
    assert [json.dumps(row.get("alone")) for row in record.clients.values()] == ["null", "true"]
