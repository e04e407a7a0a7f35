"""The quick version of every suite, whole."""

import csv
from pathlib import Path

import pytest
from published import PROJECT, noise
from typer.testing import CliRunner

from pfedgpa_app.data import sources
from server_app.cli import app
from server_app.suites import Suite

SUITES = sorted((PROJECT / "conf" / "suites").glob("*.toml"))

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("file", SUITES, ids=lambda file: file.stem)
def test_the_quick_version_of_a_suite_ends_with_all_its_numbers(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(PROJECT)
    monkeypatch.setattr(sources, "_torchvision", noise)
    command = ["bench", str(file), "--quick", "--processes", "0", "--results", str(tmp_path)]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    suite = Suite.read(file, quick=True)
    with (tmp_path / f"{file.stem}-quick.csv").open() as stream:
        cells = [cell for cell in csv.DictReader(stream) if cell["table"] == suite.title]
    assert len(cells) == len(suite.rows) * len(suite.columns)
    assert all(0 < float(cell["mean"]) <= 1 for cell in cells)
    assert (tmp_path / f"{file.stem}-quick.png").stat().st_size > 1000
