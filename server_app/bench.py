"""The bench: the runs of a suite and their results, several at a time in processes of their own."""

import hashlib
import json
import logging
import multiprocessing
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from statistics import fmean
from typing import Any

import flwr
import torch
from flwr.common.logger import FLOWER_LOGGER

from pfedgpa_app.config import Config
from pfedgpa_app.errors import reason_of
from pfedgpa_app.files import count_of, quoted, read_json, read_text
from pfedgpa_app.rounds import EVALUATED, RECALL, SCORES, RoundRecord, Row
from pfedgpa_app.source import commit
from pfedgpa_app.state import write_text, writing
from server_app.simulation import end_with_parent, simulate

Result = dict[str, Any]

BYTES_A_RUN = 2 * 2**30
"""What a run with a small model takes, torch included."""


@dataclass(frozen=True)
class BenchRun:
    """A run of a suite, of which the last ``evaluated_rounds`` are evaluated."""

    case: str
    row: str
    config: Config
    clients: int
    evaluated_rounds: int
    superlink: str = ""
    """Its SuperLink; empty for simulations, whose results do not depend on it."""

    @property
    def name(self) -> str:
        """The run's name in messages; names with a comma are in quotes."""
        names = (quoted(name) if "," in name else name for name in (self.case, self.row) if name)
        return ", ".join([*names, f"seed {self.config.seed}"])

    def file(self, folder: Path) -> Path:
        """Return the path of its result, which runs of equal settings share."""
        config = self.config
        what = [config.decisive, config.num_server_rounds, self.clients, self.evaluated_rounds]
        if self.superlink:
            what.append(self.superlink)
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
        return folder / "runs" / f"{key}.json"

    def result(self, folder: Path) -> Result | None:
        """Return the stored result; None if there is none or it is damaged."""
        try:
            result: Result = read_json(self.file(folder))
        except (OSError, ValueError):
            return None
        return result if isinstance(result, dict) else None

    def execute(self, folder: Path) -> None:
        """Run in this process and write the result.

        Raises
        ------
        FloatingPointError
            If an accuracy is missing.
        RuntimeError
            If no client could train in a round, with the reasons.
        """
        torch.set_num_threads(1)
        begin = time.monotonic()
        clients: list[Row] = []

        def on_round(record: RoundRecord) -> None:
            if not record.num_trained:
                statuses = {str(row.get("status", "ok")) for row in record.clients.values()}
                raise RuntimeError(f"round {record.server_round}: {'; '.join(sorted(statuses))}")
            clients.extend(record.clients.values())

        _, rows = simulate(
            self.config,
            self.clients,
            evaluated_rounds=self.evaluated_rounds,
            num_processes=0,
            on_round=on_round,
        )
        self.write(folder, rows, clients, time.monotonic() - begin)

    def write(self, folder: Path, rows: list[Row], clients: Sequence[Row], seconds: float) -> None:
        """Write a result atomically: the rows of all rounds, and each client's accuracies.

        ``clients`` are the rows of all clients in all rounds, ``seconds`` what the run took.

        Raises
        ------
        FloatingPointError
            If a client has none in an evaluated round, as when its loss was not finite.
        RuntimeError
            If no client could train in a round.
        WriteError
            If the result cannot be written.
        """
        for row in rows:
            if not row["num-clients"]:
                raise RuntimeError(f"round {row['round']}: no client could train")
        first = self.config.num_server_rounds + 1 - self.evaluated_rounds

        def by_client(name: str) -> list[dict[int, float]]:
            found: list[dict[int, float]] = [{} for _ in range(self.evaluated_rounds)]
            for row in clients:
                if name in row and row["round"] >= first:
                    found[row["round"] - first][row["client"]] = row[name]
            return found

        evaluated = by_client(EVALUATED)
        if missing := self.clients - min(map(len, evaluated)):
            raise FloatingPointError(
                f"{missing} of {count_of(self.clients, 'client')} have no accuracy in an evaluated "
                "round: their losses may not be finite; their messages are in the log"
            )
        scores = {
            name for row in clients for name in row if name in SCORES or RECALL.fullmatch(name)
        }
        result = {
            "name": self.name,
            "config": self.config.to_flat(),
            "clients": self.clients,
            "rounds": rows,
            "accuracies": evaluated,
            "scores": {name: by_client(name) for name in sorted(scores - {EVALUATED})},
            "seconds": round(seconds, 1),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "flwr": flwr.__version__,
                "commit": commit(),
            },
        }
        file = self.file(folder)
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(result))

    def outcome(self, folder: Path) -> str:
        """Return a line with its last accuracy and its seconds."""
        if (result := self.result(folder)) is None:
            return f"{self.name}: failed"
        accuracy = fmean(result["accuracies"][-1].values())
        return f"{self.name}: {accuracy:.4f} in the last round, {result['seconds']:.0f} s"


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
    context.set_forkserver_preload([__name__])
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
