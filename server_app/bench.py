"""The bench: the runs of a suite in processes of their own, several at a time."""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

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
    alive: dict[int, tuple[Any, BenchRun]] = {}
    try:
        while waiting or alive:
            while waiting and len(alive) < processes:
                run = waiting.pop()
                process = context.Process(target=_execute, args=(run, folder))
                process.start()
                alive[process.sentinel] = (process, run)
            for sentinel in wait(list(alive)):
                assert isinstance(sentinel, int)
                process, run = alive.pop(sentinel)
                process.join()
                if process.exitcode:
                    failed[run.name] = _why(process.exitcode, run.traceback_file(folder))
                advance(run)
    finally:
        for process, _ in alive.values():
            process.terminate()
            process.join()
    return failed


def _execute(run: BenchRun, folder: Path) -> None:
    end_with_parent()  # which may be killed even while it starts this one
    os.dup2(sys.stderr.fileno(), 1)  # what own modules print is no part of the bench's output
    file = run.traceback_file(folder)
    file.unlink(missing_ok=True)
    try:
        run.execute(folder)
    except Exception as error:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            text = traceback.format_exc()
            file.write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError:  # as on a full disk
            file.unlink(missing_ok=True)
            print(f"{run.name}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None


def _why(exit_code: int, file: Path) -> str:
    if exit_code < 0:
        return f"its process ended with {exit_code}; -9 may be a lack of memory"
    if not file.exists():
        return "see its error above; its traceback could not be written"
    return f"{read_text(file).strip().splitlines()[-1]}\n    (traceback: {file})"
