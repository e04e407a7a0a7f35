"""A run that goes wrong says so, and keeps the checkpoint of its best round."""

import random
from html import escape
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Error, Message, MessageType, MetricRecord, RecordDict
from simulated_grid import SimulatedGrid, learning_site, upload, weights
from typer.testing import CliRunner

from pfedgpa_app import cli
from pfedgpa_app.config import Config
from pfedgpa_app.divergence import Fall, best_in, fall_in, warnings_in
from pfedgpa_app.model_spec import ModelSpec
from pfedgpa_app.report import Run
from pfedgpa_app.rounds import RoundRecord, Row, standard_error
from pfedgpa_app.runs import BEST, CHECKPOINT
from pfedgpa_app.state import load_state
from server_app import app
from server_app.app import RunError
from server_app.checkpoint import CHECKPOINT_KIND


def rounds(*accuracies: float | None, error: float = 0.01) -> list[Row]:
    return [
        {"round": number, "personalized-accuracy": accuracy, "personalized-accuracy-error": error}
        for number, accuracy in enumerate(accuracies, 1)
    ]


def test_a_fall_of_three_evaluated_rounds_is_found_with_its_best_round():
    rows = rounds(0.5, None, 0.9, 0.8, None, 0.7, 0.75)
    assert fall_in(rows) == Fall(4, 7, 3, 0.9, 0.7)
    assert fall_in(rows[:6]) is None
    # It is still found after the run has recovered.
    assert fall_in([*rows, *rounds(0.95)]) == Fall(4, 7, 3, 0.9, 0.7)


def test_clients_that_join_late_begin_a_new_mean():
    rows = [row | {"num-evaluated": 5} for row in rounds(0.8, 0.9, 0.9)]
    rows += [row | {"num-evaluated": 8} for row in rounds(0.5, 0.55, 0.6, 0.58)]
    rows = [row | {"round": number} for number, row in enumerate(rows, 1)]
    assert fall_in(rows) is None
    assert best_in(rows)["round"] == 6
    # Fewer of them are no new beginning.
    fewer = [row | {"num-evaluated": 7, "round": 7 + row["round"]} for row in rounds(0.4, 0.4, 0.4)]
    assert fall_in([*rows, *fewer]) == Fall(8, 10, 6, 0.6, 0.4)


@pytest.mark.parametrize(
    "rows",
    [
        rounds(0.9, 0.86, 0.86, 0.86),  # less than 0.05
        rounds(0.9, 0.8, 0.8, 0.8, error=0.04),  # less than four standard errors, 0.23
        rounds(0.9, 0.8, 0.8, 0.89, 0.8, 0.8),  # never three in a row
        rounds(None, None),
    ],
)
def test_less_is_no_fall(rows: list[Row]):
    assert fall_in(rows) is None


def test_normal_noise_is_no_fall():
    # Ten clients with 36 test images each, as with the digits: 40 runs of 100 rounds.
    draw = random.Random(0)
    for _ in range(40):
        rows = []
        for number in range(1, 101):
            record = RoundRecord(number, num_nodes=10)
            for client in range(10):
                right = sum(draw.random() < 0.8 for _ in range(36)) / 36
                record.evaluated(client, {"accuracy": right, "num-examples": 36})
            rows += rounds(sum(record.column("personalized-accuracy")) / 10)
            rows[-1] |= {"round": number, "personalized-accuracy-error": standard_error(record)}
        assert fall_in(rows) is None


def test_the_standard_error_counts_test_images_and_clients_that_were_left_out():
    record = RoundRecord(1, num_nodes=2)
    record.evaluated(0, {"accuracy": 0.5, "num-examples": 25})
    record.evaluated(1, {"accuracy": 1.0, "num-examples": 25})
    assert standard_error(record) == pytest.approx(0.05)  # sqrt(.25 / 25) / 2
    record.num_nodes = 4
    assert standard_error(record) == pytest.approx((0.05**2 + 0.5 * 0.25**2 / 2) ** 0.5)
    assert standard_error(RoundRecord(1)) is None


def test_what_may_help_goes_with_the_settings():
    rows = rounds(0.9, 0.1, 0.1, 0.1)
    (text,) = warnings_in(rows, Config.from_flat({"server.momentum": 0.5})).values()
    for part in ("learning-rate (here 0.03)", "server.momentum = 0", "denoise = false"):
        assert part in text
    (text,) = warnings_in(rows, Config(strategy="fedavg")).values()
    assert "momentum" not in text
    assert "denoise" not in text


