"""The commands that run the app: ``pfedgpa demo``."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from pfedgpa_app.cli import app
from pfedgpa_app.config import Config
from pfedgpa_app.console import terminable
from pfedgpa_app.report import REPORT, Run
from pfedgpa_app.section import NUM_SEEDS

_DEMO_CLIENTS = 10


@app.command()
def demo(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of training.")] = 10,
    seed: Annotated[int, typer.Option(min=0, max=NUM_SEEDS - 1, help="Of all that is drawn.")] = 0,
) -> None:
    """Do the README's first run, ten clients with digits, in seconds: without Flower's servers.

    Settings, results and the run's folder are those of `flwr run`.
    """
    print("Ten clients train on scikit-learn's digits; a line a round:", flush=True)
    # They import torch and Flower, which other commands are spared.
    from server_app.bench import num_processes
    from server_app.simulation import run_app

    config = Config(num_server_rounds=rounds, seed=seed)
    with terminable(), _rounds_alone():
        folder = run_app(config, _DEMO_CLIENTS, min(_DEMO_CLIENTS, num_processes()))
    name = Run.read(folder).name
    print(f"The page of this run: {folder / REPORT}\nNext:")
    print(f"  pfedgpa runs show {name}")
    print(f"  pfedgpa export {name} --client 3 -o model.safetensors")
    print("  pfedgpa predict model.safetensors --test-set")


@contextmanager
def _rounds_alone() -> Iterator[None]:
    """Print of Flower's log the lines of rounds, and warnings, as they are."""

    def is_shown(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or record.getMessage().startswith("Round ")

    logger, handler = logging.getLogger("flwr"), logging.StreamHandler(sys.stdout)
    handler.addFilter(is_shown)
    before, logger.handlers = logger.handlers, [handler]
    try:
        yield
    finally:
        logger.handlers = before
