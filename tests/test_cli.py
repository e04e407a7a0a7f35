"""The command pfedgpa; a small script plays flwr where one is needed."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
from typer.testing import CliRunner

from pfedgpa_app import cli
from pfedgpa_app.config import Config
from pfedgpa_app.report import Run, RunFolder

# What flwr run does, as far as the comparison can see: it reads the settings and leaves a folder.
FAKE_FLWR = f"""#!{sys.executable}
import json, sys, tomllib
from pathlib import Path
from pfedgpa_app.config import Config, flatten

arguments = sys.argv[1:]
assert arguments[:3] == ["run", ".", "--stream"], arguments
options = dict(zip(arguments[3::2], arguments[4::2], strict=True))
settings = tomllib.loads(Path(options["--run-config"]).read_text())
config = Config.from_flat(dict(flatten(settings)))
nodes = int(options["--federation-config"].split()[0].removeprefix("num-supernodes="))
folder = config.output_path / "new"
folder.mkdir()
(folder / "config.json").write_text(json.dumps(config.to_flat()))
print("INFO : Starting Flower Simulation")
with (folder / "metrics.jsonl").open("w") as metrics:
    for number in range(1, config.num_server_rounds + 1):
        row = {{"round": number, "personalized-accuracy": 0.75, "num-nodes": nodes}}
        print(json.dumps(row), file=metrics)
        print("INFO : Round", number, "personalized 0.7500")
