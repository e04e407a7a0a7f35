"""Tuned columns: settings that are chosen on other seeds than those of the tables."""

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server_app.bench import BenchRun
from server_app.cli import app
from server_app.suites import Suite, SuiteError
from server_app.tuning import search, with_tuned

PROJECT = Path(__file__).parents[1]
TUNED = """
title = "Two rivals"
clients = 2
seeds = [0]

[settings]
num-server-rounds = 1
data.train-samples = 10
data.test-samples = 10
client.local-epochs = 1

[rows.fedavg]
strategy = "fedavg"

[rows.ditto]
strategy = "ditto"

[tune]
seeds = [100, 101]

[tune.grid]
client.learning-rate = [0.01, 0.1]
client.momentum = [0.5, 0.9]

[tune.rows.ditto]
ditto.penalty = [0.5, 2.0]
"""


def read(folder: Path, text: str = TUNED) -> Suite:
    file = folder / "suite.toml"
    file.write_text(text)
    return Suite.read(file)


def accuracy(run: BenchRun) -> float:
    """Return an accuracy that is best at 0.1, 0.5 and 2 on average, and misleads on one seed."""
    client, misleads = run.config.client, run.config.seed == 101
    best = 0.1 * (client.learning_rate == 0.1) + 0.05 * (client.momentum == 0.5)
    if run.config.strategy == "ditto":
        best += 0.02 * run.config.ditto.penalty
    return 0.5 + best - 0.04 * (misleads and client.momentum == 0.5)


def write(run: BenchRun, folder: Path) -> None:
    file = run.file(folder)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"accuracies": [{"0": accuracy(run)}]}))


def test_the_best_of_the_mean_over_the_tuning_seeds_is_chosen_in_two_steps(tmp_path: Path):
    suite, steps = read(tmp_path), []

    def execute(runs: list[BenchRun]) -> None:
        steps.append(runs)
        for run in runs:
            write(run, tmp_path)

    found = search(suite, tmp_path, execute)
    common = {"client.learning-rate": 0.1, "client.momentum": 0.5}
    assert found == {("", "fedavg"): common, ("", "ditto"): common | {"ditto.penalty": 2.0}}
    assert [len(runs) for runs in steps] == [2 * 4 * 2, 2 * 2]
    assert {run.config.seed for runs in steps for run in runs} == {100, 101}
    for run in steps[1]:  # at the best point of the first step
        assert (run.config.client.learning_rate, run.config.client.momentum) == (0.1, 0.5)

    tuned = with_tuned(suite, found)
    assert list(tuned.columns) == ["as published", "tuned"]
    rates = {
        (run.case, run.row): (run.config.client.learning_rate, run.config.ditto.penalty)
        for run in tuned.runs()
    }
    assert rates == {
        ("as published", "fedavg"): (0.03, 1.0),
        ("as published", "ditto"): (0.03, 1.0),
        ("tuned", "fedavg"): (0.1, 1.0),
        ("tuned", "ditto"): (0.1, 2.0),
    }


def test_a_point_with_a_failed_run_is_not_chosen(tmp_path: Path):
    def execute(runs: list[BenchRun]) -> None:
        for run in runs:
            if not (run.config.client.learning_rate == 0.1 and run.config.seed == 100):
                write(run, tmp_path)

    found = search(read(tmp_path), tmp_path, execute)
    assert found["", "fedavg"] == {"client.learning-rate": 0.01, "client.momentum": 0.5}
    with pytest.raises(SuiteError, match="fedavg: all runs of its tuning failed"):
        search(read(tmp_path), tmp_path / "empty", lambda runs: None)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[100, 101]", "[0, 100]", r"tune.seeds has \[0\]"),
        ("tune.rows.ditto", "tune.rows.other", r"tune.rows has unknown \['other'\]"),
        ("[0.5, 2.0]", "2.0", "tune has ditto.penalty = 2.0; right would be a list"),
        ("ditto.penalty = [", "seed = [", "tune has seed"),
    ],
)
def test_a_wrong_search_is_refused(old: str, new: str, message: str, tmp_path: Path):
    with pytest.raises(SuiteError, match=message):
        read(tmp_path, TUNED.replace(old, new))


def test_a_bench_prints_both_columns_and_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(PROJECT)
    file = tmp_path / "suite.toml"
    file.write_text(TUNED + "[quick]\nseeds = [1]\n")
    command = ["bench", str(file), "--tuned", "--quick", "--processes", "0"]
    result = CliRunner().invoke(app, [*command, "--results", str(tmp_path / "results")])
    assert result.exit_code == 0, result.output
    assert "Two rivals (quick), tuning: 4 runs" in result.output
    with (tmp_path / "results" / "suite-quick-tuned.csv").open() as stream:
        cells = {(c["table"], c["row"], c["column"]): c for c in csv.DictReader(stream)}
    title = "Two rivals (quick)"
    for row in ("fedavg", "ditto"):
        assert 0 < float(cells[title, row, "as published"]["mean"]) <= 1
        assert cells[f"{title}: settings", row, "tuned"]["text"].startswith("client.learning-rate")
    file.write_text(TUNED.partition("[tune]")[0])
    result = CliRunner().invoke(app, command[:3])
    assert result.exit_code == 1
    assert "there is no [tune] section; right would be" in result.output
