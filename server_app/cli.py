"""The command ``pfedgpa`` as it is installed: what the app has, and the bench."""

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pfedgpa_app.cli import app, fail
from server_app.superlink import run_on_flower

if TYPE_CHECKING:
    from server_app.bench import BenchRun


@app.command()
def bench(
    file: Annotated[Path, typer.Argument(help="A suite, as those of conf/suites.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="Only show that it works, in minutes.")
    ] = False,
    seeds: Annotated[str, typer.Option(help="Comma-separated, instead of the suite's.")] = "",
    rows: Annotated[str, typer.Option(help="Only rows whose names begin so.")] = "",
    cases: Annotated[str, typer.Option(help="Only cases whose names begin so.")] = "",
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
) -> None:
    """Run a suite of strategies, seeds and settings, and print its tables.

    What an earlier call finished is not run again. Run it in the project's folder.
    """
    # They import torch and Flower, which other commands are spared.
    from rich.progress import Progress, TimeElapsedColumn, TimeRemainingColumn

    from pfedgpa_app.tables import CSV_HEAD
    from server_app.bench import Suite, SuiteError, draw, execute, num_processes, tables

    sys.path.append(os.getcwd())  # where own modules are, as `flwr run` packs it
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, (os.environ.get("PYTHONPATH"), os.getcwd()))
    )
    try:
        suite = Suite.read(file, quick=quick)
        changed = {
            "seeds": [int(seed) for seed in seeds.split(",")] if seeds else suite.seeds,
            "rows": {name: each for name, each in suite.rows.items() if name.startswith(rows)},
            "cases": {name: each for name, each in suite.cases.items() if name.startswith(cases)},
        }
        suite = suite.model_copy(update=changed)
        runs = suite.runs()
    except (SuiteError, ValueError) as error:
        fail(str(error) if str(file) in str(error) else f"{file}: {error}")
    if not runs:
        fail(f"{file} has no row and case whose names begin so")
    folder = results or Path("build/bench") / (file.stem + ("-quick" if quick else ""))
    folder.mkdir(parents=True, exist_ok=True)
    pending = list({run.file(folder): run for run in runs if not run.result(folder)}.values())
    at_a_time = num_processes() if processes < 0 else processes
    print(
        f"{suite.title}: {len(runs)} runs, {len(runs) - len(pending)} finished before, "
        f"{len(pending)} to go, {superlink or at_a_time or 1} at a time; results in {folder}",
        flush=True,
    )
    failed: dict[str, str] = {}
    columns = (*Progress.get_default_columns()[:3], TimeElapsedColumn(), TimeRemainingColumn())
    # A progress bar would hide the prompt of a debugger.
    with Progress(*columns, disable=not processes, speed_estimate_period=86400) as progress:
        task = progress.add_task("runs", total=len(pending))

        def advance(run: "BenchRun") -> None:
            progress.advance(task)
            print(run.outcome(folder), flush=True)

        if superlink:
            for run in pending:
                failed |= _on(superlink, run, folder)
                advance(run)
        else:
            failed = execute(pending, folder, at_a_time, advance)
    command = shlex.join(["pfedgpa", "bench", *sys.argv[2:]])
    formats = {"txt": "text", "md": "markdown", "tex": "latex", "csv": "csv"}
    found = tables(suite, runs, folder, command)
    for suffix, form in formats.items():
        head, between = (CSV_HEAD, "") if form == "csv" else ("", "\n")
        written = head + between.join(getattr(table, form)() for table in found)
        (folder / f"table.{suffix}").write_text(written)
    draw(suite, runs, folder)
    print("\n" + "\n".join(table.text() for table in found))
    print(f"Tables and figure: {folder}/table.{{{','.join(formats)}}}, {folder}/figure.png")
    if failed:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in failed.items())
        fail(
            f"{len(failed)} of {len(pending)} runs failed; call it again to repeat them:\n{reasons}"
        )


def _on(superlink: str, run: "BenchRun", folder: Path) -> dict[str, str]:
    """Do a run on a SuperLink and write its result; return why it failed, by its name."""
    try:
        finished = run_on_flower(run.config, run.clients, superlink)
        accuracies: dict[int, dict[int, float]] = {}
        for row in finished.clients:
            if "personalized-accuracy" in row:
                accuracies.setdefault(row["round"], {})[row["client"]] = row[
                    "personalized-accuracy"
                ]
        if finished.num_nodes != run.clients:
            return {run.name: f"{finished.num_nodes} SuperNodes; right would be {run.clients}"}
        seconds = sum(row["seconds-round"] for row in finished.metrics)
        run.write(folder, finished.metrics, accuracies, seconds)
    except typer.Exit:
        return {run.name: "see its log above"}
    except FloatingPointError as error:
        return {run.name: str(error)}
    return {}
