"""Runs over seeds on small images, and tables of their results."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.options import numbers, tenth
from benchmarks.small_images import SMALL_IMAGES
from pfedgpa_app.config import Config, flatten
from pfedgpa_app.files import read_toml
from pfedgpa_app.rounds import mean_and_spread
from pfedgpa_app.tables import Cell, Table

LESS = {
    "data.train-samples": 50,
    "data.test-samples": 20,
    "client.local-epochs": 1,
    "diffusion.train-steps": 10,
}
"""Overrides for quick runs."""
NO_OTHERS: Mapping[str, Any] = {}


def read_config(file: Path, overrides: Mapping[str, Any]) -> Config:
    """Read a file of conf/ with overrides such as ``{"seed": 1}``."""
    cpu = {"client.device": "cpu", "diffusion.device": "cpu"}
    flat = dict(flatten(read_toml(file)))
    return Config.from_flat(flat | cpu | dict(overrides))


def configs(
    file: Path, rounds: int, seeds: str, quick: bool, settings: Mapping[str, Any] = NO_OTHERS
) -> list[Config]:
    """Return one run's settings per seed, of a file with overrides, on small images."""
    fixed = {**SMALL_IMAGES, "num-server-rounds": rounds, **settings}
    found = [read_config(file, {**fixed, "seed": seed}) for seed in numbers(seeds, quick)]
    return [shortened(config) for config in found] if quick else found


def shortened(config: Config) -> Config:
    """Return the settings of a quick run."""
    rounds = tenth(config.num_server_rounds)
    return Config.from_flat({**config.to_flat(), **LESS, "num-server-rounds": rounds})


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Mapping[str, Iterable[Sequence[float]]],
    note: str,
) -> Table:
    """Print each row of means over seeds as soon as it is known, and then the table.

    ``rows`` has for each seed the numbers of a row, one per column; it may be lazy.
    """
    cells = {}
    for name, of_seeds in rows.items():
        columnwise = zip(*of_seeds, strict=True)
        cells[name] = [Cell(mean_and_spread(values), values=values) for values in columnwise]
        print(name, *(cell.text for cell in cells[name]), sep=", ", flush=True)
    table = Table(title, columns, cells, note)
    print(table.markdown(), flush=True)
    return table
