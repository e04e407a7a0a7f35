"""The effect of absences of clients, or of whole groups, on accuracy.

    python -m benchmarks.absence

20 clients in 5 groups, Fashion-MNIST in 14x14 pixels. Each case is compared with a run of the same
seed without absences.
"""

from collections.abc import Collection
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
import typer

from benchmarks.options import Quick, Seeds, flag, tenth
from benchmarks.small_images import CLIENTS
from benchmarks.small_runs import configs, print_table
from pfedgpa_app.config import Config
from pfedgpa_app.rounds import RoundRecord
from server_app.simulation import simulate

EVALUATED_ROUNDS = 5
COLUMNS = ("those away", "had they been there", "the others", "had those been there")


class Case(NamedTuple):
    """The absent clients, and the first and last round of their absence."""

    away: Collection[int]
    first: int
    last: int


# Client i is in group i % 5.
ONE, GROUP = (19,), (4, 9, 14, 19)
CASES = {
    "one client, rounds 11 to 20": Case(ONE, 11, 20),
    "a whole group, rounds 11 to 15": Case(GROUP, 11, 15),
    "a whole group joins in round 11": Case(GROUP, 1, 10),
}
NOBODY = Case((), 1, 0)


def main(
    file: Path = Path("conf/fashion-mnist-20.toml"),
    rounds: int = 30,
    seeds: Seeds = "0,1,2",
    quick: Quick = False,
) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    of_seeds = configs(file, rounds, seeds, quick)
    present = [accuracies(config, NOBODY) for config in of_seeds]
    shortened = {
        name: Case(case.away, tenth(case.first), tenth(case.last)) if quick else case
        for name, case in list(CASES.items())[-1 if quick else 0 :]
    }
    rows = {
        name: (
            means(accuracies(config, case), there, case)
            for config, there in zip(of_seeds, present, strict=True)
        )
        for name, case in shortened.items()
    }
    command = f"python -m benchmarks.absence{flag(quick)}"
    note = f"Means over the last {EVALUATED_ROUNDS} rounds: {command}"
    print_table(f"Absence, {rounds} rounds", COLUMNS, rows, note)


def means(found: dict[int, float], present: dict[int, float], case: Case) -> list[float]:
    """Return the numbers of `COLUMNS`, given each node's accuracy with and without absence."""
    others = sorted(set(range(CLIENTS)) - set(case.away))
    return [
        fmean(run[node] for node in nodes)
        for nodes in (sorted(case.away), others)
        for run in (found, present)
    ]


def accuracies(config: Config, case: Case) -> dict[int, float]:
    """Return the accuracy of each node's personalized model, averaged over the last rounds."""
    found: dict[int, list[float]] = {node: [] for node in range(CLIENTS)}

    def note(record: RoundRecord) -> None:
        for row in record.clients.values():
            if "personalized-accuracy" in row:
                found[int(row["node-id"])].append(row["personalized-accuracy"])

    def absent(server_round: int) -> Collection[int]:
        return case.away if case.first <= server_round <= case.last else ()

    simulate(config, CLIENTS, evaluated_rounds=EVALUATED_ROUNDS, on_round=note, absent=absent)
    return {node: fmean(values[-EVALUATED_ROUNDS:]) for node, values in found.items()}


if __name__ == "__main__":
    typer.run(main)
