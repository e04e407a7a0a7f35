"""The commands ``pfedgpa runs``: list runs, show one, remove one."""

import contextlib
import json
import shutil
import stat
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal

from pfedgpa_app.config import Config
from pfedgpa_app.console import (
    Json,
    OutputDir,
    RunArgument,
    fail,
    make_app,
    make_table,
    print_table,
    read_run,
)
from pfedgpa_app.files import count_of, printable, printable_lines, text_of
from pfedgpa_app.report import Run, read_runs
from pfedgpa_app.rounds import EVALUATED, SCORES, Row, called, failures_in, value_of
from pfedgpa_app.runs import CHECKPOINT, began_at, run_folders
from pfedgpa_app.sharing import alone_in

runs_app = make_app(invoke_without_command=True, help="List runs, show one, remove one.")

_FINETUNED = "finetuned-accuracy"
_NUM_WORST = 5
_ACCURACIES = {
    EVALUATED: "personalized",
    "personalized-accuracy-worst": "worst client",
    "personalized-accuracy-std": "deviation over clients",
    "received-accuracy": "as sent for training",
    _FINETUNED: "after local training",
    **{name: what for name, what in SCORES.items() if name != EVALUATED},
    "epsilon": "epsilon spent",
}


@runs_app.callback()
def list_runs(context: typer.Context, as_json: Json = False, output_dir: OutputDir = "") -> None:
    """List the runs, oldest first, with their last accuracy."""
    if context.invoked_subcommand is not None:
        defaults = {"output_dir": output_dir, "as_json": as_json}
        context.default_map = {context.invoked_subcommand: defaults}
        return
    folder = Config(output_dir=output_dir).output_path
    found, damaged = read_runs(folder)
    for problem in damaged:
        print(f"Passed over: {printable(problem)}", file=sys.stderr)
    summaries = [_summary(run) for run in found]
    if as_json:
        print(json.dumps(summaries, indent=2))
        return
    if not found:
        print(f"No runs in {folder}")
        return
    columns = ("run", "began", "strategy", "data", "seed", "rounds", "state")
    table = make_table(*columns, "personalized", "after training")
    for run, row in zip(found, summaries, strict=True):
        accuracies = (row[EVALUATED], row[_FINETUNED])
        table.add_row(
            row["name"],
            f"{began_at(run.path).astimezone():%Y-%m-%d %H:%M}",
            *(str(row[name]) for name in ("strategy", "dataset", "seed")),
            _rounds(run),
            row["state"],
            *("-" if value is None else f"{value:.4f}" for value in accuracies),
        )
    print(f"Runs in {printable(str(folder))}")
    print_table(table)


@runs_app.command()
def show(run: RunArgument, as_json: Json = False, output_dir: OutputDir = "") -> None:
    """Show a run: its settings, how far it is, accuracies, the worst clients, failures, files."""
    found = read_run(run, output_dir)
    summary = _summary(found) | {
        "settings": found.config.changed,
        "seconds": round(sum(value_of(row, "seconds-round") for row in found.metrics), 3),
        "accuracies": {name: found.last(name) for name in _ACCURACIES},
        "worst-clients": _worst(found),
        "error": found.error,
        "ended": found.ended,
        "warnings": found.warnings,
        "sharing": alone_in(found.metrics, found.config.diffusion),
        "failures": failures_in(found.clients),
        "files": _files(found.path),
    }
    if as_json:
        print(json.dumps(summary, indent=2))
    else:
        print(printable_lines("\n".join(_described(summary))))


