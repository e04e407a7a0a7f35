"""The bench by `flwr run`; a small script plays flwr."""

import json
import signal
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pfedgpa_app.config import Config
from pfedgpa_app.report import Run
from server_app import superlink
from server_app.cli import app

# What flwr run does, as far as the bench can see: it reads the settings and leaves a folder.
FAKE_FLWR = f"""#!{sys.executable}
import json, sys, tomllib
from pathlib import Path
from pfedgpa_app.config import Config, flatten

arguments = sys.argv[1:]
assert arguments[:4] == ["run", ".", "local", "--stream"], arguments
options = dict(zip(arguments[4::2], arguments[5::2], strict=True))
settings = tomllib.loads(Path(options["--run-config"]).read_text())
config = Config.from_flat(dict(flatten(settings)))
nodes = int(options["--federation-config"].split()[0].removeprefix("num-supernodes="))
folder = config.output_path / f"100{{config.seed}}"
folder.mkdir(parents=True)
(folder / "config.json").write_text(json.dumps(config.to_flat()))
print("INFO : Starting Flower Simulation")
print("Successfully started run", folder.name)
with (folder / "metrics.jsonl").open("w") as metrics, (folder / "clients.jsonl").open("w") as rows:
    for number in range(1, config.num_server_rounds + 1):
        row = {{"round": number, "personalized-accuracy": 0.75, "num-nodes": nodes}}
        row |= {{"num-clients": nodes, "num-failures": 0}}
        print(json.dumps(row | {{"seconds-round": 1.5}}), file=metrics)
        for client in range(nodes):
            row = {{"round": number, "client": client, "personalized-accuracy": client / 4}}
            print(json.dumps(row), file=rows)
        print("INFO : Round", number, "personalized 0.7500")
"""

SUITE = """
title = "One strategy"
clients = 3
seeds = [0, 1]
[settings]
num-server-rounds = 2
[rows.local]
strategy = "local"
"""


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "the user's data"))
    file = tmp_path / "suite.toml"
    file.write_text(SUITE)
    return file


