"""The quick version of every published benchmark that starts Flower's servers, whole."""

import re
import shlex
from pathlib import Path

import pytest
from published import Words, benchmarks, run_quickly

# Its processes read the data set themselves.
NEEDS = {"benchmarks.rounds": pytest.mark.fashion_mnist}
ROWS = {
    # How many rows it prints, and what is in the last one.
    "benchmarks.reliability": (2, r"falsified replies .* not finite.* 1 of 1"),
    "benchmarks.rounds": (1, r"0 .* 0\.\d{4}"),
    "benchmarks.startup": (13, "the run is over: all rounds, models and figure"),
}


@pytest.mark.processes
@pytest.mark.usefixtures("warm_processes")
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, id=shlex.join(words[2:]), marks=NEEDS.get(words[2], ()))
        for words in benchmarks(have_processes=True)
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
    rows = re.findall(r"^\| (?!---|case|`|seconds|processor)(.+) \|$", said, flags=re.MULTILINE)
    number, last = ROWS[words[2]]
    assert len(rows) == number, said
    assert re.search(last, rows[-1])
    if "--figure" in words:
        assert (tmp_path / "docs" / "reliability-quick.svg").exists()
