"""Files in the output folder that no run has written: named, passed over, and in nobody's way."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pfedgpa_app import cli, files
from pfedgpa_app.config import Config
from pfedgpa_app.files import read_bytes, read_text, read_toml
from pfedgpa_app.report import Run, RunFolder
from pfedgpa_app.runs import find_run, is_going_on

DEEP = "[" * 100_000


def invoke(folder: Path, *command: str) -> Result:
    return CliRunner().invoke(cli.app, [*command, "--output-dir", str(folder)])


def run_of(path: Path) -> Path:
    with RunFolder(path, Config()) as folder:
        folder.add_round({"round": 1, "personalized-accuracy": 0.5}, [])
    return path


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def replaced_by(text: str) -> Callable[[Path], None]:
    return lambda file: file.write_text(text) and None


ODD: dict[str, tuple[str, Callable[[Path], None]]] = {
    "run.json is nested": ("run.json", replaced_by(DEEP)),
    "run.json is a pipe": ("run.json", pipe),
    "run.json is a list": ("run.json", replaced_by("[1]")),
    "a number of 5,000 digits": ("run.json", replaced_by("9" * 5000)),
    "a name of 5,000 digits": (
        "run.json",
        replaced_by(json.dumps({"name": "digits-pfedgpa-" + "9" * 5000})),
    ),
    "config.json is nested": ("config.json", replaced_by(DEEP)),
    "config.json is a pipe": ("config.json", pipe),
    "config.json has no settings": ("config.json", replaced_by("3")),
    "metrics.jsonl is nested": ("metrics.jsonl", replaced_by(DEEP + "\n")),
    "metrics.jsonl is a pipe": ("metrics.jsonl", pipe),
    "a text for a number": (
        "metrics.jsonl",
        replaced_by('{"round": 1, "personalized-accuracy": "\\u001b[2J"}\n'),
    ),
    "no number": ("metrics.jsonl", replaced_by('{"round": 1, "seconds-round": NaN}\n')),
    "a huge number": ("metrics.jsonl", replaced_by('{"round": 1, "bytes-up": 1e300}\n')),
    "a huge round": ("metrics.jsonl", replaced_by('{"round": 1' + "0" * 400 + "}\n")),
    "a negative round": ("metrics.jsonl", replaced_by('{"round": -1}\n')),
}


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_file_stops_no_new_run_and_no_list(tmp_path: Path, odd: str):
    name, make = ODD[odd]
    make(run_of(tmp_path / "1") / name)
    run_of(tmp_path / "2")
    assert Run.read(tmp_path / "2").name.startswith("digits-pfedgpa-")
    assert find_run("latest", tmp_path) in (tmp_path / "1", tmp_path / "2")
    result = invoke(tmp_path, "runs")
    assert result.exit_code == 0, result.output
    assert "1/10" in result.stdout
    if name != "run.json":  # without its name, a run is called by its id
        assert f"Passed over: {tmp_path}/1 is not the folder of a run: " in result.stderr
        assert "\x1b" not in result.stderr
        shown = invoke(tmp_path, "runs", "show", "1")
        assert shown.exit_code == 1
        assert len(shown.stderr.splitlines()) == 1
    elif odd.endswith("pipe"):
        assert not is_going_on(tmp_path / "1")


@pytest.mark.parametrize("name", ["client", "status", "accuracy-after"])
def test_an_odd_row_of_a_client_is_an_error_in_a_line(tmp_path: Path, name: str):
    value = 3 if name == "status" else [1]
    row = {"round": 1, "client": 0, "status": "ok"} | {name: value}
    (run_of(tmp_path / "1") / "clients.jsonl").write_text(json.dumps(row) + "\n")
    shown = invoke(tmp_path, "runs", "show", "1")
    assert shown.exit_code == 1
    assert f"clients.jsonl is damaged: {name} is" in shown.stderr


@pytest.mark.parametrize("target", [".", "", "..", "{folder}", "{folder}/.."])
def test_no_folder_of_runs_is_removed_as_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
):
    output = tmp_path / "runs"
    for name in ("1", "2"):
        run_of(output / name)
    # Whoever has saved settings there makes it look like a run.
    for folder in (output, tmp_path):
        (folder / "config.json").write_text((output / "1" / "config.json").read_text())
    monkeypatch.chdir(output)
    result = invoke(output, "runs", "remove", "--yes", target.format(folder=output))
    assert result.exit_code == 1
    assert "right would be the name of one run" in result.stderr or not target
    assert (output / "1").is_dir()
    assert (output / "2").is_dir()


def test_a_file_is_read_as_far_as_it_may_be_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "file"
    file.write_text("\ufeffabc")
    assert read_text(file) == "abc"
    assert read_bytes(file, most=6) == b"\xef\xbb\xbfabc"
    with pytest.raises(OSError, match="has more than 5 bytes"):
        read_bytes(file, most=5)
    monkeypatch.setattr(files, "MAX_BYTES", 5)
    with pytest.raises(OSError, match="has more than 5 bytes"):
        read_text(file)


def test_toml_that_is_nested_too_deeply_is_none(tmp_path: Path):
    (tmp_path / "deep.toml").write_text(f"a = {DEEP}")
    with pytest.raises(ValueError, match="nested too deeply"):
        read_toml(tmp_path / "deep.toml")
