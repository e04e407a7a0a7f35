"""The command ``pfedgpa watch``: follow a run by its files until it is over."""

import time
from collections.abc import Iterator

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pfedgpa_app.console import OutputDir, RunArgument, fail, read_run
from pfedgpa_app.files import count_of, printable
from pfedgpa_app.report import Run, read_rows
from pfedgpa_app.rounds import Row, called, describe, has_failed
from pfedgpa_app.runs import CHECKPOINT, LATEST, is_going_on
from pfedgpa_app.sharing import unshared_in

_PAUSE = 1.0  # seconds
_FAILURES_SHOWN = 5
_INTERRUPTED = 130  # what shells say of Ctrl-C


def watch(run: RunArgument = LATEST, output_dir: OutputDir = "") -> None:
    """Follow a run until it is over: a line a round, and on a terminal how long the rest takes.

    The exit code is 0 if all rounds are complete then, 1 if not.
    """
    followed = read_run(run, output_dir)
    rounds: dict[int, Row] = {}
    console = Console()
    columns = (
        "Round",
        MofNCompleteColumn(),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    num_rounds = followed.config.num_server_rounds
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    try:
        with bar:
            task = bar.add_task("", total=num_rounds)
            for last in _follow(followed, rounds):
                bar.update(task, completed=last)
                time.sleep(_PAUSE)
    except KeyboardInterrupt:
        raise typer.Exit(_INTERRUPTED) from None
    name, path = followed.name, followed.path
    last = max(rounds, default=0)
    if last < num_rounds and not followed.ended:
        go_on = f'; right would be resume-from="{name}", which goes on from its last checkpoint'
        why = f": {followed.error}" if followed.error else ""
        checkpoint = go_on if (path / CHECKPOINT).exists() else ""
        fail(f"{name} stopped after {last} of {count_of(num_rounds, 'round')}{why}{checkpoint}")
    for note in filter(None, (followed.ended, unshared_in(list(rounds.values())))):
        print(printable(note))
    print(f"{name} is complete, {last} of {count_of(num_rounds, 'round')}: {path}")


def _follow(run: Run, rounds: dict[int, Row]) -> Iterator[int]:
    """Print a line a round, and some of its failures, until the run is over.

    ``rounds`` gets the rows of metrics.jsonl. Yields the last round before each pause.
    """
    ends = [0, 0]
    failures: dict[int, dict[int, str]] = {}
    while True:
        # First, since whoever lets go of the lock has written all it had.
        is_over = not is_going_on(run.path)
        read, ends[0] = read_rows(run.path / "metrics.jsonl", ends[0])
        new = [row for row in read if row["round"] not in rounds]
        read, ends[1] = read_rows(run.path / "clients.jsonl", ends[1])
        for row in read:  # they are written before their round's
            if has_failed(row):
                of_round = failures.setdefault(row["round"], {})
                of_round[row["client"]] = f"{called(row)}: {row['status']}"
        for row in new:
            rounds[row["round"]] = row
            print(describe(row, run.config.num_server_rounds))
            failed = sorted(failures.pop(row["round"], {}).items())
            for _, failure in failed[:_FAILURES_SHOWN]:
                print(f"  {printable(failure)}")
            if len(failed) > _FAILURES_SHOWN:
                print(f"  and {len(failed) - _FAILURES_SHOWN} more")
        print(end="", flush=True)
        if is_over:
            return
        yield max(rounds, default=0)
