"""The bench: the runs of a suite in processes of their own, several at a time."""

import logging
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from flwr.common.logger import FLOWER_LOGGER

from pfedgpa_app.errors import reason_of
from pfedgpa_app.files import read_text
from server_app.simulation import end_with_parent
from server_app.suites import BenchRun

BYTES_A_RUN = 2 * 2**30
"""What a run with a small model takes, torch included."""


def num_processes() -> int:
    """Return how many runs at a time cores and free memory allow."""
    try:  # with what the system would give back of its cache
        lines = read_text(Path("/proc/meminfo")).splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable"))
        free = int(available.split()[1]) * 1024
    except (OSError, StopIteration):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # macOS: half of all
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, min(cores, free // BYTES_A_RUN))


def execute(
    runs: list[BenchRun], folder: Path, processes: int, advance: Callable[[BenchRun], None]
) -> dict[str, str]:
    """Do runs, each in a process of its own, and return the reasons of those that failed.

    With 0 processes they run here, one after the other, and an error is raised as it is.
    ``advance`` is called after each run.
    """
    if not processes:
        for run in runs:
            run.execute(folder)
            advance(run)
        return {}
    failed: dict[str, str] = {}
    waiting = list(reversed(runs))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["server_app.suites", "client_app.messages"])
    alive: dict[int, tuple[Any, BenchRun, Connection]] = {}
    try:
        while waiting or alive:
            while waiting and len(alive) < processes:
                run = waiting.pop()
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_execute, args=(run, folder, sender))
                process.start()
                sender.close()
                alive[process.sentinel] = (process, run, receiver)
            for sentinel in wait(list(alive)):
                assert isinstance(sentinel, int)
                process, run, receiver = alive.pop(sentinel)
                process.join()
                if process.exitcode:
                    try:
                        failed[run.name] = receiver.recv()
                    except EOFError:
                        failed[run.name] = (
                            f"its process ended with {process.exitcode}; -9 may be a lack of memory"
                        )
                receiver.close()
                advance(run)
    finally:
        for process, _, _ in alive.values():
            process.terminate()
            process.join()
    return failed


def _execute(run: BenchRun, folder: Path, reasons: Connection) -> None:
    end_with_parent()  # which may be killed even while it starts this one
    os.dup2(sys.stderr.fileno(), 1)  # what own modules print is no part of the bench's output
    tracebacks: list[str] = []

    def has_none(record: logging.LogRecord) -> bool:
        """Keep a traceback of the log for the file of the run."""
        if record.exc_info:
            tracebacks.append(logging.Formatter().format(record))
        return not record.exc_info

    for handler in FLOWER_LOGGER.handlers:
        handler.addFilter(has_none)
    try:
        run.execute(folder)
    except Exception as error:
        file = run.file(folder).with_suffix(".traceback")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join([*tracebacks, traceback.format_exc()]), encoding="utf-8")
        reasons.send(f"{reason_of(error)}; its traceback is in {file}")
        sys.exit(1)
