"""Random generators that depend on what they are for, never on who ran before."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def make_generator(
    seed: int, *stream: int | str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Return the generator of one purpose, for example ``make_generator(seed, "local", 3, round)``.

    Different streams of one seed are independent (numpy's ``SeedSequence``), so clients and rounds
    draw the same numbers in whatever order, and in whatever process, they are computed.
    """
    entropy = [seed]
    for part in stream:
        entropy += [0, part] if isinstance(part, int) else [1, *part.encode()]
    state = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
    return torch.Generator(device=device).manual_seed(state)


@contextmanager
def single_thread() -> Iterator[None]:
    """Let torch use one CPU thread in the block.

    On small tensors more threads are slower, by far where other processes want the cores, and one
    thread gives the same digits on a machine of any number of cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def resolve_device(name: str) -> torch.device:
    """Return the device called ``cpu`` or ``cuda``; ``auto`` is CUDA where there is one.

    Raises
    ------
    RuntimeError
        If ``cuda`` was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            'device = "cuda": torch finds no CUDA device here; right would be "auto" or "cpu"'
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
