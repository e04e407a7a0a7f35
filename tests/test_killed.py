"""A run may be killed, or its disk be full, at any moment: what is left then, and resumed."""

import itertools
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from flwr.app import Context, RecordDict
from safetensors.torch import load_file
from simulated_grid import SimulatedGrid, learning_grid, weights

from pfedgpa_app.model_spec import ModelSpec
from pfedgpa_app.report import ROWS, RunFolder
from pfedgpa_app.runs import BEST
from pfedgpa_app.state import WriteError, load_state
from server_app import app
from server_app.checkpoint import CHECKPOINT, CHECKPOINT_KIND, write_checkpoint

ROUNDS = 5
STRATEGIES = ["pfedgpa", "local", "fedavg", "fedavg-ft"]


class Killed(BaseException):
    """In place of SIGKILL: nothing catches it."""


def run_app(output: Path, run_id: int, first_id: int = 1000, **settings: object) -> Path:
    """Run the ServerApp among six sites, whose node ids begin there; return the run's folder."""
    config = {"output-dir": str(output), "num-server-rounds": ROUNDS, "diffusion.train-steps": 5}
    config |= {"server.fraction-train": 0.5, **settings}
    context = Context(run_id, 1, {}, RecordDict(), config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "preflight", lambda config: ModelSpec.of_state(weights(0.0)))
        app.main(learning_grid(first_id), context)
    return output / str(run_id)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that was never killed."""
    return run_app(tmp_path_factory.mktemp("undisturbed"), 1)


def before_call(
    monkeypatch: pytest.MonkeyPatch,
    owner: object,
    name: str,
    actions: Mapping[int, Callable[[], None]],
) -> None:
    """Let something happen before a function is called for the n-th time."""
    original, calls = getattr(owner, name), itertools.count(1)

    def disturbed(*args, **kwargs):
        if action := actions.get(next(calls)):
            action()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, disturbed)


def kill_at(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int) -> None:
    """Let a function be the last thing that is begun when it is called for the n-th time."""

    def kill() -> None:
        raise Killed

    before_call(monkeypatch, owner, name, {call: kill})


def rows(folder: Path, name: str) -> list[dict]:
    """Return what runs with the same result have in common: times and node ids differ."""
    if name == "method.jsonl" and not (folder / name).exists():
        return []  # only pFedGPA writes it
    lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [
        {key: v for key, v in line.items() if not key.startswith("seconds") and key != "node-id"}
        for line in lines
    ]


def assert_same_results(folder: Path, expected: Path) -> None:
    for name in ROWS:
        assert rows(folder, name) == rows(expected, name)
    models = sorted(path.name for path in (expected / "models").iterdir())
    assert len(models) == 6
    assert sorted(path.name for path in (folder / "models").iterdir()) == models
    for name in models:
        ours, theirs = (load_file(path / "models" / name) for path in (folder, expected))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())


# What is killed when it is called for the n-th time, and the round that is then complete.
MOMENTS = {
    "before the first round": (RunFolder, "add_round", 1, 0),
    "before a round's rows": (RunFolder, "add_round", 3, 2),
    # The first checkpoint is that of round 0.
    "between a round's rows and its checkpoint": (app, "write_checkpoint", 4, 2),
    "between the last round and the models": (RunFolder, "save_model", 1, ROUNDS),
    "among the models": (RunFolder, "save_model", 4, ROUNDS),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment_a_run_loses_the_round_in_progress_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: Path, moment: str
):
    owner, name, call, complete = MOMENTS[moment]
    with monkeypatch.context() as patch:
        kill_at(patch, owner, name, call)
        with pytest.raises(Killed):
            run_app(tmp_path, 2)
    assert load_state(tmp_path / "2" / CHECKPOINT, CHECKPOINT_KIND)[1]["round"] == complete
    assert_same_results(run_app(tmp_path, 3, **{"resume-from": "2"}), expected)


@pytest.mark.parametrize("missing", [20, None], ids=["cut off", "missing in metrics.jsonl"])
def test_lines_that_are_cut_off_or_missing_do_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: Path, missing: int | None
):
    with monkeypatch.context() as patch:
        kill_at(patch, app, "write_checkpoint", 4)
        with pytest.raises(Killed):
            run_app(tmp_path, 2)
    for name in ROWS if missing else ["metrics.jsonl"]:  # which is written last
        file = tmp_path / "2" / name
        last = len(file.read_bytes().splitlines(keepends=True)[-1])
        os.truncate(file, file.stat().st_size - (missing or last))
    assert_same_results(run_app(tmp_path, 3, **{"resume-from": "2"}), expected)


def test_killed_between_checkpoints_a_run_goes_on_after_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: Path
):
    seldom = {"checkpoint.every": 3}
    with monkeypatch.context() as patch:
        kill_at(patch, RunFolder, "add_round", 5)
        with pytest.raises(Killed):
            run_app(tmp_path, 2, **seldom)
    assert [row["round"] for row in rows(tmp_path / "2", "metrics.jsonl")] == [1, 2, 3, 4]
    assert load_state(tmp_path / "2" / CHECKPOINT, CHECKPOINT_KIND)[1]["round"] == 3
    assert_same_results(run_app(tmp_path, 3, **seldom, **{"resume-from": "2"}), expected)
    assert load_state(tmp_path / "3" / CHECKPOINT, CHECKPOINT_KIND)[1]["round"] == ROUNDS


@pytest.mark.parametrize("every", [1, 2])
def test_models_on_disk_are_those_that_the_checkpoint_counts_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
):
    few = {"diffusion.max-members": 2, "server.fraction-train": 0.34, "checkpoint.every": every}
    expected = run_app(tmp_path, 1, **few)
    few["server.bank"] = "disk"
    with monkeypatch.context() as patch:
        kill_at(patch, RunFolder, "add_round", 5)
        with pytest.raises(Killed):
            run_app(tmp_path, 2, **few)
    checkpoint = load_state(tmp_path / "2" / CHECKPOINT, CHECKPOINT_KIND)[0]
    assert any(name.startswith("aggregator.bank.archived.") for name in checkpoint)
    assert_same_results(run_app(tmp_path, 3, **few, **{"resume-from": "2"}), expected)
    assert len(list((tmp_path / "3" / "bank").iterdir())) <= 4


def test_a_resumed_run_that_is_killed_at_once_is_resumed_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: Path
):
    for run_id, settings in ((2, {}), (3, {"resume-from": "2", "checkpoint.every": 3})):
        with monkeypatch.context() as patch:
            kill_at(patch, RunFolder, "add_round", 3 if run_id == 2 else 1)
            with pytest.raises(Killed):
                run_app(tmp_path, run_id, **settings)
    assert_same_results(run_app(tmp_path, 4, **{"resume-from": "3"}), expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_whose_rounds_are_complete_is_finished_without_asking_a_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
):
    complete = run_app(tmp_path, 1, strategy=strategy)
    monkeypatch.setattr("simulated_grid.SimulatedGrid.send_and_receive", None)
    resumed = run_app(tmp_path, 2, strategy=strategy, **{"resume-from": "1"})
    assert_same_results(resumed, complete)


def test_a_finished_run_is_made_longer(tmp_path: Path, expected: Path):
    run_app(tmp_path, 2, **{"num-server-rounds": ROUNDS - 2})
    # Nothing but the end is new, so the folder in between must hold all that is needed.
    run_app(tmp_path, 3, **{"num-server-rounds": ROUNDS - 2, "resume-from": "2"})
    assert_same_results(run_app(tmp_path, 4, **{"resume-from": "3"}), expected)


def test_without_checkpoints_none_is_written(tmp_path: Path):
    folder = run_app(tmp_path, 1, **{"checkpoint.every": 0})
    assert not list(folder.glob(CHECKPOINT + "*"))


def test_what_an_unfinished_checkpoint_left_does_no_harm(tmp_path: Path, expected: Path):
    folder = run_app(tmp_path, 2, **{"num-server-rounds": 2})
    left_over = folder / (CHECKPOINT + ".unfinished")
    left_over.write_bytes(b"half of a")
    assert_same_results(run_app(tmp_path, 3, **{"resume-from": "2"}), expected)
    strategy = app.make_strategy(app.Config(), ModelSpec.of_state(weights(1.0)))
    write_checkpoint(folder, strategy)
    assert not left_over.exists()
    load_state(folder / CHECKPOINT, CHECKPOINT_KIND)


class Disk:
    """A small disk, which can be filled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.filler = path / "filler"

    def fill(self) -> None:
        with suppress(OSError), self.filler.open("ab", buffering=0) as file:
            while file.write(bytes(4096)):
                pass

    def make_room(self) -> None:
        self.filler.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Mount a disk of 16 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("no file system may be mounted")
    yield Disk(path)
    subprocess.run(["umount", str(path)], check=True)


