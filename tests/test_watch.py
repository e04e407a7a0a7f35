"""The command pfedgpa watch."""

import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from pfedgpa_app import cli, watch
from pfedgpa_app.config import Config
from pfedgpa_app.report import RunFolder, read_rows
from pfedgpa_app.rounds import RoundRecord, summarize

NUM_ROUNDS = 3


def end_round(folder: RunFolder, number: int, failures: dict[int, str] | None = None) -> None:
    """Write a round of ten clients, of which some fail."""
    record = RoundRecord(number, seconds_clients=1.5, seconds_diffusion=0.25)
    for client in range(10):
        record.trained(client, {"accuracy-before": 0.5, "accuracy-after": 0.75}, 100)
        record.evaluated(client, {"accuracy": 0.8 + client / 100})
    for client, reason in (failures or {}).items():
        record.note(client, status=reason)
    folder.add_round(summarize(record, "pfedgpa", 2.0), record.clients.values())


def meanwhile(monkeypatch: pytest.MonkeyPatch, *actions: Callable[[], None]) -> None:
    """Let something happen each time that the command waits."""
    left = iter(actions)
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: next(left)())


def invoke(output: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["watch", *arguments, "--output-dir", str(output)])


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "111", Config(num_server_rounds=NUM_ROUNDS))


def line(number: int, num_clients: int) -> str:
    return (
        f"Round {number}/3: personalized accuracy 0.8450 (worst client 0.8000), as sent 0.5000, "
        f"after local training 0.7500; {num_clients} clients, 2.0 s (clients 1.5, diffusion 0.2)"
    )


def test_in_a_pipe_a_run_has_a_line_a_round_until_it_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: RunFolder
):
    end_round(folder, 1)
    meanwhile(
        monkeypatch,
        lambda: end_round(folder, 2, {7: "no reply", 3: "[red]its data are gone"}),
        lambda: None,
        lambda: end_round(folder, 3),
        lambda: folder.__exit__(),
    )
    result = invoke(tmp_path)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        line(1, 10),
        f"{line(2, 8)}; 2 failed",
        "  client 3: [red]its data are gone",
        "  client 7: no reply",
        line(3, 10),
        f"digits-pfedgpa-1 is complete, 3 of 3 rounds: {tmp_path}/111",
    ]


@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_a_run_that_dies_is_reported_with_what_would_be_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: RunFolder, has_checkpoint: bool
):
    if has_checkpoint:
        (tmp_path / "111" / "checkpoint.safetensors").touch()
    meanwhile(monkeypatch, lambda: end_round(folder, 1), lambda: folder.__exit__())
    result = invoke(tmp_path, "digits")
    assert result.exit_code == 1
    right = (
        '; right would be resume-from="digits-pfedgpa-1", which goes on from its last checkpoint'
    )
    expected = "digits-pfedgpa-1 stopped after 1 of 3 rounds" + (right if has_checkpoint else "")
    assert result.stderr == expected + "\n"


def test_a_run_that_is_over_is_reported_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: RunFolder
):
    for number in (1, 2, 3):
        end_round(folder, number)
    folder.__exit__()
    meanwhile(monkeypatch)
    assert invoke(tmp_path).exit_code == 0


def test_ctrl_c_is_neither_the_end_nor_a_failure_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: RunFolder
):
    def interrupt() -> None:
        raise KeyboardInterrupt

    meanwhile(monkeypatch, interrupt)
    assert invoke(tmp_path).exit_code == 130


def test_numbers_that_are_not_known_are_dashes(tmp_path: Path, folder: RunFolder):
    for number in (1, 2, 3):
        folder.add_round({"round": number, "personalized-accuracy": 0.5}, [])
    folder.__exit__()
    assert invoke(tmp_path).stdout.splitlines()[0] == (
        "Round 1/3: personalized accuracy 0.5000 (worst client -), as sent -, after local training "
        "-; 0 clients, 0.0 s (clients 0.0, diffusion 0.0)"
    )


def test_a_terminal_also_has_how_far_the_run_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: RunFolder
):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=200)
    monkeypatch.setattr(watch, "Console", lambda: console)
    failures = dict.fromkeys(range(7), "no reply")
    meanwhile(
        monkeypatch,
        lambda: end_round(folder, 1),
        lambda: end_round(folder, 2, failures),
        lambda: end_round(folder, 3),
        lambda: folder.__exit__(),
    )
    result = invoke(tmp_path)
    assert result.exit_code == 0
    shown = file.getvalue()
    for text in ("client 4: no reply", "  and 2 more", "/3"):
        assert text in shown
    assert [shown.count(f"Round {number}/3: ") for number in (1, 2, 3)] == [1, 1, 1]
    assert "client 5" not in shown
    assert result.stdout == f"digits-pfedgpa-1 is complete, 3 of 3 rounds: {tmp_path}/111\n"


def test_whole_lines_are_read_once(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    assert read_rows(file) == ([], 0)
    file.write_text('{"round": 1}\n{"rou')
    rows, end = read_rows(file)
    assert rows == [{"round": 1}]
    assert read_rows(file, end) == ([], end)
    with file.open("a") as stream:
        stream.write('nd": 2}\n')
    assert read_rows(file, end)[0] == [{"round": 2}]


def test_lines_that_are_taken_back_do_not_hide_those_in_their_place(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    lines = ["{" + f'"round": {number}' + "}\n" for number in (1, 2, 3)]
    file.write_text(lines[0] + lines[1])
    _, end = read_rows(file)
    os.truncate(file, len(lines[0]))
    rows, end = read_rows(file, end)
    assert rows == []
    file.write_text("".join(lines))
    assert read_rows(file, end)[0] == [{"round": 2}, {"round": 3}]
