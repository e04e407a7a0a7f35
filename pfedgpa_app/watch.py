"""The command ``pfedgpa watch``: follow a run by its files until it is over."""

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from pfedgpa_app.console import OutputDir, RunArgument, fail, read_run
from pfedgpa_app.files import open_regular, printable
from pfedgpa_app.report import Run
from pfedgpa_app.rounds import Row, called, describe, has_failed, parse_rows, value_of
from pfedgpa_app.runs import CHECKPOINT, LATEST, is_going_on

_PAUSE = 1.0  # seconds between two looks
_ROUNDS_TIMED = 5  # of which the median is taken for each round that is left
_FAILURES_SHOWN = 5
_INTERRUPTED = 130  # what shells say of Ctrl-C


def watch(run: RunArgument = LATEST, output_dir: OutputDir = "") -> None:
    """Follow a run until it is over: a line a round, and on a terminal how long the rest takes.

    The exit code is 0 if all rounds are complete then, 1 if not.
    """
    followed = Followed(read_run(run, output_dir))
    console = Console()
    bottom = Live(console=console, auto_refresh=False, transient=True)
    try:
        with bottom if console.is_terminal else nullcontext():
            for left in _rounds(followed):
                bottom.update(Text(left), refresh=console.is_terminal)
    except KeyboardInterrupt:
        raise typer.Exit(_INTERRUPTED) from None
    name, path = followed.run.name, followed.run.path
    rounds = f"{followed.last_round} of {followed.num_rounds} rounds"
    ended = followed.run.ended
    if followed.last_round < followed.num_rounds and not ended:
        go_on = f'; right would be resume-from="{name}", which goes on from its last checkpoint'
        why = f": {error}" if (error := followed.run.error) else ""
        fail(f"{name} stopped after {rounds}{why}{go_on if (path / CHECKPOINT).exists() else ''}")
    if ended:
        print(printable(ended))
    print(f"{name} is complete, {rounds}: {path}")


class Tail:
    """Reads what is appended to a file of JSON lines."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._offset = 0

    def rows(self) -> list[Row]:
        """Return the whole lines that are new.

        Lines that a full disk made their writer take back come a second time.

        Raises
        ------
        RowError
            If one of them is damaged.
        """
        if not self._file.exists():
            return []
        with open_regular(self._file) as stream:
            self._offset = min(self._offset, os.fstat(stream.fileno()).st_size)
            stream.seek(self._offset)
            new = stream.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        return parse_rows(self._file, whole)


class Followed:
    """A run as far as its files show.

    Attributes
    ----------
    rounds
        The rows of metrics.jsonl by round.
    failures
        By round and client, who sent no usable reply, and why.
    is_over
        Whether nobody is at work on it any more.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.num_rounds = run.config.num_server_rounds
        self.rounds: dict[int, Row] = {}
        self.failures: dict[int, dict[int, str]] = {}
        self.is_over = False
        self._metrics = Tail(run.path / "metrics.jsonl")
        self._clients = Tail(run.path / "clients.jsonl")

    @property
    def last_round(self) -> int:
        """The last round that is complete."""
        return max(self.rounds, default=0)

    def update(self) -> list[Row]:
        """Read what is new, and return the rounds that are."""
        # First, since whoever lets go of the lock has written all it had.
        self.is_over = not is_going_on(self.run.path)
        new = [row for row in self._metrics.rows() if row["round"] not in self.rounds]
        self.rounds |= {row["round"]: row for row in new}
        for row in self._clients.rows():  # they are written before their round's
            if has_failed(row):
                self.failures.setdefault(row["round"], {})[row["client"]] = (
                    f"{called(row)}: {row['status']}"
                )
        return new

    def seconds_since(self, now: float) -> float:
        """Return how long ago the last round, or before the first the settings, were written."""
        files = [self.run.path / name for name in ("metrics.jsonl", "config.json")]
        written = next((file.stat().st_mtime for file in files if file.exists()), now)
        return max(0.0, now - written)

    def seconds_left(self, now: float) -> float | None:
        """Return about how long the rest takes; None before the first round."""
        rows = list(self.rounds.values())[-_ROUNDS_TIMED:]
        last = [value_of(row, "seconds-round") for row in rows]
        if not last:
            return None
        # Of the first round, most may be start-up.
        whole = (self.num_rounds - self.last_round) * statistics.median(last)
        return max(0.0, whole - self.seconds_since(now))


def _rounds(followed: Followed) -> Iterator[str]:
    """Print a line a round, and one for each client that failed in it, until the run is over.

    Yields at each look where the run is.
    """
    while True:
        for row in followed.update():
            print(describe(row, followed.num_rounds))
            for failure in _failures(followed, row["round"]):
                print(f"  {failure}")
        print(end="", flush=True)
        if followed.is_over:
            return
        yield _progress(followed, time.time())
        time.sleep(_PAUSE)


def _progress(followed: Followed, now: float) -> str:
    since = timedelta(seconds=round(followed.seconds_since(now)))
    if followed.last_round == followed.num_rounds:
        return f"All rounds are complete; models and page are written for {since} h"
    left = followed.seconds_left(now)
    about = "" if left is None else f", about {timedelta(seconds=round(left))} h left"
    return f"Round {followed.last_round + 1} of {followed.num_rounds} for {since} h{about}"


def _failures(followed: Followed, server_round: int) -> Iterator[str]:
    failures = sorted(followed.failures.get(server_round, {}).items())
    yield from (printable(failure) for _, failure in failures[:_FAILURES_SHOWN])
    if more := failures[_FAILURES_SHOWN:]:
        yield f"and {len(more)} more"
