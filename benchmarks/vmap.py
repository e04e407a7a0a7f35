"""Time of local training as one graph over all clients (``client.engine = "vmap"``).

    python -m benchmarks.vmap
    python -m benchmarks.vmap --device cuda --clients 100 --images 600

The clients train on random images, since only their number and size matter. Both engines train the
same models in turn, and the best repetition counts. On a CPU, processor seconds are measured, which
do not depend on other load.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
import typer
from torch import Tensor

from benchmarks.options import Quick
from client_app import batched
from client_app.methods import Method, Task
from pfedgpa_app.config import Config, DatasetInfo
from pfedgpa_app.data import ClientData, ImageStats
from pfedgpa_app.models import build_model
from pfedgpa_app.parameters import copy_of
from pfedgpa_app.randomness import make_generator, resolve_device

MODELS = {"cnn-8x8": 8, "benchmarks.small_images:cnn": 14, "cnn-28x28": 28}
"""The size of the images that each takes."""
NUM_CLASSES = 10
ROUNDING = 1e-7


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    clients: int = 20,
    images: Annotated[int, typer.Option(help="Of each client.")] = 100,
    epochs: int = 5,
    repetitions: int = 3,
    model: Annotated[str, typer.Option(help="Only that one.")] = "",
    quick: Quick = False,
) -> None:
    """Print the table."""
    if quick:
        clients, images, epochs, repetitions = 2, 12, 1, 1
    torch.set_num_threads(1)
    print(f"{clients} clients x {epochs} epochs x {images} images on {device}\n")
    headings = ("model", "parameters", "loop, seconds", "vmap, seconds", "vmap / loop")
    headings += ("median difference", "largest", "largest of the loop, moved")
    print(f"| {' | '.join(headings)} |\n|{' --- |' * len(headings)}")
    for name in [model] if model else MODELS:
        found = row(name, resolve_device(device), clients, images, epochs, repetitions)
        print(found, flush=True)


def row(
    name: str, device: torch.device, clients: int, images: int, epochs: int, repetitions: int
) -> str:
    """Measure a model, and return its row.

    Differences from the loop are parts of how far the client's model moved. The last one is that of
    the loop itself from initial parameters that differ by `ROUNDING`.
    """
    best = dict.fromkeys(ENGINES, math.inf)
    ends: dict[str, Tensor] = {}

    def make_tasks() -> list[Task]:
        return [_task(name, device, client, images, epochs) for client in range(clients)]

    start = _vectors(make_tasks()[:1])
    for engine in list(ENGINES) * repetitions:
        tasks = make_tasks()
        best[engine] = min(best[engine], _seconds(ENGINES[engine], tasks, device))
        ends[engine] = _vectors(tasks)
    moved = make_tasks()
    for task in moved:
        task.model.load_state_dict({n: t * (1 + ROUNDING) for n, t in task.received.items()})
    _loop(moved)
    length = (ends["loop"] - start).norm(dim=1)
    apart = (ends["vmap"] - ends["loop"]).norm(dim=1) / length
    usual = (_vectors(moved) - ends["loop"]).norm(dim=1) / length
    numbers = (
        f"{start.numel():,}",
        *(f"{seconds:.2f}" for seconds in (*best.values(), best["vmap"] / best["loop"])),
        *(f"{float(part):.0e}" for part in (apart.median(), apart.max(), usual.max())),
    )
    return f"| {name} | {' | '.join(numbers)} |"


def _loop(tasks: list[Task]) -> None:
    for task in tasks:
        task.fit(task.model)


def _vmap(tasks: list[Task]) -> None:
    batched.train([each for task in tasks for each in batched.draw(Method().fits(task))])


ENGINES = {"loop": _loop, "vmap": _vmap}


def _seconds(
    engine: Callable[[list[Task]], None], tasks: list[Task], device: torch.device
) -> float:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    begin = clock()
    engine(tasks)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - begin


def _vectors(tasks: list[Task]) -> Tensor:
    """Return the parameters of each, ``(tasks, d)``, on the CPU."""
    states = [copy_of(task.model.state_dict()) for task in tasks]
    return torch.stack([torch.cat([t.flatten() for t in each.values()]) for each in states])


def _task(name: str, device: torch.device, client: int, images: int, epochs: int) -> Task:
    size, generator = MODELS[name], make_generator(0, "images", client)
    info = DatasetInfo((1, size, size), NUM_CLASSES)
    pictures = torch.randint(256, (images, *info.shape), generator=generator).byte()
    labels = torch.randint(NUM_CLASSES, (images,), generator=generator)
    stats = ImageStats(torch.tensor([128.0]), torch.tensor([74.0]))
    data = ClientData(pictures, labels, pictures, labels, stats, info).to(device)
    model = build_model(name, info, 0).to(device)
    return Task(
        model=model,
        received=copy_of(model.state_dict()),
        extras={},
        data=data,
        config=Config.from_flat({"client.local-epochs": epochs}),
        offset=torch.zeros(NUM_CLASSES, device=device),
        memory={},
        generator=make_generator(0, "local", client),
        build=partial(build_model, name, info, 0),
    )


if __name__ == "__main__":
    typer.run(main)
