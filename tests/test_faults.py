"""What breaks on a network: processes killed and frozen, SuperNodes without registration."""

import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any, NamedTuple

import pytest
from digit_sites import CLIENTS, LEARNED, QUICK, statuses, undisturbed, without, write_sites

from benchmarks.faults import PATIENCE, PAUSE, SecureFederation, connect_unregistered
from benchmarks.network import read_lines, wait_until
from benchmarks.waiting_model import PIPE, held

pytestmark = [
    pytest.mark.processes,
    pytest.mark.slow,  # it waits for what the SuperLink takes a minute to notice
    pytest.mark.usefixtures("warm_processes"),
]

# The round in which a client is killed while it trains, and another one is frozen.
FAULT = 2


class HeldFederation(SecureFederation):
    """A federation whose clients, if they have a pipe, train when the test lets them."""

    def pipe(self, name: str) -> Path:
        """Return the pipe of a SuperNode."""
        return self.folder / f"{name}.pipe"

    def start_supernode(self, name: str, *arguments: Any, **options: Any) -> Popen[bytes]:
        """Start a SuperNode that knows its pipe."""
        env = {PIPE: str(self.pipe(name))}
        return super().start_supernode(name, *arguments, **options, env=env)

    def let_wait(self, *clients: int) -> None:
        """From now on, let clients wait in each training."""
        for client in clients:
            os.mkfifo(self.pipe(f"client-{client}"))

    def let_be(self, *clients: int) -> None:
        """From the next training on, let clients train without waiting."""
        for client in clients:
            self.pipe(f"client-{client}").unlink()

    @contextmanager
    def in_training(self, *clients: int) -> Iterator[None]:
        """Wait until clients train, and let them on at the end."""
        with held(*(self.pipe(f"client-{client}") for client in clients), timeout=PATIENCE):
            yield

    def let_train(self, *clients: int) -> None:
        """Wait until clients train, and let them on."""
        with self.in_training(*clients):
            pass


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HeldFederation]:
    folder = tmp_path_factory.mktemp("secure")
    sites = write_sites(tmp_path_factory.mktemp("sites"))
    with HeldFederation(folder, CLIENTS, sites=sites) as started:
        started.start_superlink()
        started.start_clients(0, 1, 2)
        yield started


# The ServerApp and the SuperLink are killed, and unregistered SuperNodes connect.


@pytest.fixture(scope="module")
def killed_runs(federation: HeldFederation) -> list[Path]:
    """Kill the ServerApp in round 2, the SuperLink in round 3; return the folders of the runs."""
    everyone = (0, 1, 2)
    settings = {**QUICK, "num-server-rounds": 3, "server.min-available-nodes": 3}
    federation.let_wait(*everyone)
    federation.start_run("run", **settings)
    connect_unregistered(federation)
    federation.let_train(*everyone)
    federation.wait_for_rounds(1)
    with federation.in_training(*everyone):
        federation.kill_below("superlink", "flwr-serverapp")
    folders = [federation.run_folder()]

    federation.start_run("resumed", **settings, **{"resume-from": folders[0].name})
    federation.let_train(*everyone)
    federation.wait_for_rounds(2, "resumed")
    with federation.in_training(*everyone):
        federation.kill("superlink")
    folders.append(federation.run_folder())

    federation.let_be(*everyone)
    federation.start_superlink()
    federation.start_run("resumed-again", **settings, **{"resume-from": folders[1].name})
    return [*folders, federation.wait_for_end("resumed-again")]


def test_killed_and_resumed_a_run_gives_the_digits_of_one_that_was_never_disturbed(
    federation: HeldFederation, killed_runs: list[Path]
):
    strategy, expected = undisturbed(federation, clients=3, rounds=3)
    assert without(read_lines(killed_runs[-1])) == without(expected)
    last = [row for row in read_lines(killed_runs[-1], "clients.jsonl") if row["round"] == 3]
    # The other is a simulation, whose nodes have no names.
    assert [row["name"] for row in last] == [f"client-{row['client']}" for row in last]
    plain = without(list(strategy.record.clients.values()), "node-id")
    assert without(last, "node-id", "name") == plain
    assert [len(read_lines(folder)) for folder in killed_runs] == [1, 2, 3]
    assert LEARNED.search(federation.log("resumed-again"))


def test_clients_find_the_restarted_superlink_and_keep_their_ids(
    federation: HeldFederation, killed_runs: list[Path]
):
    for client in range(3):
        ids = federation.node_ids(f"client-{client}")
        assert len(ids) == 1, "it was started once"
        rows = read_lines(killed_runs[-1], "clients.jsonl")
        assert [row["node-id"] for row in rows if row["client"] == client] == ids * 3


