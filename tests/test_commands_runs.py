"""The commands pfedgpa runs, pfedgpa runs show and pfedgpa runs remove."""

import json
import os
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from pfedgpa_app import cli, console
from pfedgpa_app.config import Config
from pfedgpa_app.report import RunFolder
from pfedgpa_app.runs import began_at


def make_run(path: Path, num_rounds: int, clients: list[dict] | None = None, **flat: Any) -> None:
    """Leave a run that is over, in whose last round accuracy was 0.625."""
    with RunFolder(path, Config.from_flat(flat)) as folder:
        for number in range(1, num_rounds + 1):
            row = {"round": number, "seconds-round": 2.5}
            accuracies = {"personalized-accuracy": 0.625, "finetuned-accuracy": 0.5}
            rows = [each for each in clients or [] if each["round"] == number]
            folder.add_round(row | (accuracies if number == num_rounds else {}), rows)


def invoke(folder: Path, *command: str, answer: str = "") -> Result:
    return CliRunner().invoke(cli.app, [*command, "--output-dir", str(folder)], input=answer)


def test_an_empty_folder_has_no_runs(tmp_path: Path):
    assert invoke(tmp_path, "runs").stdout == f"No runs in {tmp_path}\n"
    assert json.loads(invoke(tmp_path, "runs", "--json").stdout) == []


def test_runs_are_listed_in_full_however_narrow_the_terminal_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "20")
    long = {"data.dataset": "emnist-byclass", "model.name": "cnn-28x28", "strategy": "fedavg-ft"}
    make_run(tmp_path / "111", 2, seed=5, **{**long, "num-server-rounds": 2})
    make_run(tmp_path / "12345678901234567890", 0)
    (tmp_path / "12345678901234567890" / "run.json").unlink()
    # Times are those of the local clock: of the file, where an older version wrote none.
    began = datetime(2026, 11, 30, 12, 0, 59).astimezone()
    fields = {"name": "emnist-byclass-fedavg-ft-1", "began": began.isoformat()}
    (tmp_path / "111" / "run.json").write_text(json.dumps(fields))
    later = (began + timedelta(minutes=5)).timestamp()
    os.utime(tmp_path / "12345678901234567890" / "config.json", (later, later))
    with RunFolder(tmp_path / "333", Config()):
        lines = invoke(tmp_path, "runs").stdout.splitlines()
    began = f"{began_at(tmp_path / '333').astimezone():%Y-%m-%d %H:%M}"
    assert lines[0] == f"Runs in {tmp_path}"
    assert [" ".join(line.split()) for line in lines[2:]] == [
        "emnist-byclass-fedavg-ft-1 2026-11-30 12:00 fedavg-ft emnist-byclass 5 2/2 complete "
        "0.6250 0.5000",
        "12345678901234567890 2026-11-30 12:05 pfedgpa digits 0 0/10 stopped - -",
        f"digits-pfedgpa-1 {began} pfedgpa digits 0 0/10 running - -",
    ]


def test_a_list_in_json_has_what_the_table_has(tmp_path: Path):
    make_run(tmp_path / "111", 3, seed=5)
    fields = {"name": "digits-pfedgpa-1", "began": "2026-11-30T12:00:00.5+02:00"}
    (tmp_path / "111" / "run.json").write_text(json.dumps(fields))
    assert json.loads(invoke(tmp_path, "runs", "--json").stdout) == [
        {
            "name": "digits-pfedgpa-1",
            "id": "111",
            "path": str(tmp_path / "111"),
            "began": "2026-11-30T10:00:00+00:00",
            "state": "stopped",
            "strategy": "pfedgpa",
            "dataset": "digits",
            "seed": 5,
            "rounds": 3,
            "num-server-rounds": 10,
            "personalized-accuracy": 0.625,
            "finetuned-accuracy": 0.5,
        }
    ]


def test_an_output_folder_that_is_a_file_is_said_in_a_line(tmp_path: Path):
    (tmp_path / "file").touch()
    result = invoke(tmp_path / "file", "runs")
    assert result.exit_code == 1
    assert result.stderr == f"{tmp_path}/file: Not a directory; right would be a folder\n"


CLIENTS = [
    {"round": 1, "client": 0, "status": "no reply"},
    {"round": 1, "client": 1, "name": "mercy", "status": "ok", "personalized-accuracy": 0.1},
    {"round": 1, "client": 1, "unusual": "far"},
    {"round": 1, "client": 2, "status": "no reply"},
    {"round": 2, "client": 0, "status": "the client failed: [red]no data"},
    {"round": 2, "client": 1, "status": "ok", "personalized-accuracy": 0.75},
    {"round": 2, "client": 2, "status": "ok", "personalized-accuracy": 0.5},
    {"round": 2, "client": 3, "status": "privacy budget spent"},
    {"round": 2, "client": 4, "personalized-accuracy": 0.875},
    {"round": 3, "client": 2, "status": "no reply"},
    {"round": 3, "client": 0, "status": "no reply"},
]


