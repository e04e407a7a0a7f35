"""The first run without Flower's servers, and the commands that it names."""

import multiprocessing
import os
import re
import shlex
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pfedgpa_app.config import Config
from pfedgpa_app.report import Run
from pfedgpa_app.rounds import READING
from server_app import bench, simulation
from server_app.cli import app
from server_app.simulation import simulate


def test_the_demo_leaves_a_run_and_names_commands_that_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "num_processes", lambda: 2)
    result = CliRunner().invoke(app, ["demo", "--rounds", "1", "--seed", "3"])
    assert result.exit_code == 0, result.output
    first, line, page, following, *commands = result.stdout.splitlines()
    assert READING in first
    assert line.startswith("Round 1/1: personalized accuracy 0.")
    file = Path(page.removeprefix("The page of this run: "))
    assert file.name == "report.html"
    assert file.stat().st_size > 1000
    assert following == "Next:"
    for command in commands:
        program, *words = shlex.split(command)
        assert program == "pfedgpa"
        typed = CliRunner().invoke(app, words)
        assert typed.exit_code == 0, typed.output
    assert len(commands) == 3
    run, config = Run.read(file.parent), Config(num_server_rounds=1, seed=3)
    assert run.is_of(config)
    assert run.state == "complete"
    _, rows = simulate(config, 10, num_processes=0)
    accuracies = [row["personalized-accuracy"] for row in run.metrics]
    assert accuracies == [row["personalized-accuracy"] for row in rows]
    assert re.fullmatch(r"\d+", run.path.name)


def test_an_interrupted_demo_leaves_no_processes(monkeypatch: pytest.MonkeyPatch):
    pools = []

    def interrupt(grid: simulation.PoolGrid, context: object) -> None:
        pools.append(grid._pool)
        raise KeyboardInterrupt

    monkeypatch.setattr(simulation, "main", interrupt)
    monkeypatch.setattr(bench, "num_processes", lambda: 2)
    assert CliRunner().invoke(app, ["demo"]).exit_code == 130
    (pool,) = pools
    assert not any(process.is_alive() for process in pool._pool)


def test_a_process_that_is_ended_while_it_begins_ends(monkeypatch: pytest.MonkeyPatch):
    begin = simulation._begin_worker

    def ended_first(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        begin(*arguments)

    monkeypatch.setattr(simulation, "_begin_worker", ended_first)
    others = multiprocessing.active_children()
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        grid = simulation.PoolGrid(Config(), 2, 1)
        first = next(each for each in multiprocessing.active_children() if each not in others)
        first.join(30)
        grid.close()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert first.exitcode == -signal.SIGTERM