@runs_app.command()
def remove(
    run: RunArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    output_dir: OutputDir = "",
) -> None:
    """Remove a run and all of its files."""
    found = read_run(run, output_dir)
    path, name = found.path, found.name
    output = Config(output_dir=output_dir).output_path
    if run_folders(path) or output.resolve().is_relative_to(path.resolve()):
        fail(f"{path} is a folder of runs; right would be the name of one run")
    if found.state == "running":
        fail(f"{name} is going on; right would be to end it first, with flwr stop {path.name}")
    size = decimal(sum(_files(path).values()))
    print(f"{name} ({found.config.strategy}, {_rounds(found)} rounds, {size}): {path}")
    for other in read_runs(path.parent)[0]:
        earlier = other.config.earlier_path
        if earlier is None or (other.path / CHECKPOINT).exists():
            continue
        if path.resolve() in (earlier.resolve(), earlier.resolve().parent):
            print(f"{other.name} goes on from it and has no checkpoint of its own")
    if not yes:
        typer.confirm("Remove it?", abort=True)
    shutil.rmtree(path)
    print(f"{name} is removed")


def _summary(run: Run) -> dict[str, Any]:
    """Return the fields of a run in a list."""
    return {
        "name": run.name,
        "id": run.path.name,
        "path": text_of(str(run.path)),
        "began": began_at(run.path).isoformat(timespec="seconds"),
        "state": run.state,
        "strategy": run.config.strategy,
        "dataset": run.config.data.dataset,
        "seed": run.config.seed,
        "rounds": len(run.metrics),
        "num-server-rounds": run.config.num_server_rounds,
        EVALUATED: run.last(EVALUATED),
        _FINETUNED: run.last(_FINETUNED),
    }


def _worst(run: Run) -> list[Row]:
    """Return the clients with the lowest accuracies in the last round with an evaluation."""
    evaluated = [row for row in run.clients if EVALUATED in row]
    last = max((row["round"] for row in evaluated), default=0)
    rows = [row for row in evaluated if row["round"] == last]
    rows.sort(key=lambda row: (row[EVALUATED], row["client"]))
    names = ("client", "name", "round", EVALUATED)
    return [{name: row[name] for name in names if name in row} for row in rows[:_NUM_WORST]]


def _failed(failure: Row) -> str:
    """Write who failed, in how many rounds, and why."""
    clients, names, rounds = (failure[name] for name in ("clients", "names", "rounds"))
    who = (
        count_of(len(clients), "client")
        if len(clients) > 1
        else called({"client": clients[0], "name": "".join(names)})
    )
    number = count_of(len(rounds), "round")
    return f"{who}: {number}, the last {rounds[-1]}: {failure['reason']}"


def _files(path: Path) -> dict[str, int]:
    """Return the bytes of what is in a run's folder by name, those of a folder together."""
    sizes = Counter[str]()
    for file in path.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a run may replace files meanwhile
            status = file.stat()
            if stat.S_ISREG(status.st_mode):
                name, *below = file.relative_to(path).parts
                sizes[f"{name}/" if below else name] += status.st_size
    return dict(sorted(sizes.items()))


def _described(summary: dict[str, Any]) -> Iterator[str]:
    """Yield the lines that describe a run."""
    yield f"{summary['name']} ({summary['id']}): {summary['state']}"
    yield summary["path"]
    rounds = f"{summary['rounds']} of {count_of(summary['num-server-rounds'], 'round')}"
    took = timedelta(seconds=round(summary["seconds"]))
    yield f"{rounds} in {took} h, began {summary['began']}"
    notes = (summary["error"], summary["ended"], *summary["warnings"], summary["sharing"])
    yield from filter(None, notes)
    accuracies = {what: summary["accuracies"][name] for name, what in _ACCURACIES.items()}
    blocks = {
        "Settings that differ from the defaults": [
            f"{key} = {json.dumps(value)}" for key, value in summary["settings"].items()
        ],
        "Last accuracies": [
            f"{what}: {value:.4f}" for what, value in accuracies.items() if value is not None
        ],
        "Worst clients": [
            f"{called(row)}: {row[EVALUATED]:.4f} in round {row['round']}"
            for row in summary["worst-clients"]
        ],
        "Failures": list(map(_failed, summary["failures"])),
        "Files": [f"{name}: {decimal(size)}" for name, size in summary["files"].items()],
    }
    for title, lines in blocks.items():
        yield f"\n{title}"
        yield from (f"  {line}" for line in lines or ["none"])


def _rounds(run: Run) -> str:
    return f"{len(run.metrics)}/{run.config.num_server_rounds}"
