"""The commands that run the app: ``pfedgpa demo`` and ``pfedgpa run``."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import typer

from pfedgpa_app.cli import app
from pfedgpa_app.config import SITES, Config
from pfedgpa_app.console import fail, terminable
from pfedgpa_app.report import BASELINES, REPORT, Run, baselines_of
from pfedgpa_app.rounds import READING
from pfedgpa_app.section import NUM_SEEDS
from server_app.commands_config import Pairs, SettingsFile, checked, defaults_here
from server_app.own_superlink import NAME, SuperLinkError, own_superlink
from server_app.superlink import flwr_run

_CLIENTS = 10


@app.command()
def demo(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of training.")] = 10,
    seed: Annotated[int, typer.Option(min=0, max=NUM_SEEDS - 1, help="Random seed.")] = 0,
) -> None:
    """Do the README's first run, ten clients with digits, without Flower's servers.

    Settings, results and the run's folder are those of `flwr run`.
    """
    print(f"Ten clients train on scikit-learn's digits. {READING}. A line a round:", flush=True)
    # Imported here, since they import torch and Flower.
    from server_app.bench import num_processes
    from server_app.simulation import run_app

    config = Config(num_server_rounds=rounds, seed=seed)
    with terminable(), _only_rounds():
        folder = run_app(config, _CLIENTS, min(_CLIENTS, num_processes()))
    name = Run.read(folder).name
    print(f"The page of this run: {folder / REPORT}\nNext:")
    print(f"  pfedgpa runs show {name}")
    print(f"  pfedgpa export {name} --client 3 -o model.safetensors")
    print("  pfedgpa predict model.safetensors --test-set")


@app.command()
def run(
    file: SettingsFile = None,
    config: Pairs = None,
    clients: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"Simulated clients; {_CLIENTS}, or the SuperNodes of --superlink."
        ),
    ] = None,
    superlink: Annotated[
        str, typer.Option(help="A SuperLink of flwr's configuration; by default a temporary one.")
    ] = "",
    with_baselines: Annotated[
        bool,
        typer.Option(
            "--with-baselines",
            help="First run local training and FedAvg to compare with, unless that was done.",
        ),
    ] = False,
) -> None:
    """Check settings, run the app by `flwr run`, and report how it ended.

    Type it in the project's folder. The exit code is 0 if the run is complete, and 1 otherwise,
    with the reason in the last line. An interrupt stops the run.
    """
    if defaults_here() is None:
        fail(
            f"{Path.cwd()}: has no pyproject.toml of this app; right would be the project's folder"
        )
    if not superlink and clients is None:
        clients = _CLIENTS
    settings = checked(file, config or [], clients)
    if not superlink and settings.data.dataset == SITES:
        fail(f'data.dataset = "{SITES}" needs sites; right would be --superlink NAME')
    todo = []
    if with_baselines:
        done = (settings.strategy, *baselines_of(settings, settings.output_path, clients))
        todo = [
            settings.model_copy(update={"strategy": name, "resume_from": ""})
            for name in BASELINES
            if name not in done
        ]
    with terminable():
        try:
            with nullcontext(os.environ) if superlink else own_superlink() as env:
                for each in (*todo, settings):
                    if with_baselines:
                        print(f"{each.strategy}:", flush=True)
                    flower_run = flwr_run(each, superlink or NAME, clients, env=env, show=_shown)
                    if problem := flower_run.problem(superlink or NAME, env):
                        break
        except (SuperLinkError, OSError) as error:
            fail(str(error))
    page = Path(flower_run.folder) / REPORT
    if flower_run.folder and page.is_file():
        print(f"The page of this run: {page}")
    elif flower_run.folder:
        print(f"The folder of this run, on its ServerApp's machine: {flower_run.folder}")
    if problem:
        fail(problem)


def _shown(level: str, text: str) -> str:
    """Return what to print of a log line that is not of a round."""
    is_begin = text == READING or (text.startswith("Run ") and " begins: " in text)
    return text if is_begin or (level == "WARNING" and "flwr" not in text) else ""


@contextmanager
def _only_rounds() -> Iterator[None]:
    """Print only rounds and warnings of Flower's log."""

    def is_shown(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or record.getMessage().startswith("Round ")

    logger, handler = logging.getLogger("flwr"), logging.StreamHandler(sys.stdout)
    handler.addFilter(is_shown)
    before, logger.handlers = logger.handlers, [handler]
    try:
        yield
    finally:
        logger.handlers = before
