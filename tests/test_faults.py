"""What breaks on a network: processes killed and frozen, replies falsified, strangers at the door.

Every federation here is one of processes on loopback. What an undisturbed run gives is computed in
this process (`simulate`), which another test compares with `flwr run`.
"""

import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from flwr.common.config import parse_config_args
from network import read_lines, wait_until
from PIL import Image
from safetensors.torch import load_file

from benchmarks.faults import (
    FAULTY_CLIENT,
    PATIENCE,
    Federation,
    SecureFederation,
    copy_app,
    knock,
)
from pfedgpa_app.config import Config, DataConfig
from pfedgpa_app.data import client_data
from server_app.simulation import PoolGrid, simulate
from server_app.strategies import ClientwiseFedAvg

pytestmark = pytest.mark.processes

CLIENTS = 8
# Every message has a process of its own, and half of its time would be that of the packages that
# share out a data set; so sites have their own data. Nobody evaluates: what a client was sent is
# judged before it trains (accuracy-before) anyway.
QUICK = {
    "data.dataset": "sites",
    "data.image-shape": "1x8x8",
    "data.num-classes": 10,
    "client.local-epochs": 1,
    "diffusion.train-steps": 20,
    "server.fraction-evaluate": 0.0,
}
# What the server says of a diffusion model. Two clients have no axis that stands out, three do.
LEARNED = re.compile(r"[1-9]\d* dimensions from timestep")


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the digits of every client, those of the first one as pictures."""
    folder = tmp_path_factory.mktemp("sites")
    for client in range(CLIENTS):
        data = client_data(DataConfig(), 0, client, CLIENTS)
        if client == 0:
            write_pictures(folder / "0.npz" / "train", data.train_images, data.train_labels)
            write_pictures(folder / "0.npz" / "test", data.test_images, data.test_labels)
            continue
        images = torch.cat([data.train_images, data.test_images])
        labels = torch.cat([data.train_labels, data.test_labels])
        np.savez(folder / f"{client}.npz", x=images, y=labels)
    return folder


def write_pictures(folder: Path, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Write a picture an image, in a folder a class."""
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        file = folder / str(label) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(file)


def undisturbed(
    federation: Federation, clients: int, rounds: int
) -> tuple[ClientwiseFedAvg, list[dict[str, Any]]]:
    """Return the strategy at the end of a run with the first clients alone, and its metrics."""

    def node_config(grid: PoolGrid, node: int) -> dict[str, Any]:
        return parse_config_args([federation.node_config(node)])

    config = {**QUICK, "client.device": "cpu", "num-server-rounds": rounds}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PoolGrid, "node_config", node_config)
        return simulate(Config.from_flat(config), clients)


def statuses(clients: list[dict[str, Any]], client: int) -> dict[int, str]:
    """Return what became of a client, by round."""
    return {row["round"]: row["status"] for row in clients if row["client"] == client}


def without(rows: list[dict], *names: str) -> list[dict]:
    """Leave out columns, those of seconds among them."""
    return [
        {k: v for k, v in row.items() if not k.startswith("seconds") and k not in names}
        for row in rows
    ]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, sites: Path) -> Iterator[SecureFederation]:
    folder = tmp_path_factory.mktemp("secure")
    with SecureFederation(folder, CLIENTS, sites=sites) as started:
        started.start_superlink()
        started.start_clients(0, 1, 2)
        yield started


# The ServerApp and the SuperLink are killed, and strangers knock.


@pytest.fixture(scope="module")
def killed_runs(federation: SecureFederation) -> list[Path]:
    """Kill the ServerApp in round 2, the SuperLink in round 3; return the folders of the runs."""
    settings = {**QUICK, "num-server-rounds": 3, "server.min-available-nodes": 3}
    federation.start_run("run", **settings)
    knock(federation)
    federation.wait_for_rounds(1)
    federation.wait_for_training(0)
    federation.kill_below("superlink", "flwr-serverapp")
    folders = [federation.run_folder()]

    federation.start_run("resumed", **settings, **{"resume-from": folders[0].name})
    federation.wait_for_rounds(2, "resumed")
    federation.wait_for_training(0)
    federation.kill("superlink")
    folders.append(federation.run_folder())

    federation.start_superlink()
    federation.start_run("resumed-again", **settings, **{"resume-from": folders[1].name})
    return [*folders, federation.wait_for_end("resumed-again")]


