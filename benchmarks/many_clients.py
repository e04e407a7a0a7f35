"""Time and memory of the diffusion model on the server, by number of clients.

    python -m benchmarks.many_clients

Clients in five groups; their parameters are drawn, not trained, since only their number matters
here. In each round 100 of them upload, who are sent their models before. Each row is measured in a
process of its own, but for --quick.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.options import Quick
from pfedgpa_app.aggregation import GenerativeAggregator
from pfedgpa_app.bank import Standing
from pfedgpa_app.config import DiffusionConfig
from pfedgpa_app.diffusion.signal import SKETCH
from pfedgpa_app.randomness import make_generator
from pfedgpa_app.state import save_state
from pfedgpa_app.vault import DiskVault, MemoryVault

GROUPS = 5
UPLOADS = 100
ROUNDS = 3
DIM = 117_066  # of the CNN for Fashion-MNIST
MEMBERS = DiffusionConfig().max_members
# Number of clients, largest number of members, and storage of the others.
ROWS = ((100, MEMBERS, "memory"), (1_000, 1_000, "memory"))
ROWS += tuple(
    (clients, MEMBERS, bank) for clients in (1_000, 10_000) for bank in ("memory", "disk")
)
QUICK_ROWS, QUICK_DIM = ((100, 60, "disk"),), 1_000
MEGA = 2**20


def measure(
    clients: int, members: int, bank: str, dim: int = DIM, rounds: int = ROUNDS
) -> dict[str, float]:
    """Measure one row, in a process of its own.

    Returns
    -------
    dict[str, float]
        Means over the rounds: ``fit``, ``model`` and ``checkpoint``, seconds for learning, for each
        model sent and for the checkpoint; ``megabytes`` of the checkpoint; ``memory``, the peak of
        the process in megabytes; ``error`` of the models, as a part of the distance of an upload
        from the centre of its group.
    """
    row = [f"--clients={clients}", f"--members={members}", f"--bank={bank}", f"--dim={dim}"]
    row.append(f"--rounds={rounds}")
    command = [sys.executable, "-m", "benchmarks.many_clients", *row]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def main(
    clients: Annotated[int, typer.Option(help="Measure one row and print JSON.")] = 0,
    members: int = MEMBERS,
    bank: str = "memory",
    dim: int = DIM,
    rounds: int = ROUNDS,
    quick: Quick = False,
) -> None:
    """Print the table."""
    if quick:
        dim, rounds = min(dim, QUICK_DIM), 1
    if clients:
        print(json.dumps(_measure(clients, members, bank, dim, rounds)))
        return
    headings = ("clients", "members at most", "bank", "seconds to learn", "to make a model")
    headings += ("to write a checkpoint", "checkpoint, MB", "peak memory, MB")
    print(f"| {' | '.join(headings)} |\n|{' --- |' * len(headings)}")
    for row in QUICK_ROWS if quick else ROWS:
        of = (*row, dim, rounds)
        found = _measure(*of) if quick else measure(*of)
        print(
            f"| {row[0]:,} | {row[1]:,} | {row[2]} | {found['fit']:.1f} | {found['model']:.3f} | "
            f"{found['checkpoint']:.1f} | {found['megabytes']:,.0f} | {found['memory']:,.0f} |",
            flush=True,
        )


class Clients:
    """Draws uploads and halves' updates of clients."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.centres = [torch.randn(dim, generator=make_generator(0, g)) for g in range(GROUPS)]

    def upload(self, client: int) -> Tensor:
        """Return the parameters of a client, ``(d,)``."""
        noise = torch.randn(self.dim, generator=make_generator(1, client))
        return noise.mul_(0.5).add_(self.centres[client % GROUPS])

    def halves(self, client: int) -> Tensor:
        """Return the sketches of its halves' updates, ``(2, SKETCH)``."""
        noise = torch.randn(2, SKETCH, generator=make_generator(2, client))
        return 0.5 * noise + torch.randn(SKETCH, generator=make_generator(3, client % GROUPS))

    def error(self, client: int, model: Tensor) -> float:
        """Return a model's distance to the centre, relative to the upload's."""
        centre = self.centres[client % GROUPS]
        return float((model - centre).norm() / (self.upload(client) - centre).norm())


def _measure(
    num_clients: int, members: int, bank: str, dim: int, num_rounds: int
) -> dict[str, Any]:
    torch.set_num_threads(1)
    clients = Clients(dim)
    config = DiffusionConfig(device="cpu", max_members=members)
    with tempfile.TemporaryDirectory() as folder:
        archived = DiskVault(Path(folder, "bank")) if bank == "disk" else MemoryVault()
        aggregator = GenerativeAggregator(torch.zeros(dim), config, archived=archived)
        first_member = max(0, num_clients - members)
        for client in range(num_clients):
            aggregator.compare(client, clients.halves(client))
            if client >= first_member:
                aggregator.observe(client, clients.upload(client))
                continue
            # As if its last round were long ago.
            aggregator.bank.archived[client] = clients.upload(client)
            aggregator.bank.of(client).standing = Standing.ARCHIVED
        aggregator.fit(1)
        found: dict[str, list[float]] = {"fit": [], "model": [], "checkpoint": [], "error": []}
        checkpoint = Path(folder, "checkpoint.safetensors")
        for number in range(num_rounds):
            chosen = [(number * UPLOADS + place) % num_clients for place in range(UPLOADS)]
            begin = time.perf_counter()
            for _ in aggregator.personalize_each(chosen):
                pass
            found["model"].append((time.perf_counter() - begin) / UPLOADS)
            some = chosen[::10]
            models = zip(some, aggregator.personalize_each(some), strict=True)
            found["error"] += [clients.error(client, model) for client, model in models]
            for client in chosen:
                aggregator.observe(client, clients.upload(client))
            begin = time.perf_counter()
            aggregator.fit(2 + number)
            found["fit"].append(time.perf_counter() - begin)
            begin = time.perf_counter()
            save_state(checkpoint, "state", aggregator.state())
            aggregator.bank.archived.prune()
            found["checkpoint"].append(time.perf_counter() - begin)
        megabytes = checkpoint.stat().st_size / MEGA
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEGA
    means = {name: fmean(values) for name, values in found.items()}
    return {**means, "megabytes": megabytes, "memory": memory}


if __name__ == "__main__":
    typer.run(main)