def play_flwr(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    command = folder / "flwr"
    command.write_text(script)
    command.chmod(0o755)
    monkeypatch.setattr(superlink, "PROGRAM", str(command))


def bench(suite: Path, *arguments: str):
    command = ["bench", str(suite), "--superlink", "local", "--results", str(suite.parent / "out")]
    return CliRunner().invoke(app, [*command, *arguments])


def test_runs_are_simulated_with_as_many_clients_and_not_run_again(
    suite: Path, monkeypatch: pytest.MonkeyPatch
):
    play_flwr(monkeypatch, suite.parent, FAKE_FLWR)
    result = bench(suite)
    assert result.exit_code == 0, result.output
    assert "2 runs, 0 finished before, 2 to go, 1 at a time" in result.output
    assert "  Round 1 personalized 0.7500" in result.output
    assert "Starting Flower" not in result.output
    assert "[2/2] local, seed 1: 0.2500 in the last round, 3 s; 0:00:00 left" in result.output
    # The mean over 3 clients of 0, 1/4 and 2/4.
    assert "local  0.2500 ± 0.0000" in result.output
    written = Run.read(Config().output_path / "1001")
    assert written.is_of(Config(strategy="local", seed=1, num_server_rounds=2))
    play_flwr(monkeypatch, suite.parent, "#!/bin/sh\nexit 1\n")
    again = bench(suite)
    assert again.exit_code == 0
    assert "2 finished before, 0 to go" in again.output


def test_sites_are_on_no_simulation(suite: Path):
    suite.write_text(
        SUITE + 'data.dataset = "sites"\ndata.shape = "1x8x8"\ndata.num-classes = 10\n'
    )
    result = bench(suite)
    assert result.exit_code == 1
    assert 'data.dataset = "sites" needs sites; right would be --superlink' in result.stderr


def test_a_run_that_ends_before_its_last_round_is_none(
    suite: Path, monkeypatch: pytest.MonkeyPatch
):
    cut_off = FAKE_FLWR.replace("config.num_server_rounds + 1", "config.num_server_rounds")
    play_flwr(monkeypatch, suite.parent, cut_off)
    result = bench(suite, "--seeds", "0")
    assert result.exit_code == 1
    assert "flwr run did not finish the run" in result.stderr


def test_another_run_of_the_same_settings_is_not_taken_for_it(
    suite: Path, monkeypatch: pytest.MonkeyPatch
):
    """As when two benches share a SuperLink, or somebody else's run ends first."""
    others = FAKE_FLWR.replace('started run", folder.name', 'started run", 4711')
    play_flwr(monkeypatch, suite.parent, others)
    result = bench(suite, "--seeds", "0")
    assert result.exit_code == 1
    assert (Config().output_path / "1000" / "metrics.jsonl").exists()
    assert "flwr run did not finish the run 4711: " in result.stderr
    assert f"{Config().output_path}/4711 is not the folder of a run" in result.stderr


def test_waiting_for_sites_is_told_and_a_missing_flwr_ends_no_bench(
    suite: Path, monkeypatch: pytest.MonkeyPatch
):
    script = "#!/bin/sh\necho 'INFO :      Waiting for nodes to connect: 1 connected'\nexit 1\n"
    play_flwr(monkeypatch, suite.parent, script)
    assert "  Waiting for nodes to connect: 1 connected" in bench(suite).stdout
    monkeypatch.setattr(superlink, "PROGRAM", str(suite.parent / "none"))
    result = bench(suite)
    assert result.exit_code == 1
    assert "2 of 2 runs failed" in result.stderr
    assert "No such file" in result.stderr


def test_a_failed_run_is_told_with_the_end_of_its_log_and_the_others_go_on(
    suite: Path, monkeypatch: pytest.MonkeyPatch
):
    script = "#!/bin/sh\nfor i in $(seq 100); do echo line $i; done\necho no room >&2\nexit 3\n"
    play_flwr(monkeypatch, suite.parent, script)
    result = bench(suite)
    assert result.exit_code == 1
    assert result.stderr.count("flwr run did not finish the run. The end of its log:\n") == 2
    assert "line 100\nno room" in result.stderr
    assert "line 1\n" not in result.stderr
    assert "2 of 2 runs failed" in result.stderr


def test_an_interrupted_bench_stops_its_run(suite: Path, monkeypatch: pytest.MonkeyPatch):
    called = suite.parent / "called"
    script = (
        f'#!/bin/sh\necho "$@" >> {called}\n'
        "if [ $1 = run ]; then echo Successfully started run 4711; sleep 2; kill -INT $PPID; fi\n"
    )
    play_flwr(monkeypatch, suite.parent, script)
    # Processes that a shell starts in the background ignore interrupts, and this may be one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = bench(suite)
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.exit_code != 0
    assert "Stopping run 4711" in result.stderr
    assert called.read_text().splitlines()[1:] == ["stop 4711 local"]


def test_settings_reach_the_app_as_they_are(suite: Path, monkeypatch: pytest.MonkeyPatch):
    suite.write_text(SUITE + "data.class-names = 'a \"b\", c'\ndiffusion.fidelity = 0.25\n")
    play_flwr(monkeypatch, suite.parent, FAKE_FLWR)
    result = bench(suite, "--seeds", "0")
    # Ten classes have ten names.
    assert "has 2 names for 10 classes" in result.stderr
    names = "'" + ",".join(f'a "{number}"' for number in range(10)) + "'"
    suite.write_text(SUITE + f"data.class-names = {names}\ndiffusion.fidelity = 0.25\n")
    assert bench(suite, "--seeds", "0").exit_code == 0
    written = json.loads((Config().output_path / "1000" / "config.json").read_text())
    assert written["data.class-names"] == names.strip("'")
    assert written["diffusion.fidelity"] == 0.25