def test_killed_and_resumed_a_run_gives_the_digits_of_one_that_was_never_disturbed(
    federation: SecureFederation, killed_runs: list[Path]
):
    strategy, expected = undisturbed(federation, clients=3, rounds=3)
    assert without(read_lines(killed_runs[-1])) == without(expected)
    last = [row for row in read_lines(killed_runs[-1], "clients.jsonl") if row["round"] == 3]
    assert without(last, "node-id") == without(list(strategy.record.clients.values()), "node-id")
    assert [len(read_lines(folder)) for folder in killed_runs] == [1, 2, 3]
    assert LEARNED.search(federation.log("resumed-again"))


def test_clients_find_the_restarted_superlink_and_keep_their_ids(
    federation: SecureFederation, killed_runs: list[Path]
):
    for client in range(3):
        ids = federation.node_ids(f"client-{client}")
        assert len(ids) == 1, "it was started once"
        rows = read_lines(killed_runs[-1], "clients.jsonl")
        assert [row["node-id"] for row in rows if row["client"] == client] == ids * 3


def test_the_superlink_counts_killed_runs_as_failed(
    federation: SecureFederation, killed_runs: list[Path]
):
    for folder in killed_runs[:-1]:
        wait_until(lambda folder=folder: federation.status(folder) == "finished:failed")
    assert federation.status(killed_runs[-1]) == "finished:completed"


@pytest.mark.parametrize(
    ("name", "says", "superlink_says"),
    [
        ("no-key", "All SuperNodes must be registered via the CLI", "ApiError:2001"),
        ("unknown-key", "Failed to activate SuperNode", "No SuperNode found with the given public"),
        ("no-tls", "Connection attempt failed", None),
    ],
)
def test_strangers_are_refused(
    federation: SecureFederation,
    killed_runs: list[Path],
    name: str,
    says: str,
    superlink_says: str | None,
):
    wait_until(lambda: says in federation.log(name), PATIENCE)
    assert federation.node_ids(name) == []
    assert superlink_says is None or superlink_says in federation.log("superlink")
    rows = read_lines(killed_runs[-1], "clients.jsonl")
    assert {row["client"] for row in rows} == {0, 1, 2}, "nobody else was asked for anything"


# One SuperNode is killed, another one is frozen, and a new one joins.


class Disturbed(NamedTuple):
    """A run in which client 2 is killed, client 3 is frozen, and client 4 joins."""

    clients: list[dict[str, Any]]
    rounds: list[dict[str, Any]]
    fault: int
    """The round in which it happens."""
    timeout: float

    def statuses(self, client: int) -> dict[int, str]:
        """Return what became of a client, by round."""
        return statuses(self.clients, client)


@pytest.fixture(scope="module")
def disturbed(federation: SecureFederation, killed_runs: list[Path]) -> Disturbed:
    """Run until everyone takes part again, and end the run."""
    # As long as clients certainly need, on a machine that may have other work to do.
    seconds = [row["seconds-clients"] for row in read_lines(killed_runs[-1])]
    timeout = max(60.0, 4 * min(seconds))
    settings = {**QUICK, "server.min-available-nodes": 4, "server.round-timeout": timeout}
    federation.start_clients(3)
    federation.start_run("disturbed", **settings, **{"num-server-rounds": 100})
    federation.wait_for_rounds(1, "disturbed")
    federation.wait_for_training(2, 3)
    fault = len(federation.rows()) + 1
    federation.kill("client-2")
    begin = time.monotonic()
    with federation.frozen("client-3"):
        federation.start_client(4)
        federation.restart_client(2)
        federation.wait_for_rounds(fault, "disturbed")
        time.sleep(max(0.0, begin + timeout - time.monotonic()))

    def take_part() -> bool:
        rows = [row for row in federation.rows("clients.jsonl") if row["round"] > fault]
        used = Counter(row["client"] for row in rows if row["status"] == "ok")
        return all(used[client] >= 1 for client in (2, 3)) and used[4] >= 2

    wait_until(take_part, PATIENCE)
    folder = federation.run_folder()
    federation.flwr("stop", folder.name, "test")
    federation.wait_for_end("disturbed")
    # Nobody needs this network any more, and the next one needs the processor.
    for name in [*federation.processes]:
        federation.kill(name)
    return Disturbed(read_lines(folder, "clients.jsonl"), read_lines(folder), fault, timeout)


@pytest.mark.parametrize("client", [2, 3])
def test_a_round_ends_without_a_client_that_is_killed_or_frozen(disturbed: Disturbed, client: int):
    status = disturbed.statuses(client)
    assert status[1] == "ok"
    assert "Node Unavailable" in status[disturbed.fault] or status[disturbed.fault] == "no reply"
    # The SuperLink takes a silent node for connected for a minute at most.
    assert disturbed.rounds[disturbed.fault - 1]["seconds-clients"] < disturbed.timeout + 15