def falling_grid() -> SimulatedGrid:
    """Return four sites whose accuracy falls after the second round; one trains on NaN at last."""

    def site(number: int, message: Message) -> RecordDict | Error | None:
        now = message.content["config"]["server-round"]
        if message.metadata.message_type == MessageType.EVALUATE:
            accuracy = [0.5, 0.9, 0.3, 0.2, 0.25, 0.2][now - 1]
            return RecordDict({"m": MetricRecord({"num-examples": 50, "accuracy": accuracy})})
        if number == 3 and now >= 5:
            return upload(weights(1.0), **{"loss-after": float("nan")})
        return learning_site(float(number))(message)

    sites = {n: lambda message, n=n: site(n, message) for n in range(4)}
    return SimulatedGrid(sites, {n: n for n in range(4)})


def run_app(path: Path, run_id: int, grid: SimulatedGrid, **settings: object) -> Run:
    config = {"output-dir": str(path), "num-server-rounds": 6, "diffusion.train-steps": 5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "preflight", lambda config: ModelSpec.of_state(weights(0.0)))
        app.main(grid, Context(run_id, 1, {}, RecordDict(), {**config, **settings}))
    return Run.read(path / str(run_id))


def round_of(folder: Path) -> int:
    return load_state(folder / CHECKPOINT, CHECKPOINT_KIND)[1]["round"]


@pytest.mark.parametrize("bank", ["memory", "disk"])
def test_a_run_that_falls_says_so_everywhere_and_goes_on_from_its_best_round(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bank: str
):
    settings = {"server.bank": bank, "diffusion.max-members": 2, "server.fraction-train": 0.5}
    run = run_app(tmp_path, 1, falling_grid(), **settings)
    fell, not_finite = run.warnings
    assert "0.9000 in round 2, then down to 0.2000 in rounds 3 to 6." in fell
    assert "losses or weights of up to 1 client were not finite" in not_finite
    kept = 'resume-from="digits-pfedgpa-1/best" goes on from it'
    assert fell.endswith(kept)
    assert caplog.text.count("Personalized accuracy fell: 0.9000 in round 2") == 1
    assert caplog.text.count("were not finite") == 1
    for warning in run.warnings:
        assert escape(warning) in (run.path / "report.html").read_text()
    shown = CliRunner().invoke(cli.app, ["runs", "show", "1", "--output-dir", str(tmp_path)])
    assert "\n".join(run.warnings) in shown.stdout
    assert (round_of(run.path), round_of(run.path / BEST)) == (6, 2)

    settings["resume-from"] = "digits-pfedgpa-1/best"
    again = run_app(tmp_path, 2, falling_grid(), **settings, **{"num-server-rounds": 3})
    assert again.config.resume_from == str(run.path / BEST)
    assert again.metrics[:2] == run.metrics[:2]
    both = [
        {key: value for key, value in each.metrics[2].items() if not key.startswith("seconds-")}
        for each in (again, run)
    ]
    assert both[0] == both[1]
    assert (round_of(again.path), round_of(again.path / BEST)) == (3, 2)
    # From the latest checkpoint of that one, the best round is still the second.
    settings["resume-from"] = "2"
    last = run_app(tmp_path, 3, falling_grid(), **settings, **{"num-server-rounds": 4})
    assert (round_of(last.path), round_of(last.path / BEST)) == (4, 2)


def test_models_of_the_best_round_are_written_by_a_run_that_has_nothing_left_to_do(tmp_path: Path):
    run_app(tmp_path, 1, falling_grid())
    settings = {"resume-from": "1/best", "num-server-rounds": 2}
    run = run_app(tmp_path, 2, falling_grid(), **settings)
    assert (run.state, len(run.metrics)) == ("complete", 2)
    assert run.model_file(3).exists()


def test_without_checkpoints_none_of_the_best_round_is_kept(tmp_path: Path):
    run = run_app(tmp_path, 1, falling_grid(), **{"checkpoint.every": 0})
    assert not (run.path / BEST).exists()
    assert "resume-from" not in run.warnings[0]


def test_a_run_whose_clients_all_diverge_in_the_first_round_says_what_may_help(tmp_path: Path):
    grid = falling_grid()
    for node in grid.nodes:
        grid.nodes[node] = lambda message: upload(
            {**weights(0.0), "layer.bias": torch.full((2,), torch.nan)}
        )
    with pytest.raises(RunError, match=r"4 clients: layer[.]bias has values(.|\n)*What may help"):
        run_app(tmp_path, 1, grid)