def test_a_run_is_shown_with_all_that_is_known_of_it(tmp_path: Path):
    make_run(tmp_path / "111", 3, CLIENTS, **{"seed": 5, "diffusion.fidelity": 0.5})
    (tmp_path / "111" / "models").mkdir()
    (tmp_path / "111" / "models" / "client-0.safetensors").write_bytes(bytes(12_345))
    lines = invoke(tmp_path, "runs", "show", "digits").stdout.splitlines()
    assert lines[:2] == ["digits-pfedgpa-1 (111): stopped", str(tmp_path / "111")]
    assert lines[2].startswith("3 of 10 rounds in 0:00:08 h, began 20")
    blocks = {
        title: inner.split("\n  ")
        for title, _, inner in (
            block.partition("\n  ") for block in "\n".join(lines[4:]).split("\n\n")
        )
    }
    sizes = dict(line.split(": ") for line in blocks.pop("Files"))
    assert sizes.keys() == {
        "clients.jsonl",
        "config.json",
        "metrics.jsonl",
        "models/",
        "run.json",
    }
    assert sizes["models/"] == "12.3 kB"
    assert blocks == {
        "Settings that differ from the defaults": ["seed = 5", "diffusion.fidelity = 0.5"],
        "Last accuracies": ["personalized: 0.6250", "after local training: 0.5000"],
        "Worst clients": [
            "client 2: 0.5000 in round 2",
            "client 1: 0.7500 in round 2",
            "client 4: 0.8750 in round 2",
        ],
        "Failures": [
            "2 clients: 2 rounds, the last 3: no reply",
            "client 1 (mercy): 1 round, the last 1: others did not learn from it: far",
            "client 0: 1 round, the last 2: the client failed: [red]no data",
            "client 3: 1 round, the last 2: privacy budget spent",
        ],
    }


def test_a_run_in_json_has_what_is_shown_of_it(tmp_path: Path):
    make_run(tmp_path / "111", 3, CLIENTS, seed=5)
    fields = json.loads(invoke(tmp_path, "runs", "show", "111", "--json").stdout)
    (listed,) = json.loads(invoke(tmp_path, "runs", "--json").stdout)
    assert fields.items() >= listed.items()
    assert fields["settings"] == {"seed": 5}
    assert fields["seconds"] == 7.5
    assert fields["worst-clients"][0] == {"client": 2, "round": 2, "personalized-accuracy": 0.5}
    assert fields["failures"][0] == {
        "clients": [0, 2],
        "names": [],
        "rounds": [1, 3],
        "reason": "no reply",
    }
    assert fields["files"]["run.json"] == (tmp_path / "111" / "run.json").stat().st_size


def test_a_run_that_has_just_begun_is_shown(tmp_path: Path):
    make_run(tmp_path / "111", 0)
    result = invoke(tmp_path, "runs", "show", "latest")
    assert result.exit_code == 0
    assert result.stdout.count("\n  none\n") == 4


DAMAGED = [b"garbage", b"3", b"[3]", b"{}", b'{"round": "1"}', b"\xff"]


@pytest.mark.parametrize("line", DAMAGED)
@pytest.mark.parametrize("command", [["runs", "show"], ["watch"], ["report", "--force"]])
def test_a_damaged_line_is_said_with_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], line: bytes
):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "111", 1, CLIENTS)
    with (tmp_path / "111" / "clients.jsonl").open("ab") as file:
        file.write(line + b"\n")
    result = invoke(tmp_path, *command, "111")
    assert result.exit_code == 1
    assert result.stderr == (
        f"{tmp_path}/111/clients.jsonl is damaged: {line!r}; right would be a JSON object with a "
        "round\n"
    )


@pytest.mark.parametrize("line", DAMAGED)
def test_a_run_whose_metrics_are_damaged_is_not_listed(tmp_path: Path, line: bytes):
    for run in ("111", "222"):
        make_run(tmp_path / run, 1)
    with (tmp_path / "111" / "metrics.jsonl").open("ab") as file:
        file.write(line + b"\n")
    (listed,) = json.loads(invoke(tmp_path, "runs", "--json").stdout)
    assert listed["id"] == "222"
    result = invoke(tmp_path, "runs", "show", "111")
    assert "metrics.jsonl is damaged" in result.stderr


def test_a_line_that_is_being_written_is_passed_over(tmp_path: Path):
    make_run(tmp_path / "111", 2, CLIENTS)
    for name in ("metrics.jsonl", "clients.jsonl"):
        with (tmp_path / "111" / name).open("a") as file:
            file.write('{"round": 3, "cli')
    fields = json.loads(invoke(tmp_path, "runs", "show", "111", "--json").stdout)
    assert fields["rounds"] == 2