def test_a_run_outlasts_a_disk_that_is_full_for_some_rounds(
    disk: Disk,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    expected: Path,
):
    before_call(monkeypatch, RunFolder, "add_round", {2: disk.fill, 4: disk.make_room})
    folder = run_app(disk.path, 2)
    assert_same_results(folder, expected)
    assert load_state(folder / CHECKPOINT, CHECKPOINT_KIND)[1]["round"] == ROUNDS
    warnings = [text for text in caplog.messages if "the disk is full" in text]
    assert [text.split(" is not on the disk")[0] for text in warnings] == ["Round 2", "Round 3"]
    assert all("goes on, and tries again after the next round" in text for text in warnings)


def test_a_checkpoint_that_could_not_be_written_is_due_in_the_next_round(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
):
    before_call(monkeypatch, app, "write_checkpoint", {2: disk.fill})
    before_call(monkeypatch, RunFolder, "add_round", {4: disk.make_room})
    kill_at(monkeypatch, RunFolder, "add_round", 5)
    with pytest.raises(Killed):
        run_app(disk.path, 2, **{"checkpoint.every": 3})
    assert load_state(disk.path / "2" / CHECKPOINT, CHECKPOINT_KIND)[1]["round"] == 4


# From when on the disk is full, and the round of the last whole checkpoint.
FULL = {
    "before a round's rows": (RunFolder, "add_round", 3, 2),
    "between a round's rows and its checkpoint": (app, "write_checkpoint", 4, 2),
    "before the rows of the last round": (RunFolder, "add_round", ROUNDS, ROUNDS - 1),
    "among the models": (RunFolder, "save_model", 4, ROUNDS),
}


