"""Accuracy of clients that join late, round by round.

    python -m benchmarks.onboarding --results docs/results/onboarding.csv
    python -m benchmarks.figures

20 clients in 5 groups, Fashion-MNIST in 14x14 pixels. Each case has runs in which some clients
connect in a later round, and one in which they take part from the start.
"""

from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Annotated, NamedTuple

import torch
import typer
from torch import Tensor

from benchmarks.options import Quick, Seeds, flag, output_file, tenth
from benchmarks.small_images import CLIENTS
from benchmarks.small_runs import configs, print_table
from pfedgpa_app.config import Config
from pfedgpa_app.rounds import RoundRecord
from pfedgpa_app.tables import CSV_HEAD
from server_app.app import make_strategy
from server_app.replies import Upload
from server_app.simulation import simulate
from server_app.strategies import PFedGPA

Curve = list[float]


class Case(NamedTuple):
    """The late and the absent clients."""

    late: Collection[int]
    never: Collection[int] = ()


# Client i is in group i % 5.
CASES = {
    "1 late client": Case([19]),
    "4 late clients": Case(range(16, 20)),
    "10 late clients": Case(range(10, 20)),
    "1 alone in its group": Case([19], never=[4, 9, 14]),
}


class NearestMember(PFedGPA):
    """Newcomers get the model of the member with the nearest model to their upload."""

    def learn(self, server_round: int, uploads: dict[int, Upload]) -> None:
        """Replace the models of guided denoising for newcomers."""
        super().learn(server_round, uploads)
        bank = self.aggregator.bank
        models = [self.aggregator.personalize(member) for member in bank.members]
        for client in bank.non_members:
            if client in uploads:
                nearest = min(models, key=_distance_to(uploads[client].vector))
                bank.of(client).model = nearest


METHODS: dict[str, tuple[str, type[PFedGPA] | None]] = {
    "pfedgpa, from the start": ("pfedgpa", None),
    "pfedgpa": ("pfedgpa", None),
    "nearest member": ("pfedgpa", NearestMember),
    "fedavg-ft": ("fedavg-ft", None),
    "local, from scratch": ("local", None),
}
"""The strategies by name."""


def _distance_to(vector: Tensor) -> Callable[[Tensor], float]:
    return lambda other: float((vector - other).norm())


def main(
    file: Path = Path("conf/fashion-mnist-20.toml"),
    join_round: int = 13,
    rounds: int = 20,
    seeds: Seeds = "0,1,2",
    results: Annotated[Path | None, typer.Option(help="Write the tables there, as CSV.")] = None,
    quick: Quick = False,
) -> None:
    """Print one table per case."""
    torch.set_num_threads(1)
    of_seeds = {
        method: configs(file, rounds, seeds, quick, {"strategy": strategy})
        for method, (strategy, _) in METHODS.items()
    }
    if quick:
        join_round, rounds = tenth(join_round), tenth(rounds)
    last = rounds - join_round + 1
    columns = sorted({1, 2, 3, last} & set(range(1, last + 1)))
    tables = []
    for name, case in list(CASES.items())[: 1 if quick else None]:
        rows = {
            method: (
                [curve[n - 1] for n in columns]
                for curve in (curve_of(config, case, method, join_round) for config in each)
            )
            for method, each in of_seeds.items()
        }
        note = f"python -m benchmarks.onboarding --seeds {seeds}{flag(quick)}"
        headings = [f"round {n}" for n in columns]
        tables.append(print_table(f"{name}: rounds since joining", headings, rows, note))
    if results:
        text = CSV_HEAD + "".join(table.csv() for table in tables)
        output_file(results, quick).write_text(text, encoding="utf-8")


def curve_of(config: Config, case: Case, method: str, join_round: int) -> Curve:
    """Return the mean accuracy of a case's late clients in each round from ``join_round`` on."""
    late, never = frozenset(case.late), frozenset(case.never)
    if method == "pfedgpa, from the start":
        late = frozenset()
    elif method == "local, from scratch":  # of which others make no difference
        late, never = frozenset(CASES["10 late clients"].late), frozenset()
    _, strategy_type = METHODS[method]
    found = accuracies(config, strategy_type, late, never, join_round)
    return [
        fmean(found[node][number] for node in case.late)
        for number in range(config.num_server_rounds - join_round + 1)
    ]


@cache
def accuracies(
    config: Config,
    strategy_type: type[PFedGPA] | None,
    late: frozenset[int],
    never: frozenset[int],
    join_round: int,
) -> dict[int, Curve]:
    """Return the accuracy of each node's model in each round from ``join_round`` on."""
    found: dict[int, Curve] = {}

    def note(record: RoundRecord) -> None:
        if record.server_round >= join_round:
            for row in record.clients.values():
                found.setdefault(int(row["node-id"]), []).append(row["personalized-accuracy"])

    simulate(
        config,
        CLIENTS,
        evaluated_rounds=config.num_server_rounds - join_round + 1,
        on_round=note,
        absent=lambda server_round: never | late if server_round < join_round else never,
        make_strategy=strategy_type.of if strategy_type else make_strategy,
    )
    return found


if __name__ == "__main__":
    typer.run(main)
