"""Memorization: distance of generated models to the uploads, and shared errors.

    python -m benchmarks.memorization

For each seed a whole run of pFedGPA (20 clients in 5 groups, Fashion-MNIST in 14x14 pixels); then
each generator generates everyone's model from the last round's uploads. One that memorized would
give vectors much nearer to an upload than uploads are to each other, with that upload's errors (the
questions of arXiv 2506.07998).
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import typer
from torch import Tensor

from benchmarks.options import Quick, Seeds, flag, numbers
from benchmarks.small_runs import print_table, shortened
from pfedgpa_app.aggregation import GenerativeAggregator
from pfedgpa_app.config import Config
from pfedgpa_app.data import client_data
from pfedgpa_app.evaluation import logits_of
from pfedgpa_app.models import build_model
from pfedgpa_app.parameters import ParameterLayout
from server_app.simulation import simulate
from server_app.strategies import PFedGPA
from server_app.suites import Suite

SUITE = Path("conf/suites/ablation.toml")
CLIENTS = 20
DENOISE = {"denoised": True, "mixture as it is": False}
COLUMNS = ("distance to the nearest upload", "shared errors", "accuracy")

Vectors = Mapping[int, Tensor]


def main(seeds: Seeds = "0,1,2", quick: Quick = False) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    rows: dict[str, list[list[float]]] = {}
    for seed in numbers(seeds, quick):
        for name, values in measure(seed, quick).items():
            rows.setdefault(name, []).append(values)
    note = (
        "Distances in units of the mean distance of an upload to the nearest other upload. Shared "
        "errors: of the test images that a client's model or its nearest upload gets wrong, the "
        f"part that both give the same wrong class. Mean ± standard deviation over seeds {seeds}: "
        f"python -m benchmarks.memorization --seeds {seeds}{flag(quick)}"
    )
    print_table("Memorization, 20 clients in 5 groups", COLUMNS, rows, note)


def measure(seed: int, quick: bool) -> dict[str, list[float]]:
    """Return one row per denoising method, and that of the uploads among each other."""
    runs = Suite.read(SUITE).model_copy(update={"seeds": [seed]}).runs()
    config = next(run.config for run in runs if run.clients == CLIENTS and run.row == "diffusion")
    if quick:
        config = shortened(config)
    strategy, _ = simulate(config, CLIENTS, evaluated_rounds=1)
    assert isinstance(strategy, PFedGPA)
    uploads = strategy.aggregator.bank.members
    nearest = {
        client: min((each for each in uploads if each != client), key=_distance_to(vector, uploads))
        for client, vector in uploads.items()
    }
    unit = sum(float((uploads[i] - uploads[j]).norm()) for i, j in nearest.items()) / CLIENTS
    rows = {"uploads among each other": _row(config, uploads, nearest, uploads, unit)}
    for name, denoise in DENOISE.items():
        generated = _generate(denoise, config, strategy.aggregator)
        nearest = {
            client: min(uploads, key=_distance_to(vector, uploads))
            for client, vector in generated.items()
        }
        rows[name] = _row(config, generated, nearest, uploads, unit)
    return rows


def _generate(denoise: bool, config: Config, trained: GenerativeAggregator) -> Vectors:
    """Return all models from the same bank, denoised or not."""
    settings = config.diffusion.model_copy(update={"denoise": denoise})
    aggregator = GenerativeAggregator(trained.initial, settings, seed=config.seed)
    for client, vector in trained.bank.members.items():
        aggregator.observe(client, vector)
    aggregator.fit(config.num_server_rounds, trained.average)
    return {client: aggregator.personalize(client) for client in trained.bank.members}


def _row(
    config: Config, models: Vectors, nearest: Mapping[int, int], uploads: Vectors, unit: float
) -> list[float]:
    distance = shared = accuracy = 0.0
    for client, vector in models.items():
        other = uploads[nearest[client]]
        distance += float((vector - other).norm()) / unit
        labels, classes = _predict(config, client, vector)
        _, others = _predict(config, client, other)
        shared += shared_errors(labels, classes, others)
        accuracy += float((classes == labels).double().mean())
    return [total / len(models) for total in (distance, shared, accuracy)]


def shared_errors(labels: Tensor, one: Tensor, other: Tensor) -> float:
    """Return the fraction of errors of either model in which both predict the same class."""
    wrong = (one != labels) | (other != labels)
    return int(((one == other) & wrong).sum()) / max(1, int(wrong.sum()))


def _predict(config: Config, client: int, vector: Tensor) -> tuple[Tensor, Tensor]:
    """Return a client's test labels and a model's predictions, ``(n,)`` each."""
    data = client_data(config.data, config.seed, client, CLIENTS)
    model = build_model(config.model.name, data.info, config.seed)
    layout = ParameterLayout.of(model.state_dict())
    model.load_state_dict(layout.merge(vector, layout.rest(model.state_dict())))
    return data.test_labels, logits_of(model, data.test_inputs, data.stats).argmax(dim=1)


def _distance_to(vector: Tensor, uploads: Vectors) -> Callable[[int], float]:
    return lambda client: float((uploads[client] - vector).norm())


if __name__ == "__main__":
    typer.run(main)
