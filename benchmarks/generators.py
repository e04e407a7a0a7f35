"""What else could make a client's model of the uploads, in whole runs.

    python -m benchmarks.generators

20 clients in 5 groups, Fashion-MNIST in 14x14 pixels, 20 rounds. All rows but the measured share
with kin alone (``diffusion.sharing = "kin"``), so that nothing but the generator differs. The last
row is told the groups.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.options import Quick, Seeds, flag, numbers
from benchmarks.small_images import CLIENTS
from benchmarks.small_runs import configs
from pfedgpa_app.aggregation import GenerativeAggregator
from pfedgpa_app.config import Config
from pfedgpa_app.diffusion import mix
from pfedgpa_app.model_spec import ModelSpec
from pfedgpa_app.parameters import head_names
from pfedgpa_app.rounds import mean_and_spread
from pfedgpa_app.tables import Cell, Table
from server_app.simulation import simulate
from server_app.strategies import PFedGPA

JUDGED_ROUNDS = 5


class TrajectoryAggregator(GenerativeAggregator):
    """The diffusion model learns the uploads of the last three rounds, moved to this one's mean."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.earlier: deque[list[Tensor]] = deque(maxlen=2)

    def alone(self, clients: Iterable[int]) -> list[int]:
        """Tell of nobody: rows of the past are no members."""
        return []

    def fit(self, server_round: int, average: Tensor | None = None) -> None:
        """Learn, after what was in the bank became the past."""
        if self.bank.members:
            self.earlier.append(super()._vectors())
        super().fit(server_round, average)

    def _vectors(self) -> list[Tensor]:
        now = super()._vectors()
        mean = torch.stack(now).mean(dim=0)
        past = [torch.stack(bank) for bank in self.earlier]
        return now + [row for bank in past for row in bank - bank.mean(dim=0) + mean]


class HeadAggregator(GenerativeAggregator):
    """Who is alike is told by the heads; all else is the mean over those that are."""

    heads: GenerativeAggregator
    """Of the last entries of everyone's parameters alone."""
    size = 0
    """How many these are."""

    def observe(self, client: int, vector: Tensor) -> None:
        """Take in an upload ``(d,)``, and its head."""
        super().observe(client, vector)
        self.heads.observe(client, vector[-self.size :])

    def fit(self, server_round: int, average: Tensor | None = None) -> None:
        """Learn the heads."""
        super().fit(server_round, average)
        self.heads.fit(server_round)

    def _learn(self, server_round: int) -> None:
        """Learn nothing of all parameters."""

    def personalize_each(self, clients: Sequence[int]) -> Iterator[Tensor]:
        """Yield what is generated for the heads, under the mean bodies of the clients' kin."""
        return map(self._headed, clients)

    def _headed(self, client: int) -> Tensor:
        model = self.heads.model
        if model is None or client not in self.bank.members:
            return next(super().personalize_each([client]))
        row = list(self.bank.members).index(client)
        kinship = model.kinship(model.coordinates[row : row + 1], model.coordinates)[0]
        mean = mix(kinship, self._vectors())
        mean[-self.size :] = self.heads.personalize(client)
        return mean


class OracleAggregator(GenerativeAggregator):
    """Knows that client i is in group ``i % num_groups``, and gives it the mean of its group."""

    num_groups = 5

    def personalize_each(self, clients: Sequence[int]) -> Iterator[Tensor]:
        """Yield the mean of the uploads of each client's group."""
        return map(self._mean_of_group, clients)

    def _mean_of_group(self, client: int) -> Tensor:
        number = client % self.num_groups
        members = self.bank.members.items()
        group = [vector for other, vector in members if other % self.num_groups == number]
        return torch.stack(group).mean(dim=0)


class WithAggregator(PFedGPA):
    """pFedGPA with another aggregator."""

    aggregator_type: type[GenerativeAggregator] = TrajectoryAggregator

    def begin(self, spec: ModelSpec) -> None:
        """Make the aggregator."""
        super().begin(spec)
        initial = self.global_model.vector(spec.initial)
        self.aggregator = self.aggregator_type(
            initial, self.diffusion, self.onboarding, seed=self.seed
        )


class Oracle(WithAggregator):
    """What nobody has who is not told the groups."""

    aggregator_type = OracleAggregator


class ByHead(WithAggregator):
    """pFedGPA with the kinship of heads."""

    aggregator_type = HeadAggregator

    aggregator: HeadAggregator

    def begin(self, spec: ModelSpec) -> None:
        """Tell the aggregator how large the head, the last of the parameters, is."""
        super().begin(spec)
        state = spec.initial
        size = sum(state[name].numel() for name in head_names(state))
        head = self.aggregator.initial[-size:]
        self.aggregator.heads = GenerativeAggregator(head, self.diffusion, seed=self.seed)
        self.aggregator.size = size


KIN = {"diffusion.sharing": "kin"}
ROWS: dict[str, tuple[Callable[[Config], PFedGPA], dict[str, Any]]] = {
    "diffusion": (PFedGPA.of, KIN),
    "mean of kin": (PFedGPA.of, KIN | {"diffusion.generator": "kin-mean"}),
    "diffusion, last three rounds": (WithAggregator.of, KIN),
    "diffusion, kin by heads": (ByHead.of, KIN),
    "diffusion, along the last moves": (PFedGPA.of, KIN | {"server.momentum": 0.8}),
    "measured noise of each axis": (PFedGPA.of, {}),
    "measured, no denoiser": (PFedGPA.of, {"diffusion.generator": "upload"}),
    "mean of the true group": (Oracle.of, KIN),
}


def main(
    file: Path = Path("conf/fashion-mnist-20.toml"),
    rounds: int = 20,
    seeds: Seeds = "0,1,2",
    rows: Annotated[list[str], typer.Option(help="Only these; may be repeated.")] = [],  # noqa: B006
    shift: Annotated[str, typer.Option(help="What groups differ in instead of classes.")] = "",
    quick: Quick = False,
) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    cells = {}
    data = {"data.partition": "iid", "data.shift": shift} if shift else {}
    for name in [row for row in ROWS if row in rows or not rows][:: 3 if quick else 1]:
        make, settings = ROWS[name]
        values = []
        for config in configs(file, rounds, seeds, quick, data | settings):
            _, run = simulate(config, CLIENTS, judged_rounds=JUDGED_ROUNDS, strategy=make(config))
            values.append(fmean(row["personalized-accuracy"] for row in run[-JUDGED_ROUNDS:]))
        cells[name] = [Cell(mean_and_spread(values)), *(Cell(f"{value:.4f}") for value in values)]
        print(f"{name}: {mean_and_spread(values)}", flush=True)
    columns = ["accuracy", *(f"seed {seed}" for seed in numbers(seeds, quick))]
    command = f"python -m benchmarks.generators{flag(quick)}"
    note = f"Means over the last {JUDGED_ROUNDS} rounds: {command}"
    print(Table(f"Generators, {CLIENTS} clients in 5 groups", columns, cells, note).markdown())


if __name__ == "__main__":
    typer.run(main)
