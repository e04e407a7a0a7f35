"""Whole runs of many settings, compared by the accuracy of everyone's personalized model.

    python -m benchmarks.whole_runs participation
    python -m benchmarks.whole_runs cases --seeds 0

A number is the mean over the last five rounds. Runs that --results has already are not repeated.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
import typer

from benchmarks.federation import read_config, simulate
from pfedgpa_app.report import mean_and_spread

JUDGED_ROUNDS = 5
FASHION_MNIST = Path("conf/fashion-mnist-20.toml")
MEASURES = (
    "personalized-accuracy",
    "finetuned-accuracy",
    "seconds-diffusion",
    "bytes-up",
    "bytes-down",
)
Settings = dict[str, Any]
Results = dict[tuple[str, str, int], dict[str, Any]]


class Experiment(NamedTuple):
    """A row of runs for every case: what is configured, and how many clients there are."""

    cases: dict[str, tuple[int, Settings]]
    rows: dict[str, Settings]


PARTICIPATION = Experiment(
    cases={
        "100 clients, 30 % a round": (
            100,
            {"server.fraction-train": 0.3, "num-server-rounds": 25},
        )
    },
    rows={
        "pfedgpa, old uploads move with their kin": {"diffusion.old-uploads": "kin"},
        "pfedgpa, as deviations from the average": {"diffusion.old-uploads": "deviation"},
        "pfedgpa, as uploaded": {"diffusion.old-uploads": "as-uploaded"},
        "fedavg-ft": {"strategy": "fedavg-ft"},
    },
)

# A quarter of the pixels and a smaller model: a hundred whole runs take an hour.
SMALL = {
    "data.dataset": "benchmarks.small_images:fashion_mnist",
    "data.image-shape": "1x14x14",
    "data.num-classes": 10,
    "model.name": "benchmarks.small_images:cnn",
}
PARTITIONS: dict[str, Settings] = {
    "iid": {"data.partition": "iid"},
    "groups": {"data.partition": "dominant-classes"},
    "Dirichlet 0.5": {"data.partition": "dirichlet"},
    "disjoint": {"data.partition": "disjoint"},
}
SIZES: dict[int, Settings] = {
    10: {},
    20: {},
    100: {"server.fraction-train": 0.3, "num-server-rounds": 25},
}
CASES = Experiment(
    cases={
        f"{partition}, {clients}": (clients, SMALL | settings | PARTITIONS[partition])
        for partition in PARTITIONS
        for clients, settings in SIZES.items()
    },
    rows={
        "auto": {},
        "rank 4, start 50": {"diffusion.rank": 4, "diffusion.start": 50},
        "rank 4, start 200": {"diffusion.rank": 4, "diffusion.start": 200},
        "rank 9, start 50": {"diffusion.rank": 9, "diffusion.start": 50},
        "rank 9, start 200": {"diffusion.rank": 9, "diffusion.start": 200},
        "all components, start 50": {"diffusion.rank": 99, "diffusion.start": 50},
        "all components, start 200": {"diffusion.rank": 99, "diffusion.start": 200},
        "local": {"strategy": "local"},
        "fedavg": {"strategy": "fedavg"},
        "fedavg-ft": {"strategy": "fedavg-ft"},
    },
)
LAYERS = Experiment(
    cases={"CNN, 20 clients": (20, {})},
    rows={
        "everything": {},
        "everything, per layer": {"diffusion.blocks": "per-layer"},
        "linear layers, fc*": {"diffusion.generated-layers": "fc*"},
        "last layer, fc2*": {"diffusion.generated-layers": "fc2*"},
    },
)
TRANSFORMER = Experiment(
    cases={
        "vision transformer, 20 clients": (
            20,
            {
                **SMALL,
                "model.name": "benchmarks.small_images:vision_transformer",
                "client.learning-rate": 0.05,
                "num-server-rounds": 10,
            },
        ),
    },
    rows={
        "everything": {},
        "everything, per layer": {"diffusion.blocks": "per-layer"},
        "everything, rank 4, start 200": {"diffusion.rank": 4, "diffusion.start": 200},
        "local": {"strategy": "local"},
        "fedavg-ft": {"strategy": "fedavg-ft"},
    },
)
EXPERIMENTS = {
    "participation": PARTICIPATION,
    "cases": CASES,
    "layers": LAYERS,
    "transformer": TRANSFORMER,
}


def main(
    experiment: str,
    seeds: str = "0,1,2",
    results: Path = Path("build/whole-runs.jsonl"),
    rows: str = "",
    cases: str = "",
) -> None:
    """Run an experiment, or only the rows and cases whose names begin as given, and print it."""
    torch.set_num_threads(1)
    results.parent.mkdir(parents=True, exist_ok=True)
    chosen = EXPERIMENTS[experiment]
    chosen_seeds = [int(seed) for seed in seeds.split(",")]
    for case, row, seed in _pending(chosen, chosen_seeds, results):
        if case.startswith(cases) and row.startswith(rows):
            values = _run(*chosen.cases[case], chosen.rows[row], seed)
            with results.open("a") as file:
                file.write(json.dumps({"key": [case, row, seed], **values}) + "\n")
            print(f"{case}, {row}, seed {seed}: {values}", flush=True)
    for measure in MEASURES[: 1 if experiment == "cases" else None]:
        print(f"\n{measure}, mean of the last {JUDGED_ROUNDS} rounds\n")
        _print_table(chosen, chosen_seeds, measure, _read(results))


def _run(clients: int, case: Settings, row: Settings, seed: int) -> dict[str, float]:
    overrides = case | row | {"seed": seed, "server.min-available-nodes": clients}
    config = read_config(FASHION_MNIST, overrides)
    _, metrics = simulate(config, clients, judged_rounds=JUDGED_ROUNDS)
    return {name: fmean(metric[name] for metric in metrics[-JUDGED_ROUNDS:]) for name in MEASURES}


def _pending(
    experiment: Experiment, seeds: list[int], results: Path
) -> Iterator[tuple[str, str, int]]:
    done = _read(results)
    for seed in seeds:
        for case in experiment.cases:
            for row in experiment.rows:
                if (case, row, seed) not in done:
                    yield case, row, seed


def _read(results: Path) -> Results:
    lines = results.read_text().splitlines() if results.exists() else []
    found = [json.loads(line) for line in lines]
    return {tuple(each["key"]): each for each in found}


def _print_table(experiment: Experiment, seeds: list[int], measure: str, done: Results) -> None:
    print("| | " + " | ".join(experiment.cases) + " |")
    print("| --- " * (1 + len(experiment.cases)) + "|")
    for row in experiment.rows:
        cells = []
        for case in experiment.cases:
            keys = [(case, row, seed) for seed in seeds if (case, row, seed) in done]
            values = [done[key][measure] for key in keys]
            cells.append(mean_and_spread(values, 0 if measure.startswith("bytes") else 4))
        print(f"| {row} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    typer.run(main)