def test_the_superlink_counts_killed_runs_as_failed(
    federation: HeldFederation, killed_runs: list[Path]
):
    for folder in killed_runs[:-1]:

        def has_failed(folder: Path = folder) -> bool:
            return federation.status(folder) == "finished:failed"

        wait_until(has_failed, PATIENCE, PAUSE)
    assert federation.status(killed_runs[-1]) == "finished:completed"


@pytest.mark.parametrize(
    ("name", "says", "superlink_says"),
    [
        ("no-key", "All SuperNodes must be registered via the CLI", "ApiError:2001"),
        ("unknown-key", "Failed to activate SuperNode", "No SuperNode found with the given public"),
        ("no-tls", "Connection attempt failed", None),
    ],
)
def test_supernodes_that_nobody_registered_are_refused(
    federation: HeldFederation,
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

    def statuses(self, client: int) -> dict[int, str]:
        """Return what became of a client, by round."""
        return statuses(self.clients, client)


@pytest.fixture(scope="module")
def disturbed(federation: HeldFederation, killed_runs: list[Path]) -> Disturbed:
    """Run until everyone takes part again, and end the run."""
    # As long as clients certainly need, on a machine that may have other work to do.
    timeout = max(60.0, 4 * read_lines(killed_runs[-1])[-1]["seconds-clients"])
    settings = {**QUICK, "server.min-available-nodes": 4, "server.round-timeout": timeout}
    federation.start_clients(3)
    federation.let_wait(2, 3)
    federation.start_run("disturbed", **settings, **{"num-server-rounds": 100})
    federation.let_train(2, 3)
    federation.wait_for_rounds(1, "disturbed")
    with federation.in_training(2, 3):
        federation.let_be(2, 3)
        federation.kill("client-2")
        begin = time.monotonic()
        with federation.frozen("client-3"):
            federation.start_client(4)
            federation.restart_client(2)
            federation.wait_for_rounds(FAULT, "disturbed")  # without these two
            time.sleep(max(0.0, begin + timeout - time.monotonic()))

    def take_part() -> bool:
        rows = [row for row in federation.rows("clients.jsonl") if row["round"] > FAULT]
        used = Counter(row["client"] for row in rows if row["status"] == "ok")
        return all(used[client] >= 1 for client in (2, 3)) and used[4] >= 2

    def has_logged(num_rounds: int) -> bool:
        return federation.log("disturbed").count(" in the bank, ") >= num_rounds

    wait_until(take_part, PATIENCE)
    num_rounds = len(federation.rows())
    # Flower hands a log on some seconds later, and not what is new when a run is stopped.
    wait_until(lambda: has_logged(num_rounds), PATIENCE)
    folder = federation.run_folder()
    federation.flwr("stop", folder.name, "test")
    federation.wait_for_end("disturbed")
    # Nobody needs this network any more, and the next one needs the processor.
    for name in [*federation.processes]:
        federation.kill(name)
    return Disturbed(read_lines(folder, "clients.jsonl"), read_lines(folder))


@pytest.mark.parametrize("client", [2, 3])
def test_a_round_ends_without_a_client_that_is_killed_or_frozen(disturbed: Disturbed, client: int):
    status = disturbed.statuses(client)
    assert status[1] == "ok"
    assert "Node Unavailable" in status[FAULT] or status[FAULT] == "no reply"


def test_the_others_take_part_in_every_round(disturbed: Disturbed):
    for client in (0, 1):
        assert disturbed.statuses(client) == {row["round"]: "ok" for row in disturbed.rounds}


def test_a_registered_client_that_was_killed_is_back_under_its_id(
    federation: HeldFederation, disturbed: Disturbed
):
    before, after = federation.node_ids("client-2")
    assert before == after
    assert {row["node-id"] for row in disturbed.clients if row["client"] == 2} == {before}
    later = [status for n, status in disturbed.statuses(2).items() if n > FAULT]
    assert "ok" in later


def test_a_frozen_client_takes_part_again_and_its_late_reply_is_not_read(
    federation: HeldFederation, disturbed: Disturbed
):
    later = [status for n, status in disturbed.statuses(3).items() if n > FAULT]
    assert "ok" in later
    replies = federation.log("client-3").count("Sending: train message")
    assert replies > list(disturbed.statuses(3).values()).count("ok")
    assert "unsolicited" not in federation.log("disturbed")


def test_a_client_that_joins_late_is_onboarded_and_then_a_member(
    federation: HeldFederation, disturbed: Disturbed
):
    first, second, *_ = (n for n, status in disturbed.statuses(4).items() if status == "ok")
    lines = re.findall(
        r"pFedGPA: (\d+) clients? in the bank.*; (\d+) newcomers? in this round",
        federation.log("disturbed"),
    )
    assert first > 1
    for number, expected in ((1, ("4", "0")), (first, ("4", "1")), (second, ("5", "0"))):
        assert lines[number - 1] == expected
