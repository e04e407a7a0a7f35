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
def drawing_from(generator: torch.Generator, device: torch.device | None = None) -> Iterator[None]:
    """Seed the global generators of torch, NumPy and Python by that of ``generator``.

    Initialization and dropout draw from them, and own models may; they are restored afterwards.
    """
    seed = generator.initial_seed()
    before = np.random.get_state(), random.getstate()  # noqa: NPY002
    with torch.random.fork_rng(devices=[device] if device and device.type == "cuda" else []):
        # torch.manual_seed also seeds devices that are absent: it notes the call's traceback for
        # each, up to a millisecond.
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(seed)
        np.random.seed([seed % 2**32, seed >> 32 & 0xFFFFFFFF])  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(before[0])  # noqa: NPY002
            random.setstate(before[1])


def global_draws() -> tuple[object, ...]:
    """Return the states of NumPy's and Python's global generators, to detect draws."""
    state = np.random.get_state(legacy=False)["state"]  # noqa: NPY002
    return state["key"].tobytes(), state["pos"], random.getstate()


@contextmanager
def repeatable(num_threads: int | None = None) -> Iterator[None]:
    """Make cuDNN deterministic, and fix the number of CPU threads (None: unchanged).

    Results depend on that number; one is also the fastest for small tensors.
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

    Raises `RuntimeError` if ``cuda`` is not available.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            'device = "cuda": torch finds no CUDA device here; right would be "auto" or "cpu"'
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