"""


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner()


@pytest.fixture
def no_flwr(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> NoReturn:
        pytest.fail(f"started {args}")

    monkeypatch.setattr(subprocess, "Popen", refuse)


def play_flwr(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    command = folder / "flwr"
    command.write_text(script)
    command.chmod(0o755)
    monkeypatch.setattr(cli, "_flwr", lambda: str(command))


def finish_run(path: Path, config: Config, accuracy: float, num_nodes: int = 10) -> None:
    folder = RunFolder(path, config)
    for number in range(1, config.num_server_rounds + 1):
        row: dict[str, Any] = {"round": number, "num-nodes": num_nodes}
        folder.add_round(
            row | {"personalized-accuracy": accuracy, "finetuned-accuracy": accuracy / 2}, []
        )


def test_right_settings_are_listed_where_they_differ_from_the_defaults(
    runner: CliRunner, tmp_path: Path
):
    file = tmp_path / "settings.toml"
    file.write_text('seed = 1\n[data]\ndataset = "digits"\n[diffusion]\nfidelity = 0.5\n')
    result = runner.invoke(cli.app, ["config", "check", str(file)])
    assert result.exit_code == 0
    first, *rest = result.stdout.splitlines()
    assert first == "The configuration is right; 2 setting(s) differ from the defaults."
    assert rest == ["  seed = 1", "  diffusion.fidelity = 0.5"]


def test_overrides_win_over_the_file(runner: CliRunner, tmp_path: Path):
    file = tmp_path / "settings.toml"
    file.write_text("seed = 1\n[client]\nlocal-epochs = 2\n")
    overrides = ["-c", "client.local-epochs=3", "--config", 'strategy="local"']
    result = runner.invoke(cli.app, ["config", "check", str(file), *overrides])
    assert result.exit_code == 0
    assert result.stdout.splitlines()[1:] == [
        "  strategy = 'local'",
        "  seed = 1",
        "  client.local-epochs = 3",
    ]


def test_wrong_settings_are_all_named(runner: CliRunner):
    result = runner.invoke(cli.app, ["config", "check", "-c", "sed=1", "-c", "diffusion.start=0"])
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "The configuration has 2 problem(s):",
        "  - sed = 1: no such setting, did you mean seed?",
        "  - diffusion.start = 0: should be greater than or equal to 1",
    ]


@pytest.mark.parametrize("override", ["strategy=local", "seed", "seed=1 2"])
def test_an_override_that_is_not_toml_is_refused_with_an_example(runner: CliRunner, override: str):
    result = runner.invoke(cli.app, ["config", "check", "-c", override])
    assert result.exit_code == 1
    assert result.stderr.startswith("not TOML: ")
    assert 'right would be, for example, strategy="local" or seed=1' in result.stderr


@pytest.mark.parametrize("content", [b"[data\n", b"strategy = 'caf\xe9'\n"], ids=["toml", "utf-8"])
def test_a_file_that_is_not_toml_is_refused(runner: CliRunner, tmp_path: Path, content: bytes):
    file = tmp_path / "settings.toml"
    file.write_bytes(content)
    result = runner.invoke(cli.app, ["config", "check", str(file)])
    assert result.exit_code == 1
    assert result.stderr.startswith("not TOML: ")


def test_a_file_that_is_not_there_is_named(runner: CliRunner, tmp_path: Path):
    result = runner.invoke(cli.app, ["config", "check", str(tmp_path / "none.toml")])
    assert result.exit_code == 1
    assert "none.toml" in result.stderr


def test_an_empty_folder_has_no_runs(runner: CliRunner, tmp_path: Path):
    result = runner.invoke(cli.app, ["runs", "--output-dir", str(tmp_path)])
    assert result.exit_code == 0
    assert result.stdout == f"No runs in {tmp_path}\n"


def test_runs_are_listed_with_their_last_accuracy(runner: CliRunner, tmp_path: Path):
    finish_run(tmp_path / "111", Config(strategy="local", num_server_rounds=2, seed=5), 0.625)
    RunFolder(tmp_path / "222", Config())
    result = runner.invoke(cli.app, ["runs", "--output-dir", str(tmp_path)])
    assert result.exit_code == 0
    assert f"Runs in {tmp_path}" in result.stdout
    cells = {
        row[0]: row[1:]
        for line in result.stdout.splitlines()
        if len(row := [cell.strip() for cell in line.strip("│").split("│")]) == 7
    }
    assert cells == {
        "111": ["local", "digits", "5", "2/2", "0.6250", "0.3125"],
        "222": ["pfedgpa", "digits", "0", "0/10", "-", "-"],
    }


@pytest.mark.usefixtures("no_flwr")
def test_finished_runs_are_compared_without_running_them_again(runner: CliRunner, tmp_path: Path):
    for strategy, seed, accuracy in [
        ("local", 0, 0.5),
        ("local", 1, 0.75),
        ("fedavg", 0, 0.25),
        ("fedavg", 1, 0.25),
    ]:
        config = Config(strategy=strategy, seed=seed, num_server_rounds=2)
        finish_run(tmp_path / f"{strategy}-{seed}", config, accuracy)
    figure = tmp_path / "accuracy.png"
    settings = ["-c", "num-server-rounds=2", "-c", f'output-dir="{tmp_path}"']
    chosen = ["--strategies", "local,fedavg", "--seeds", "0,1", "--figure", str(figure)]
    result = runner.invoke(cli.app, ["compare", *settings, *chosen])
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[:4] == [
        f"[1/4] local, seed 0: found {tmp_path / 'local-0'}",
        f"[2/4] local, seed 1: found {tmp_path / 'local-1'}",
        f"[3/4] fedavg, seed 0: found {tmp_path / 'fedavg-0'}",
        f"[4/4] fedavg, seed 1: found {tmp_path / 'fedavg-1'}",
    ]
    # The deviation of two numbers is their distance over the root of two.
    assert lines[5:] == [
        "| strategy | seeds | rounds | personalized | after local training |",
        "| --- | --- | --- | --- | --- |",
        "| local | 2 | 2 | 0.6250 ± 0.1768 | 0.3125 ± 0.0884 |",
        "| fedavg | 2 | 2 | 0.2500 ± 0.0000 | 0.1250 ± 0.0000 |",
        f"Figure: {figure}",
    ]
    assert figure.stat().st_size > 0


@pytest.mark.usefixtures("no_flwr")
def test_the_newest_of_equal_runs_is_taken(runner: CliRunner, tmp_path: Path):
    for name, time, accuracy in [("b", 1, 0.5), ("a", 2, 0.75)]:
        finish_run(tmp_path / name, Config(strategy="local"), accuracy)
        os.utime(tmp_path / name / "config.json", (time, time))
    options = ["--strategies", "local", "--seeds", "0", "-c", f'output-dir="{tmp_path}"']
    result = runner.invoke(cli.app, ["compare", *options])
    assert "| local | 1 | 10 | 0.7500 ± 0.0000 | 0.3750 ± 0.0000 |" in result.stdout


@pytest.mark.parametrize("folder_name", ["runs", "the user's runs"])
def test_what_is_missing_is_run_and_found_the_next_time(
    runner: CliRunner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder_name: str
):
    """A run of other settings, of another number of clients or without its last round is none."""
    folder = tmp_path / folder_name
    finish_run(folder / "eight-clients", Config(strategy="local", seed=1), 0.1, num_nodes=8)
    finish_run(folder / "other-seed", Config(strategy="local", seed=2), 0.1)
    RunFolder(folder / "interrupted", Config(strategy="local", seed=1))
    play_flwr(monkeypatch, tmp_path, FAKE_FLWR)
    command = ["compare", "--strategies", "local", "--seeds", "1"]
    command += ["-c", f'output-dir="{folder}"']
    result = runner.invoke(cli.app, command)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "[1/1] local, seed 1: running"
    assert lines[1] == "  Round 1 personalized 0.7500"
    assert "Starting Flower" not in result.stdout
    assert lines[-1] == "| local | 1 | 10 | 0.7500 ± 0.0000 | - |"
    written = Run.read(folder / "new")
    assert written.is_of(Config(strategy="local", seed=1))
    assert written.num_nodes == 10

    play_flwr(monkeypatch, tmp_path, "#!/bin/sh\nexit 1\n")
    again = runner.invoke(cli.app, command)
    assert again.exit_code == 0
    assert again.stdout.splitlines()[0].endswith(f"found {folder / 'new'}")


def test_a_failed_run_ends_the_comparison_with_the_end_of_its_log(
    runner: CliRunner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    script = "#!/bin/sh\nfor i in $(seq 100); do echo line $i; done\necho no room >&2\nexit 3\n"
    play_flwr(monkeypatch, tmp_path, script)
    options = ["--strategies", "local", "--seeds", "0", "-c", f'output-dir="{tmp_path / "runs"}"']
    result = runner.invoke(cli.app, ["compare", *options])
    assert result.exit_code == 1
    assert "flwr run did not finish the run. The end of its log:\n" in result.stderr
    assert result.stderr.rstrip().endswith("line 100\nno room")
    assert "line 1\n" not in result.stderr
    assert "| strategy |" not in result.stdout


@pytest.mark.usefixtures("no_flwr")
@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--strategies", "local,fedprox"], 'strategy = "fedprox"'),
        (["--seeds", "0,-1"], "seed = -1"),
        (["--seeds", "0,x"], "not TOML"),
    ],
)
def test_wrong_settings_end_a_comparison_before_anything_runs(
    runner: CliRunner, options: list[str], named: str
):
    result = runner.invoke(cli.app, ["compare", *options])
    assert result.exit_code == 1
    assert named in result.stderr
    assert result.stdout == ""


def test_a_simulation_has_two_clients_at_least(runner: CliRunner):
    assert runner.invoke(cli.app, ["compare", "--clients", "1"]).exit_code == 2