def test_the_others_take_part_in_every_round(disturbed: Disturbed):
    for client in (0, 1):
        assert disturbed.statuses(client) == {row["round"]: "ok" for row in disturbed.rounds}


def test_a_registered_client_that_was_killed_is_back_under_its_id(
    federation: SecureFederation, disturbed: Disturbed
):
    before, after = federation.node_ids("client-2")
    assert before == after
    assert {row["node-id"] for row in disturbed.clients if row["client"] == 2} == {before}
    later = [status for n, status in disturbed.statuses(2).items() if n > disturbed.fault]
    assert "ok" in later


def test_a_frozen_client_takes_part_again_and_its_late_reply_is_not_read(
    federation: SecureFederation, disturbed: Disturbed
):
    later = [status for n, status in disturbed.statuses(3).items() if n > disturbed.fault]
    assert "ok" in later
    replies = federation.log("client-3").count("Sending: train message")
    assert replies > list(disturbed.statuses(3).values()).count("ok")
    assert "nobody asked for" not in federation.log("disturbed")


def test_a_client_that_joins_late_is_onboarded_and_then_a_member(
    federation: SecureFederation, disturbed: Disturbed
):
    first, second, *_ = (n for n, status in disturbed.statuses(4).items() if status == "ok")
    lines = re.findall(
        r"pFedGPA: (\d+) members.*; (\d+) newcomers in this round", federation.log("disturbed")
    )
    assert first > 1
    for number, expected in ((1, ("4", "0")), (first, ("4", "1")), (second, ("5", "0"))):
        assert lines[number - 1] == expected


# Replies are falsified: in the first round what they say, in the second the objects that Flower
# makes of it, so that its own decoding stumbles.

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


@pytest.fixture(scope="module")
def open_federation(tmp_path_factory: pytest.TempPathFactory, sites: Path) -> Iterator[Federation]:
    """Start honest SuperNodes and faulty ones, none of them registered."""
    folder = tmp_path_factory.mktemp("open")
    app = copy_app(folder / "app", FAULTY_CLIENT)
    with Federation(folder, CLIENTS, app, sites) as started:
        # A reply is lost where an object waits for more than 5 s for the lock of a database file.
        started.start_superlink("--database", ":flwr-in-memory:")
        for client, faults in enumerate(zip(*REASONS, strict=True), HONEST):
            started.start_client(client, f"fault='{','.join(faults)}'")
        started.start_clients(*range(HONEST), NOWHERE)
        yield started


@pytest.fixture(scope="module")
def falsified_run(open_federation: Federation) -> Path:
    """Return the folder of a run among honest and faulty clients."""
    settings = {**QUICK, "num-server-rounds": 2, "server.min-available-nodes": CLIENTS + 1}
    open_federation.start_run("run", **settings)
    return open_federation.wait_for_end()


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


def test_a_site_without_its_data_is_told_and_so_is_the_server(
    open_federation: Federation, falsified_run: Path
):
    said = f"{open_federation.sites}/{NOWHERE}.npz: no such folder of images or .npz file"
    assert f"This node cannot take part: {said}" in open_federation.log(f"client-{NOWHERE}")
    assert "This node cannot take part" not in open_federation.log("client-0")
    failed = statuses(read_lines(falsified_run, "clients.jsonl"), NOWHERE)
    assert failed.keys() == {1, 2}
    assert all(said in status for status in failed.values())
    assert said in open_federation.log("run")


def test_honest_clients_get_the_digits_of_a_run_without_the_faulty_ones(
    open_federation: Federation, falsified_run: Path
):
    strategy, expected = undisturbed(open_federation, HONEST, rounds=2)
    clients = read_lines(falsified_run, "clients.jsonl")
    last = [row for row in clients if row["round"] == 2 and row["client"] < HONEST]
    assert without(last, "node-id") == without(list(strategy.record.clients.values()), "node-id")
    counts = ("num-nodes", "num-failures", "bytes-down")
    assert without(read_lines(falsified_run), *counts) == without(expected, *counts)
    for client in range(HONEST):
        model = load_file(falsified_run / "models" / f"client-{client}.safetensors")
        for name, tensor in strategy.evaluation_state(client).items():
            assert torch.equal(model[name], tensor)
    assert LEARNED.search(open_federation.log("run"))


def test_a_client_that_is_not_registered_is_a_new_one_when_it_is_back(
    open_federation: Federation, falsified_run: Path
):
    open_federation.kill("client-0")
    open_federation.start_client(0)
    wait_until(lambda: len(open_federation.node_ids("client-0")) == 2, PATIENCE)
    before, after = open_federation.node_ids("client-0")
    assert before != after
