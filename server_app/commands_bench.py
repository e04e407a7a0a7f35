"""The command ``pfedgpa bench``."""

import json
import os
import re
import shlex
import sys
import time
from contextlib import redirect_stdout
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pfedgpa_app.cli import app
from pfedgpa_app.config import SITES
from pfedgpa_app.console import Json, fail, terminable, whole_numbers
from pfedgpa_app.files import composed, count_of, native_path, quoted, text_of
from pfedgpa_app.rounds import RowError, value_of
from pfedgpa_app.section import NUM_SEEDS
from pfedgpa_app.state import writing
from server_app.superlink import run_on_flower

if TYPE_CHECKING:
    from server_app.bench import BenchRun
    from server_app.suites import Suite


@app.command()
def bench(
    context: typer.Context,
    files: Annotated[list[Path], typer.Argument(help="Suites, as those of conf/suites.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="Only show that it works, in minutes.")
    ] = False,
    seeds: Annotated[
        str | None, typer.Option(help="Comma-separated, instead of the suite's.")
    ] = None,
    rows: Annotated[
        list[str] | None,
        typer.Option(help="Only this row, or those with this prefix; may be repeated."),
    ] = None,
    cases: Annotated[
        list[str] | None,
        typer.Option(help="Only this case, or those with this prefix; may be repeated."),
    ] = None,
    processes: Annotated[
        int,
        typer.Option(min=-1, help="Runs at a time; 0: here, for a debugger; -1: as many as fit."),
    ] = -1,
    superlink: Annotated[
        str,
        typer.Option(
            help="Run by `flwr run . NAME` instead, one after the other; the folder of the runs "
            "must be one that this machine sees. `local` is Flower's own simulation."
        ),
    ] = "",
    results: Annotated[
        Path | None, typer.Option(help="Folder of the results; build/bench/<suite> by default.")
    ] = None,
    tuned: Annotated[
        bool,
        typer.Option("--tuned", help=r"Also with the best settings of each row, by \[tune]."),
    ] = False,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Run again what is finished, as after a change of code."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Run suites of strategies, seeds and settings, and print their tables.

    Finished runs with the same settings are not run again. Run it in the project's folder.
    """
    # Imported here, since they import torch and Flower.
    from pfedgpa_app.preflight import ENGINE_ON_FLOWER
    from server_app.suites import Suite, SuiteError
    from server_app.tuning import search, with_tuned

    output = sys.stdout
    if as_json:  # all other output goes to stderr
        context.with_resource(redirect_stdout(sys.stderr))
    sys.path.insert(0, os.getcwd())  # for own modules, as `flwr run` packs it
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, (os.environ.get("PYTHONPATH"), os.getcwd()))
    )
    indexes: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    total = 0
    for file in files:
        folder = Path("build/bench") / (file.stem + ("-quick" if quick else ""))
        if results:
            folder = results / file.stem if len(files) > 1 else results
        run = partial(_run, folder, processes=processes, superlink=superlink, fresh=fresh)
        try:
            suite = Suite.read(file, quick=quick)
            changed = {
                "seeds": suite.seeds if seeds is None else _seeds(seeds),
                "rows": _chosen(suite.rows, rows, "row"),
                "cases": _chosen(suite.cases, cases, "case"),
            }
            suite = suite.model_copy(update=changed)
            suite.runs()  # which is wrong, is so before anything runs
            if tuned:
                found = search(suite, folder, partial(run, f"{suite.title}, tuning"))
                suite = with_tuned(suite, found)
            runs = suite.runs()
            if superlink and any(each.config.client.engine == "vmap" for each in runs):
                raise ValueError(ENGINE_ON_FLOWER)
        except (SuiteError, ValueError) as error:
            fail(str(error) if str(file) in str(error) else f"{file}: {error}")
        if superlink not in ("", "local"):
            runs = [replace(each, superlink=superlink) for each in runs]
        elif any(each.config.data.dataset == SITES for each in runs):
            fail(f'{file}: data.dataset = "{SITES}" needs sites; right would be --superlink NAME')
        failed |= run(suite.title, runs)
        total += len(runs)
        # Filters are in the name, so that calls with others do not overwrite the tables.
        filters = ("quick" if quick else "", "tuned" if tuned else "", *(cases or ()))
        parts = (file.stem, *filters, *(rows or ()), seeds or "")
        name = re.sub(r"[^\w.]+", "-", composed("-".join(filter(None, parts))))
        indexes.append(_write(suite, runs, folder, native_path(name)))
    if as_json:
        print(json.dumps(indexes if len(files) > 1 else indexes[0], indent=1), file=output)
    if failed:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in failed.items())
        num_runs = count_of(total, "run")
        fail(f"{len(failed)} of {num_runs} failed; the command repeats them:\n{reasons}")


def _run(
    folder: Path,
    title: str,
    runs: list["BenchRun"],
    *,
    processes: int,
    superlink: str,
    fresh: bool,
) -> dict[str, str]:
    """Do those runs that have no result yet, and return the reasons of those that failed."""
    from server_app.bench import execute, num_processes

    folder.mkdir(parents=True, exist_ok=True)
    for run in runs if fresh else ():
        run.file(folder).unlink(missing_ok=True)
    pending = list({run.file(folder): run for run in runs if not run.result(folder)}.values())
    at_a_time = num_processes() if processes < 0 else max(1, processes)
    print(
        f"{title}: {count_of(len(runs), 'run')}, {len(runs) - len(pending)} finished before, "
        f"{len(pending)} to go, {'1' if superlink else at_a_time} at a time; results in {folder}",
        flush=True,
    )
    failed: dict[str, str] = {}
    begin = time.monotonic()
    with terminable():
        finished: list[BenchRun] = []

        def advance(run: "BenchRun") -> None:
            finished.append(run)
            seconds = (time.monotonic() - begin) / len(finished) * (len(pending) - len(finished))
            left = f"{timedelta(seconds=round(seconds))} left"
            print(f"[{len(finished)}/{len(pending)}] {run.outcome(folder)}; {left}", flush=True)

        if not superlink:
            return execute(pending, folder, processes and at_a_time, advance)
        for run in pending:
            failed |= _on(superlink, run, folder)
            advance(run)
    return failed


def _seeds(text: str) -> list[int]:
    seeds = whole_numbers("--seeds", text, "0,1,2")
    if len(set(seeds)) < len(seeds):
        fail(f'--seeds "{text}": right would be each once')
    if max(seeds) >= NUM_SEEDS:
        fail(f'--seeds "{text}": right would be less than {NUM_SEEDS}')
    return seeds


def _chosen(named: dict[str, Any], prefixes: list[str] | None, kind: str) -> dict[str, Any]:
    """Return the entries whose names begin with one of the prefixes, in the suite's order.

    A prefix that is a whole name matches that one alone. Raises `ValueError` if a prefix is empty,
    repeated, or matches nothing.
    """
    if not prefixes:
        return named
    begins = [composed(prefix) for prefix in prefixes]
    if len(set(begins)) < len(begins):
        raise ValueError(f"--{kind}s {', '.join(begins)}: right would be each once")
    chosen: set[str] = set()
    for begin in begins:
        if not begin:
            raise ValueError(f'--{kind}s "": right would be the beginning of a {kind}\'s name')
        found = {name for name in named if composed(name).startswith(begin)}
        if not found:
            raise ValueError(
                f"no {kind} begins with {begin!r}; there are {', '.join(map(quoted, named))}"
            )
        chosen |= {name for name in found if composed(name) == begin} or found
    return {name: each for name, each in named.items() if name in chosen}


def _write(suite: "Suite", runs: list["BenchRun"], folder: Path, name: str) -> dict[str, Any]:
    """Write tables and figure, print the tables, and return their index."""
    from pfedgpa_app.tables import CSV_HEAD
    from server_app.bench_tables import draw, index_of, tables

    formats = {"txt": "text", "md": "markdown", "tex": "latex", "csv": "csv"}
    command = shlex.join(["pfedgpa", "bench", *map(text_of, sys.argv[2:])])
    found = tables(suite, runs, folder, name, command)
    with writing(folder / name):
        for suffix, form in formats.items():
            head, between = (CSV_HEAD, "") if form == "csv" else ("", "\n")
            written = head + between.join(getattr(table, form)() for table in found)
            file = folder / f"{name}.{suffix}"
            file.write_text(written, encoding="utf-8")
        index = index_of(suite, runs, folder, found)
        listed = json.dumps(index, indent=1) + "\n"
        (folder / f"{name}.json").write_text(listed, encoding="utf-8")
        draw(suite, runs, folder, folder / f"{name}.png")
    print("\n" + "\n".join(table.text() for table in found))
    print(f"Tables and figure: {folder}/{name}.{{{','.join(formats)},png,svg}}")
    print(f"A page of them: {shlex.join(['pfedgpa', 'report', str(folder)])}")
    return index


def _on(superlink: str, run: "BenchRun", folder: Path) -> dict[str, str]:
    """Do a run on a SuperLink and write its result; return its name and error if it failed."""
    try:
        finished = run_on_flower(run.config, run.clients, superlink)
        if finished.num_nodes != run.clients:
            return {run.name: f"{finished.num_nodes} SuperNodes; right would be {run.clients}"}
        seconds = sum(value_of(row, "seconds-round") for row in finished.metrics)
        run.write(folder, finished.metrics, finished.clients, seconds)
    except typer.Exit:
        return {run.name: "see its log above"}
    except (OSError, ArithmeticError, RuntimeError, RowError) as error:
        return {run.name: str(error)}
    return {}
