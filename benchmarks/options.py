"""Common options of benchmarks, and the meaning of ``--quick``.

A quick benchmark takes seconds and runs all code to its table, with one seed, a tenth of the rounds
and little data. Its numbers mean nothing, and it does not overwrite files of the full benchmark.
"""

from pathlib import Path
from typing import Annotated

import typer

Quick = Annotated[bool, typer.Option("--quick", help="Only show that it works, in seconds.")]
Seeds = Annotated[str, typer.Option(help="Comma-separated.")]


def numbers(seeds: str, quick: bool) -> list[int]:
    """Return the seeds of an option; only the first for a quick benchmark."""
    return [int(seed) for seed in seeds.split(",")][: 1 if quick else None]


def tenth(rounds: int) -> int:
    """Return a tenth of a number of rounds, rounded up."""
    return -(-rounds // 10)


def flag(quick: bool) -> str:
    """Return the end of the command in a table's note."""
    return " --quick" if quick else ""


def output_file(file: Path, quick: bool) -> Path:
    """Return the output file of a full or quick benchmark."""
    return file.with_stem(f"{file.stem}-quick") if quick else file
