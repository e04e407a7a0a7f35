"""A state is whole or not there, whenever its writer is killed or loses power."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from benchmarks.network import wait_until
from pfedgpa_app.state import WriteError, load_state, save_state


def test_a_state_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Otherwise a loss of power might leave the name with nothing behind it."""
    synced = []

    def sync(path: Path) -> None:
        synced.append((path, sorted(file.name for file in tmp_path.iterdir())))

    monkeypatch.setattr("pfedgpa_app.state.sync_to_disk", sync)
    save_state(tmp_path / "state", "test", {"a": torch.zeros(1)})
    assert synced == [
        (tmp_path / "state.unfinished", ["state.unfinished"]),
        (tmp_path, ["state"]),
    ]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
    ],
)
def test_on_a_full_disk_the_older_state_is_kept_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    save_state(tmp_path / "state", "test", {"a": torch.zeros(1)}, round=1)

    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half of a")
        raise error

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(WriteError, match="state cannot be written: the disk is full; right would"):
        save_state(tmp_path / "state", "test", {"a": torch.ones(1)}, round=2)
    assert load_state(tmp_path / "state", "test")[1] == {"round": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["state"]


def test_a_file_of_an_earlier_version_is_refused_by_its_name(tmp_path: Path):
    save_state(tmp_path / "state", "test-6", {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="is 'test-6'; right would be 'test-7'"):
        load_state(tmp_path / "state", "test-7")


# For each line it forks a process that writes one state after the other, says which process that
# is, and when it has ended.
WRITER = """
import os, sys
from pathlib import Path
import torch
from pfedgpa_app.state import save_state

for line in sys.stdin:
    process = os.fork()
    if process == 0:
        number = int(line)
        while True:
            number += 1
            tensors = {name: torch.full((500_000,), float(number)) for name in "ab"}
            save_state(Path(sys.argv[1]), "test", tensors, round=number)
    print(process, flush=True)
    print(os.waitpid(process, 0), flush=True)
"""


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "state")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as started:
        yield started


def test_a_process_killed_while_it_writes_leaves_the_state_of_a_complete_round(
    tmp_path: Path, writer: subprocess.Popen
):
    file, moments = tmp_path / "state", random.Random(0)
    save_state(file, "test", {"a": torch.zeros(1)}, round=0)
    last, times_unfinished = 0, 0
    for attempt in range(9):
        writer.stdin.write(f"{last}\n")
        process = int(writer.stdout.readline())
        if attempt % 3:  # it writes at its own pace: after a whole state, during the next one
            before = file.stat().st_mtime_ns
            wait_until(lambda before=before: file.stat().st_mtime_ns != before, pause=0.001)
            wait_until(file.with_name("state.unfinished").exists, pause=0.001)
        time.sleep(moments.choice((0.0, 0.005, 0.02)))
        os.kill(process, signal.SIGKILL)
        writer.stdout.readline()
        times_unfinished += file.with_name("state.unfinished").exists()
        tensors, fields = load_state(file, "test")
        assert fields["round"] >= last
        assert all((tensor == fields["round"]).all() for tensor in tensors.values())
        last = fields["round"]
    assert last > 0
    assert times_unfinished > 0, "no process was killed while it wrote"


def test_only_what_is_not_apart_is_copied_to_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A state may be a large part of what there is of memory."""
    rows = torch.arange(12.0).view(3, 4)
    state = {
        "whole": torch.ones(5),
        "rows": rows,
        "same": rows,
        "row": rows[1],
        "transposed": torch.arange(6.0).view(2, 3).T,
        "nothing": torch.empty(0),
        "nothing more": torch.empty(0),
    }
    written = {}

    def save(tensors, path, metadata):
        written.update({name: tensor.data_ptr() for name, tensor in tensors.items()})
        save_file(tensors, path, metadata)

    monkeypatch.setattr("safetensors.torch.save_file", save)
    save_state(tmp_path / "state", "test", state)
    loaded, _ = load_state(tmp_path / "state", "test")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert written["whole"] == state["whole"].data_ptr()
    assert written["rows"] == rows.data_ptr()
    assert len({written[name] for name in ("rows", "same", "row")}) == 3
