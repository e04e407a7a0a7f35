"""A model of two tensors, whose training waits until it is let on.

Whoever disturbs a client while it trains needs to know that it does, and for as long as they need.
A SuperNode with a named pipe in ``PIPE`` waits in each training message until the pipe was opened
for writing, and closed. Without the pipe nobody waits.
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


@cache  # once for a message, which has a process of its own
def _wait() -> None:
    with suppress(KeyError, FileNotFoundError):
        Path(os.environ[PIPE]).read_bytes()


@contextmanager
def held(*pipes: Path, timeout: float) -> Iterator[None]:
    """Wait until the SuperNodes with these pipes train, and let them on at the end."""
    opened: dict[Path, int] = {}

    def all_wait() -> bool:
        for pipe in pipes:
            with suppress(OSError):  # nobody reads it yet
                opened[pipe] = opened.get(pipe) or os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        return opened.keys() == set(pipes)

    try:
        wait_until(all_wait, timeout)
        yield
    finally:
        for pipe, end in opened.items():
            if pipe.exists():  # their next training waits at another one
                following = pipe.with_suffix(".next")
                os.mkfifo(following)
                following.replace(pipe)
            os.close(end)
