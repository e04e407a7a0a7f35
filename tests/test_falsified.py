"""Replies are falsified, sites and settings are wrong: everyone else loses nothing."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from digit_sites import CLIENTS, LEARNED, QUICK, statuses, undisturbed, without, write_sites
from safetensors.torch import load_file

from benchmarks.faults import FAULTY_CLIENT, PATIENCE, Federation, copy_app
from benchmarks.network import read_lines, wait_until
from pfedgpa_app.data import site_data
from pfedgpa_app.exported import ExportedModel

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("warm_processes")]

# In the first round it is what replies say, in the second the objects that Flower makes of it, so
# that its own decoding stumbles.
REASONS = (
    {
        "nan": "not finite",
        "shape": "instead of float32",
        "names": "no tensor",
        "size": "bytes, and should have about",
        "record": "records",
    },
    {
        "json": "cannot be read: JSONDecodeError",
        "nesting": "cannot be read: RecursionError",
        "missing": "cannot be read: KeyError",
        "repeat": "cannot be read: ReplyError: its arrays have more than",
        "address": "answers another message",
    },
)
HONEST = CLIENTS - len(REASONS[0])
# And one more, whose data are not where its operator said.
NOWHERE = CLIENTS
# An honest one that wants its model at its place.
KEEPER, KEPT = 1, "kept.safetensors"


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Start honest SuperNodes and faulty ones, none of them registered."""
    sites = write_sites(tmp_path_factory.mktemp("sites"), pictures=0)
    folder = tmp_path_factory.mktemp("open")
    app = copy_app(folder / "app", FAULTY_CLIENT)
    with Federation(folder, CLIENTS, app, sites) as started:
        # A reply is lost where an object waits for more than 5 s for the lock of a database file.
        started.start_superlink("--database", ":flwr-in-memory:")
        for client, faults in enumerate(zip(*REASONS, strict=True), HONEST):
            started.start_client(client, f"fault='{','.join(faults)}'")
        started.start_client(KEEPER, f'model-path="{started.folder / KEPT}"')
        started.start_clients(*(client for client in range(HONEST) if client != KEEPER), NOWHERE)
        yield started


@pytest.fixture(scope="module")
def falsified_run(federation: Federation) -> Path:
    """Return the folder of a run among honest and faulty clients."""
    settings = {**QUICK, "num-server-rounds": 2, "server.min-available-nodes": CLIENTS + 1}
    federation.start_run("run", **settings)
    return federation.wait_for_end()


@pytest.mark.parametrize(
    ("server_round", "fault"),
    [(number, fault) for number, reasons in enumerate(REASONS, 1) for fault in reasons],
)
def test_a_falsified_reply_costs_its_sender_the_round(
    falsified_run: Path, server_round: int, fault: str
):
    reasons = REASONS[server_round - 1]
    client = HONEST + list(reasons).index(fault)
    rows = read_lines(falsified_run, "clients.jsonl")
    assert reasons[fault] in statuses(rows, client)[server_round]


def test_a_site_without_its_data_is_told_why_and_the_server_that_it_is_its_data(
    federation: Federation, falsified_run: Path
):
    said = f"{federation.sites}/{NOWHERE}.npz: no such folder of images or .npz file"
    assert f"This node cannot take part: {said}" in federation.log(f"client-{NOWHERE}")
    assert "This node cannot take part" not in federation.log("client-0")
    failed = statuses(read_lines(falsified_run, "clients.jsonl"), NOWHERE)
    assert failed.keys() == {1, 2}
    reason = "there is a problem with its data; the log of the node's SuperNode says which"
    assert all(reason in status for status in failed.values())
    assert reason in federation.log("run")
    # Neither the server nor what it passes on has the name of a site's file.
    assert f"{NOWHERE}.npz" not in federation.log("run") + federation.log("superlink")


def test_honest_clients_get_the_digits_of_a_run_without_the_faulty_ones(
    federation: Federation, falsified_run: Path
):
    strategy, expected = undisturbed(federation, HONEST, rounds=2)
    clients = read_lines(falsified_run, "clients.jsonl")
    last = [row for row in clients if row["round"] == 2 and row["client"] < HONEST]
    assert without(last, "node-id") == without(list(strategy.record.clients.values()), "node-id")
    counts = ("num-nodes", "num-failures", "num-not-finite", "bytes-down")
    assert without(read_lines(falsified_run), *counts) == without(expected, *counts)
    for client in range(HONEST):
        model = load_file(falsified_run / "models" / f"client-{client}.safetensors")
        for name, tensor in strategy.evaluation_state(client).items():
            assert torch.equal(model[name], tensor)
    assert LEARNED.search(federation.log("run"))


def test_a_site_has_the_model_that_it_was_sent_last(federation: Federation, falsified_run: Path):
    """Nobody is evaluated, so that is the model after the first of two rounds."""
    strategy, _ = undisturbed(federation, HONEST, rounds=1)
    kept = ExportedModel.load(federation.folder / KEPT, trusted=True)
    assert kept.server_round == 1
    assert kept.state.keys() == strategy.training_state(KEEPER).keys()
    for name, tensor in strategy.training_state(KEEPER).items():
        assert torch.equal(kept.state[name], tensor)
    data = site_data(federation.sites / f"{KEEPER}.npz", kept.config.data, kept.config.seed)
    hits = kept.predict(data.test_inputs).argmax(1) == data.test_labels
    rows = read_lines(falsified_run, "clients.jsonl")
    (row,) = [row for row in rows if (row["round"], row["client"]) == (2, KEEPER)]
    assert float(hits.double().mean()) == row["accuracy-before"]
    assert KEPT not in federation.log("run") + federation.log("superlink")


def test_a_client_that_is_not_registered_is_a_new_one_when_it_is_back(
    federation: Federation, falsified_run: Path
):
    federation.kill("client-0")
    federation.start_client(0)
    wait_until(lambda: len(federation.node_ids("client-0")) == 2, PATIENCE)
    before, after = federation.node_ids("client-0")
    assert before != after


def test_wrong_settings_stop_the_run_before_training_and_all_are_named(federation: Federation):
    wrong = {"diffusion.start": 5000, "server.fraction-train": 0.0, "data.dominant-classes": 11}
    federation.start_run("wrong", **wrong)
    federation.processes.pop("wrong").wait(PATIENCE)
    assert federation.run_folder() is None
    for key, value in wrong.items():
        assert f"{key} = {value}" in federation.log("wrong")
