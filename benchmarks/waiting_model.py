"""A linear model whose training waits for a signal.

It keeps a client in training while a fault is injected. A SuperNode with a named pipe in ``PIPE``
waits in each training message until the pipe has been opened for writing and closed.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.network import wait_until
from pfedgpa_app.config import DatasetInfo

PIPE = "PFEDGPA_WAITS_FOR"


def model(info: DatasetInfo) -> nn.Module:
    """Return a linear classifier that waits before its first step of training."""

    def before(module: nn.Module, arguments: Any) -> None:
        if module.training:
            _wait()

    made = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(info.shape), info.num_classes))
    made.register_forward_pre_hook(before)
    return made


@cache  # once per message, which has its own process
def _wait() -> None:
    with suppress(KeyError, FileNotFoundError):
        Path(os.environ[PIPE]).read_bytes()


@contextmanager
def held(*pipes: Path, timeout: float) -> Iterator[None]:
    """Wait until the SuperNodes with these pipes train; release them after the block."""
    opened: dict[Path, int] = {}

    def all_wait() -> bool:
        for pipe in pipes:
            with suppress(OSError):  # not opened for reading yet
                opened[pipe] = opened.get(pipe) or os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        return opened.keys() == set(pipes)

    try:
        wait_until(all_wait, timeout)
        yield
    finally:
        for pipe, end in opened.items():
            if pipe.exists():  # the next training waits at another one
                following = pipe.with_suffix(".next")
                os.mkfifo(following)
                following.replace(pipe)
            os.close(end)