def test_numbers_that_are_not_known_count_as_none(tmp_path: Path):
    make_run(tmp_path / "111", 1)
    with (tmp_path / "111" / "metrics.jsonl").open("a") as file:
        file.write('{"round": 2, "seconds-round": null}\n')
    assert json.loads(invoke(tmp_path, "runs", "show", "111", "--json").stdout)["seconds"] == 2.5


def test_a_file_that_is_replaced_meanwhile_is_passed_over(tmp_path: Path):
    """A link to nothing stands in for a file that is gone between a look and the next."""
    make_run(tmp_path / "111", 1)
    (tmp_path / "111" / "checkpoint.safetensors.unfinished").symlink_to(tmp_path / "gone")
    files = json.loads(invoke(tmp_path, "runs", "show", "111", "--json").stdout)["files"]
    assert files.keys() == {"config.json", "metrics.jsonl", "run.json"}


@pytest.mark.parametrize("option", [[], ["--json"]])
def test_options_may_be_named_before_the_command(tmp_path: Path, option: list[str]):
    make_run(tmp_path / "111", 1)
    show = [["show", "111", *option], [*option, "show", "111"]]
    results = [
        CliRunner().invoke(cli.app, ["runs", "--output-dir", str(tmp_path), *each]) for each in show
    ]
    assert results[0].exit_code == 0
    assert results[0].stdout == results[1].stdout


def test_a_run_is_removed_if_the_answer_is_yes(tmp_path: Path):
    make_run(tmp_path / "111", 2)
    make_run(tmp_path / "222", 2)
    refused = invoke(tmp_path, "runs", "remove", "111", answer="n\n")
    assert refused.exit_code == 1
    assert (tmp_path / "111").exists()
    result = invoke(tmp_path, "runs", "remove", "111", answer="y\n")
    assert result.exit_code == 0
    assert result.stdout.startswith("digits-pfedgpa-1 (pfedgpa, 2/10 rounds, ")
    assert [path.name for path in tmp_path.iterdir()] == ["222"]


def test_with_yes_nobody_is_asked(tmp_path: Path):
    make_run(tmp_path / "111", 2)
    result = invoke(tmp_path, "runs", "remove", "digits-pfedgpa-1", "--yes")
    assert result.stdout.splitlines()[1:] == ["digits-pfedgpa-1 is removed"]
    assert not (tmp_path / "111").exists()


def test_a_run_that_goes_on_is_not_removed(tmp_path: Path):
    with RunFolder(tmp_path / "111", Config()):
        result = invoke(tmp_path, "runs", "remove", "111", "--yes")
    assert result.exit_code == 1
    assert result.stderr == (
        "digits-pfedgpa-1 is going on; right would be to end it first, with flwr stop 111\n"
    )
    assert (tmp_path / "111" / "config.json").exists()


def test_who_goes_on_from_a_run_and_has_no_checkpoint_is_named_before_it_is_removed(
    tmp_path: Path,
):
    output = {"output-dir": str(tmp_path)}
    make_run(tmp_path / "111", 2, **output)
    make_run(tmp_path / "222", 2, **output, **{"resume-from": "111"})
    make_run(tmp_path / "333", 2, **output, **{"resume-from": str(tmp_path / "111")})
    (tmp_path / "333" / "checkpoint.safetensors").touch()
    for run in ("111", f"{tmp_path}/222/../111"):
        lines = invoke(tmp_path, "runs", "remove", run, answer="n\n").stdout.splitlines()
        assert lines[1] == "digits-pfedgpa-2 goes on from it and has no checkpoint of its own"
        assert not any(line.startswith("digits-pfedgpa-3") for line in lines)


def test_what_cannot_be_removed_is_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_run(tmp_path / "111", 2)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("shutil.rmtree", refuse)
    result = invoke(tmp_path, "runs", "remove", "111", "--yes")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"{tmp_path}/111: Permission denied; right would be one that")


@pytest.mark.parametrize("command", ["show", "remove"])
def test_a_run_that_is_not_there_is_named(tmp_path: Path, command: str):
    result = invoke(tmp_path, "runs", command, "no-such-run")
    assert result.exit_code == 1
    assert result.stderr == (
        f"There is no run {tmp_path}/no-such-run; pfedgpa runs lists those there are\n"
    )


def test_a_pipe_that_is_closed_early_is_no_error_of_the_system(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(console, "fail", lambda message: pytest.fail(message))

    def close(*arguments: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("pfedgpa_app.commands_runs.read_runs", close)
    assert CliRunner().invoke(cli.app, ["runs"]).exit_code == 1
