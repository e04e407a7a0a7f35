"""Options that benchmarks share, and what ``--quick`` leaves of a benchmark.

A quick benchmark takes seconds and goes the whole way to its table: with the first seed alone, a
tenth of the rounds and little of everything else. Its numbers mean nothing, and it writes beside
the files of the whole benchmark, not over them.
"""

from pathlib import Path
from typing import Annotated

import typer

Quick = Annotated[bool, typer.Option("--quick", help="Only show that it works, in seconds.")]
Seeds = Annotated[str, typer.Option(help="Comma-separated.")]


def numbers(seeds: str, quick: bool) -> list[int]:
    """Return the seeds of an option as numbers; of a quick benchmark the first alone."""
    return [int(seed) for seed in seeds.split(",")][: 1 if quick else None]


def tenth(rounds: int) -> int:
    """Return a tenth of a number of rounds, rounded up."""
    return -(-rounds // 10)


def flag(quick: bool) -> str:
    """Return how a command ends that is quoted below its table."""
    return " --quick" if quick else ""


def beside(file: Path, quick: bool) -> Path:
    """Return where a benchmark writes that was told to write to a file."""
    return file.with_stem(f"{file.stem}-quick") if quick else file
