"""The quick version of every suite, whole."""

import csv
from functools import cache
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pfedgpa_app.config import DATASETS, DataConfig
from pfedgpa_app.data import clients, sources
from pfedgpa_app.data.sources import Dataset, load_dataset
from pfedgpa_app.randomness import make_generator
from server_app.cli import app
from server_app.suites import Suite

PROJECT = Path(__file__).parents[1]
SUITES = sorted((PROJECT / "conf" / "suites").glob("*.toml"))

pytestmark = [pytest.mark.fashion_mnist, pytest.mark.slow]


# Unpacked once for all suites, which do not change it.
fashion_mnist = cache(sources._debian_fashion_mnist)


def without_network(config: DataConfig, seed: int) -> Dataset:
    """Return noise in place of what would have to be downloaded."""
    if config.dataset not in ("cifar10", "emnist-balanced"):
        return load_dataset(config, seed)
    info = DATASETS[config.dataset]
    labels = torch.arange(200 * info.num_classes) % info.num_classes
    images = torch.randint(
        256, (len(labels), *info.shape), generator=make_generator(0), dtype=torch.uint8
    )
    return Dataset(images, labels, torch.arange(len(labels)) >= len(labels) // 2)


@pytest.mark.parametrize("file", SUITES, ids=lambda file: file.stem)
def test_the_quick_version_of_a_suite_ends_with_all_its_numbers(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(PROJECT)
    monkeypatch.setattr(clients, "load_dataset", without_network)
    monkeypatch.setattr(sources, "_debian_fashion_mnist", fashion_mnist)
    command = ["bench", str(file), "--quick", "--processes", "0", "--results", str(tmp_path)]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    suite = Suite.read(file, quick=True)
    with (tmp_path / f"{file.stem}-quick.csv").open() as stream:
        cells = [cell for cell in csv.DictReader(stream) if cell["table"] == suite.title]
    assert len(cells) == len(suite.rows) * len(suite.columns)
    assert all(0 < float(cell["mean"]) <= 1 for cell in cells)
    assert (tmp_path / f"{file.stem}-quick.png").stat().st_size > 1000