@pytest.mark.parametrize("moment", FULL)
def test_a_run_that_ends_on_a_full_disk_goes_on_from_its_last_checkpoint(
    disk: Disk,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    expected: Path,
    moment: str,
):
    owner, name, call, complete = FULL[moment]
    with monkeypatch.context() as patch:
        before_call(patch, owner, name, {call: disk.fill})
        with pytest.raises(WriteError, match="cannot be written: the disk is full"):
            run_app(disk.path, 2)
    assert 'the disk is full; right would be free space on it. Then resume-from="2"' in caplog.text
    folder = disk.path / "2"
    assert load_state(folder / CHECKPOINT, CHECKPOINT_KIND)[1]["round"] == complete
    whole = {"run.json", "config.json", *ROWS, CHECKPOINT}
    assert {path.name for path in folder.iterdir()} - {"models", BEST} == whole
    for name in ROWS:
        assert rows(folder, name)[-1]["round"] >= complete
    for model in folder.glob("models/*"):
        load_file(model)
    disk.make_room()
    assert_same_results(run_app(disk.path, 3, **{"resume-from": "2"}), expected)


def test_a_run_does_not_begin_on_a_full_disk(disk: Disk, caplog: pytest.LogCaptureFixture):
    disk.fill()
    with pytest.raises(WriteError, match="cannot be written: the disk is full"):
        run_app(disk.path, 2)
    assert "2 cannot be written: the disk is full" in caplog.text
    assert "resume-from" not in caplog.text


@pytest.mark.parametrize(("simulated", "numbers"), [(False, range(6, 12)), (True, range(6))])
def test_new_node_ids_are_the_clients_of_before_in_a_simulation_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, simulated: bool, numbers: range
):
    if simulated:
        monkeypatch.setattr(app, "InMemoryGrid", SimulatedGrid)
    run_app(tmp_path, 1, **{"server.fraction-train": 1.0})
    again = {"server.fraction-train": 1.0, "num-server-rounds": ROUNDS + 1, "resume-from": "1"}
    rows = (run_app(tmp_path, 2, first_id=5000, **again) / "clients.jsonl").read_text()
    last = [json.loads(row) for row in rows.splitlines()][-6:]
    assert [row["client"] for row in last] == list(numbers)
    assert {row["round"] for row in last} == {ROUNDS + 1}
