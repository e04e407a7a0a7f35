"""Time and memory of the diffusion model on the server, by size of the clients' model.

    python -m benchmarks.scaling

Twenty clients in five groups; their parameters are drawn, not trained, since only their number
matters here. Each row is measured in a process of its own, but for --quick.
"""

import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch
import typer
from torch import Tensor

from benchmarks.options import Quick
from pfedgpa_app.aggregation import GenerativeAggregator
from pfedgpa_app.config import DatasetInfo, DiffusionConfig
from pfedgpa_app.models import build_model
from pfedgpa_app.parameters import ParameterLayout
from pfedgpa_app.randomness import make_generator

CLIENTS, GROUPS = 20, 5
MODELS = {
    "cnn-8x8": ("cnn-8x8", DatasetInfo((1, 8, 8), 10), "fc2*"),
    "cnn-28x28": ("cnn-28x28", DatasetInfo((1, 28, 28), 10), "fc2*"),
    "small vision transformer": (
        "benchmarks.small_images:vision_transformer",
        DatasetInfo((1, 14, 14), 10),
        "heads*",
    ),
    "mlp of 50,000 features": ("mlp", DatasetInfo((50_000,), 10), "fc3*"),
    "resnet18": ("resnet18", DatasetInfo((3, 32, 32), 10), "fc*"),
}
MODES = ("whole", "last layer")


def measure(model: str, mode: str) -> dict[str, Any]:
    """Measure one model, in a process of its own.

    Returns
    -------
    dict[str, Any]
        ``dim`` d of the vector; ``seconds`` of `fit` and everyone's `personalize`; ``memory``, by
        which the process's peak grew, in multiples of the bank; ``error`` of what is generated, as
        a part of the upload's distance from the centre of its group.
    """
    command = [sys.executable, "-m", "benchmarks.scaling", "--model", model, "--mode", mode]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main(model: str = "", mode: str = "", quick: Quick = False) -> None:
    """Print the table; with --model and --mode, measure one row and print JSON."""
    if model:
        print(json.dumps(_measure(model, mode)))
        return
    print(
        "| model | generated | d | seconds | peak memory / bank |\n| --- | --- | --- | --- | --- |"
    )
    for each in [*MODELS][: 1 if quick else None]:
        for way in MODES[: 1 if quick else None]:
            result = (_measure if quick else measure)(each, way)
            print(
                f"| {each} | {way} | {result['dim']:,} | {result['seconds']:.1f} | "
                f"{result['memory']:.2f} |",
                flush=True,
            )


def _measure(model: str, mode: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    name, info, last = MODELS[model]
    patterns = (last,) if mode == "last layer" else ("*",)
    layout = ParameterLayout.of(build_model(name, info, seed=0).state_dict(), patterns)
    _aggregator(_centres(10)).fit(1)  # imports are not measured
    centres = _centres(layout.dim)
    before = _peak_bytes()
    aggregator = _aggregator(centres)
    begin = time.perf_counter()
    aggregator.fit(1)
    models = list(aggregator.personalize_each(range(CLIENTS)))
    seconds, memory = time.perf_counter() - begin, _peak_bytes() - before
    ratios = []
    for client, generated in enumerate(models):
        centre, upload = centres[client % GROUPS], aggregator.bank.members[client]
        ratios.append((generated - centre).norm() / (upload - centre).norm())
    return {
        "dim": layout.dim,
        "seconds": seconds,
        "memory": memory / (CLIENTS * layout.dim * 4),
        "error": float(torch.stack(ratios).mean()),
    }


def _centres(dim: int) -> list[Tensor]:
    return [torch.randn(dim, generator=make_generator(0, group)) for group in range(GROUPS)]


def _aggregator(centres: list[Tensor]) -> GenerativeAggregator:
    """Return an aggregator with uploads drawn around the centres of groups."""
    dim = len(centres[0])
    aggregator = GenerativeAggregator(torch.zeros(dim), DiffusionConfig(device="cpu"))
    for client in range(CLIENTS):
        noise = torch.randn(dim, generator=make_generator(1, client))
        aggregator.observe(client, noise.mul_(0.5).add_(centres[client % GROUPS]))
    return aggregator


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    typer.run(main)
