"""Random generators that depend on seed and purpose alone, and reproducible computing."""

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

    Streams of one seed are independent (by a hash), so clients and rounds draw the same numbers in
    any order and any process.
    """
    digest = hashlib.sha256(repr((seed, *stream)).encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8]))


@contextmanager
def initialized_by(generator: torch.Generator) -> Iterator[None]:
    """Initialize modules that are built in the block from ``generator``.

    The global generators of torch (CPU), NumPy and Python are set, and restored afterwards.
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
    """Seed the global generators of torch, NumPy and Python by that of ``generator``.

    Dropout layers draw from them, and own models may; they are restored afterwards.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _others_seeded(generator.initial_seed()):
        torch.manual_seed(generator.initial_seed())
        yield


def global_draws() -> tuple[object, ...]:
    """Return the states of NumPy's and Python's global generators, to detect draws."""
    state = np.random.get_state(legacy=False)["state"]  # noqa: NPY002
    return state["key"].tobytes(), state["pos"], random.getstate()


@contextmanager
def _others_seeded(seed: int) -> Iterator[None]:
    """Seed NumPy's and Python's global generators, and restore them afterwards."""
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
    """Make torch deterministic.

    On a GPU, cuDNN uses deterministic algorithms. On a CPU, results depend on the number of
    threads, which ``num_threads`` fixes (None: unchanged); one is also the fastest for small
    tensors.
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
    """Return the device ``cpu`` or ``cuda``; ``auto`` is CUDA if available.

    Raises
    ------
    RuntimeError
        If ``cuda`` is not available.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            'device = "cuda": torch finds no CUDA device here; right would be "auto" or "cpu"'
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
