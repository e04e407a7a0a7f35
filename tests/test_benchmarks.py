"""The quick version of every benchmark that is published, whole.

Of the attacks there is one run for each part of an upload that liars falsify.
"""

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
from benchmarks.attacks import ATTACKS, CASES, RULES

# Draws the figures of what is in docs/results, in seconds: test_figures.py compares them.
WITHOUT_QUICK = "benchmarks.figures"
MAINS = [
    f"benchmarks.{file.stem}"
    for file in sorted((PROJECT / "benchmarks").glob("*.py"))
    if '__name__ == "__main__"' in file.read_text()
]


COMMANDS = benchmarks(have_processes=False)
ATTACKED = [words for words in COMMANDS if words[2] == "benchmarks.attacks"]


def falsified(words: Words) -> str:
    """Return what the liars of a command's first case falsify."""
    cases = [*(case for option, case in options(words) if option == "--liars"), *CASES]
    return CASES[cases[0]].lies


def options(words: Words) -> list[tuple[str, str]]:
    return list(zip(words[3::2], words[4::2], strict=True))


# The last of each is run: one with all rules, if there is one, has a robust one.
ALL_RULES_LAST = sorted(ATTACKED, key=lambda words: "--rules" not in words)
WHOLE = {falsified(words): words for words in ALL_RULES_LAST}.values()


def needs(words: Words) -> list[pytest.MarkDecorator]:
    return [pytest.mark.cuda] if "cuda" in words else []


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, id=shlex.join(words[2:]), marks=needs(words))
        for words in COMMANDS
        if words[2] != WITHOUT_QUICK and (words not in ATTACKED or words in WHOLE)
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


def test_attacks_that_are_published_are_known():
    known = {"--rules": RULES, "--liars": CASES, "--attacks": ATTACKS}
    given = [option for words in ATTACKED for option in options(words)]
    assert {option for option, _ in given} == known.keys()
    assert all(name in known[option] for option, name in given)


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
