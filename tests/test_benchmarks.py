"""The quick version of every benchmark that is published, whole."""

import importlib
import json
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import typer
from published import PROCESSES, PROJECT, Words, benchmarks, run_quickly

import client_app.app  # noqa: F401  (once, before a pool is forked)

# Draws the figures of what is in docs/results, in seconds: test_figures.py compares them.
WITHOUT_QUICK = "benchmarks.figures"
MAINS = [
    f"benchmarks.{file.stem}"
    for file in sorted((PROJECT / "benchmarks").glob("*.py"))
    if '__name__ == "__main__"' in file.read_text()
]


def needs(words: Words) -> list[pytest.MarkDecorator]:
    return [pytest.mark.cuda] if "cuda" in words else []


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, id=shlex.join(words[2:]), marks=needs(words))
        for words in benchmarks(have_processes=False)
        if words[2] != WITHOUT_QUICK
    ],
)
def test_the_quick_version_of_a_benchmark_ends_with_its_table(
    words: Words,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    run_quickly(words, tmp_path, monkeypatch)
    said = capsys.readouterr().out
    if "--clients" in words and words[2].endswith("many_clients"):
        assert json.loads(said)["error"] < 1
    else:
        assert re.search(r"^\| --- .*\n(\| .*\d.* \|\n)+", said, flags=re.MULTILINE), said
    assert "nan" not in said


def test_every_benchmark_is_published():
    published = {words[2] for kind in (True, False) for words in benchmarks(have_processes=kind)}
    assert published == set(MAINS)
    assert set(PROCESSES) < published


@pytest.mark.parametrize("name", [name for name in MAINS if name != WITHOUT_QUICK])
def test_every_benchmark_has_a_quick_version(name: str):
    module: ModuleType = importlib.import_module(name)
    app = typer.Typer()
    app.command()(module.main)
    assert "quick" in {option.name for option in typer.main.get_command(app).params}
