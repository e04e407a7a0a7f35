"""Random generators that depend on what they are for, never on who ran before."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def make_generator(
    seed: int, *stream: int | str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Return the generator of one purpose, for example ``make_generator(seed, "local", 3, round)``.

    Different streams of one seed are independent (a hash tells them apart), so clients and rounds
    draw the same numbers in whatever order, and in whatever process, they are computed.
    """
    digest = hashlib.sha256(repr((seed, *stream)).encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8]))


@contextmanager
def initialized_by(generator: torch.Generator) -> Iterator[None]:
    """Let the modules that are built in the block draw their parameters from ``generator``.

    torch initializes modules from its global CPU generator. NumPy's and Python's, which a model of
    a user's may draw from, follow the same seed. All three are put back afterwards.
    """
    before = torch.default_generator.get_state()
    torch.default_generator.set_state(generator.get_state())
    try:
        with _others_seeded(generator.initial_seed()):
            yield
    finally:
        torch.default_generator.set_state(before)


@contextmanager
def drawing_from(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """Let what draws from global generators follow the seed of ``generator``.

    These are layers such as dropout, and whatever a model of a user's draws from NumPy or Python.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _others_seeded(generator.initial_seed()):
        torch.manual_seed(generator.initial_seed())
        yield


def global_draws() -> tuple[object, ...]:
    """Return where NumPy's and Python's global generators are, to see whether something drew."""
    state = np.random.get_state(legacy=False)["state"]  # noqa: NPY002
    return state["key"].tobytes(), state["pos"], random.getstate()


@contextmanager
def _others_seeded(seed: int) -> Iterator[None]:
    """Seed NumPy's and Python's global generators, and put them back afterwards."""
    before = np.random.get_state(), random.getstate()  # noqa: NPY002
    np.random.seed([seed % 2**32, seed >> 32 & 0xFFFFFFFF])  # noqa: NPY002
    random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before[0])  # noqa: NPY002
        random.setstate(before[1])


@contextmanager
def repeatable(num_threads: int | None = None) -> Iterator[None]:
    """Let torch compute the same digits each time.

    On a GPU, cuDNN chooses among those algorithms that do: the fastest ones add up in whatever
    order the GPU comes to it. On a CPU, ``num_threads`` gives the same digits on a machine of any
    number of cores; on small tensors one is also the fastest, by far where other processes want
    the cores. None leaves the threads as they are.
    """
    cudnn, threads = torch.backends.cudnn, torch.get_num_threads()
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    if num_threads:
        torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
        if num_threads:
            torch.set_num_threads(threads)


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
