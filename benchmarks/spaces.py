"""The raw space and the subspace on the same bank: accuracy, time and memory.

    python -m benchmarks.spaces

Ten clients train on the digits for some rounds; then each space is fitted to their last uploads, in
a separate process but for --quick, and generates all models.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.options import Quick
from benchmarks.small_runs import shortened
from pfedgpa_app.aggregation import GenerativeAggregator
from pfedgpa_app.config import Config
from pfedgpa_app.data import client_data
from pfedgpa_app.evaluation import evaluate
from pfedgpa_app.models import build_model
from pfedgpa_app.parameters import ParameterLayout
from server_app.simulation import simulate
from server_app.strategies import PFedGPA

CLIENTS = 10
CONFIG = Config.from_flat(
    {
        "client.device": "cpu",
        "diffusion.device": "cpu",
        "data.train-samples": 50,
        "data.uniform-fraction": 0.2,
    }
)
SPACES = {
    "subspace": {},
    "raw": {"space": "raw", "hidden_size": 8, "batch_size": 8, "start": 200},
}


def main(space: str = "", bank: Path | None = None, quick: Quick = False) -> None:
    """Print the table; with --space, measure one space on a bank and print JSON."""
    torch.set_num_threads(1)
    config = shortened(CONFIG) if quick else CONFIG
    if space and bank:
        print(json.dumps(_measure(config, space, bank)))
        return
    strategy, _ = simulate(config, CLIENTS)
    assert isinstance(strategy, PFedGPA)
    dim = len(strategy.aggregator.bank.members[0])
    uploads = _accuracy(config, strategy.aggregator.bank.members)
    print(f"{CLIENTS} clients, d = {dim}; accuracy of the uploads themselves: {uploads:.4f}")
    print("| space | accuracy | seconds | peak memory, MB |\n| --- | --- | --- | --- |")
    with TemporaryDirectory() as folder:
        file = Path(folder) / "bank.safetensors"
        save_file({str(client): v for client, v in strategy.aggregator.bank.members.items()}, file)
        for name in [*SPACES][: 1 if quick else None]:
            if quick:
                result = _measure(config, name, file)
            else:
                command = [sys.executable, "-m", "benchmarks.spaces", "--space", name]
                result = json.loads(subprocess.check_output([*command, "--bank", file]))
            print(
                f"| {name} | {result['accuracy']:.4f} | {result['seconds']:.1f} | "
                f"{result['megabytes']:.0f} |",
                flush=True,
            )


def _measure(config: Config, space: str, file: Path) -> dict[str, float]:
    bank = {int(client): vector for client, vector in load_file(file).items()}
    diffusion = config.diffusion.model_copy(update=SPACES[space])
    aggregator = GenerativeAggregator(torch.zeros_like(bank[0]), diffusion)
    for client, vector in bank.items():
        aggregator.observe(client, vector)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    aggregator.fit(1)
    seconds = time.perf_counter() - begin
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    accuracy = _accuracy(config, {client: aggregator.personalize(client) for client in bank})
    return {"accuracy": accuracy, "seconds": seconds, "megabytes": kilobytes / 1024}


def _accuracy(config: Config, vectors: dict[int, Tensor]) -> float:
    model = build_model(config.model.name, config.data.info, config.seed)
    layout = ParameterLayout.of(model.state_dict())
    accuracies = []
    for client, vector in vectors.items():
        data = client_data(config.data, config.seed, client, CLIENTS)
        model.load_state_dict(layout.merge(vector, layout.rest(model.state_dict())))
        result = evaluate(model, data.test_inputs, data.test_labels, data.stats)
        accuracies.append(result.accuracy)
    return fmean(accuracies)


if __name__ == "__main__":
    typer.run(main)
