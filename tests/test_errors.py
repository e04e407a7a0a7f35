"""What nobody expected is said in a line, and never with the values of variables."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from pfedgpa_app import cli
from pfedgpa_app.commands_runs import runs_app
from pfedgpa_app.config import Config
from pfedgpa_app.console import DEBUG
from pfedgpa_app.data import DataError, ImageStats
from pfedgpa_app.data.sources import load_dataset
from pfedgpa_app.errors import described
from pfedgpa_app.exported import ExportedModel
from server_app.cli import app
from server_app.commands_config import config_app

MODULE = """
import torch
from torch import nn

def load(root):
    raise KeyError("diagnosis")

class Failing(nn.Module):
    def __init__(self, info):
        super().__init__()
        self.head = nn.Linear(64, 4)

    def forward(self, x):
        return torch.ones(3, 5) @ torch.ones(3, 5)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Return the name of a module of the current folder, as no other test has it."""
    name = "".join(letter if letter.isalnum() else "_" for letter in request.node.name)
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return name


def own(dataset: str, model: str) -> Config:
    flat = {"data.dataset": dataset, "data.shape": "1x8x8", "data.num-classes": 4}
    return Config.from_flat({**flat, "data.partition": "iid", "model.name": model})


def predict(config: Config, *arguments: str) -> Result:
    state = {"head.weight": torch.full((4, 64), 0.12345), "head.bias": torch.zeros(4)}
    stats = ImageStats(torch.zeros(1), torch.ones(1))
    ExportedModel(state, config, 0, 1, stats, (0, 2)).save(Path("m.safetensors"))
    return CliRunner().invoke(app, ["predict", "m.safetensors", "--trust", *arguments])


def test_a_loader_that_fails_is_named_with_its_line(module: str):
    result = predict(own(f"{module}:load", f"{module}:Failing"), "--test-set")
    assert result.exit_code == 1
    assert result.stderr == (
        f"{module}:load: failed with KeyError: 'diagnosis' in load ({module}.py, line 6)\n"
    )


def test_a_model_that_fails_is_named_with_its_line(module: str):
    np.savez("images.npz", x=np.zeros((2, 1, 8, 8), np.float32))
    result = predict(own(f"{module}:load", f"{module}:Failing"), "images.npz")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(
        f'model.name = "{module}:Failing": failed with RuntimeError: mat1 and mat2'
    )
    assert line.endswith(f"in forward ({module}.py, line 14)")
    assert "0.123" not in line


def test_a_module_that_cannot_be_read_is_named(module: str, tmp_path: Path):
    (tmp_path / f"{module}_2.py").write_text("import torch\nsize = 1 / 0\n")
    with pytest.raises(DataError) as caught:
        load_dataset(own(f"{module}_2:load", "cnn-8x8").data, seed=0)
    assert str(caught.value) == (
        f"{module}_2:load: importing it failed with ZeroDivisionError: division by zero "
        f"in <module> ({module}_2.py, line 2)"
    )


def test_a_long_error_is_cut_off():
    line = described(ValueError("weights are\n" + "0.12345 " * 1000))
    assert line.startswith("ValueError: weights are 0.12345")
    assert len(line) < 600
    assert described(KeyError()) == "KeyError"


def broken(*arguments: object) -> None:
    weights = 0.12345
    raise LookupError("nobody expected it") if weights else None


@pytest.mark.parametrize("command", [["runs"], ["runs", "show", "1"], ["watch"], ["export", "1"]])
def test_an_unexpected_error_is_a_line(command: list[str], monkeypatch: pytest.MonkeyPatch):
    for place in ("commands_runs.read_runs", "commands_runs.read_run", "watch.read_run"):
        monkeypatch.setattr(f"pfedgpa_app.{place}", broken)
    monkeypatch.setattr(cli, "read_run", broken)
    options = ["--client", "0", "-o", "x"] if command[0] == "export" else []
    result = CliRunner().invoke(app, [*command, *options])
    assert result.exit_code == 1
    line = f"LookupError: nobody expected it in broken (test_errors.py, line {LINE})"
    assert result.stderr == f"{line}; {DEBUG}=1 shows its traceback\n"
    monkeypatch.setenv(DEBUG, "1")
    assert isinstance(CliRunner().invoke(app, [*command, *options]).exception, LookupError)


LINE = broken.__code__.co_firstlineno + 2


def test_how_a_command_ends_is_no_error():
    assert CliRunner().invoke(app, ["--version"]).exit_code == 0
    result = CliRunner().invoke(app, ["export", "1", "-o", "x"])
    assert result.exit_code == 2
    assert "Missing option '--client'" in result.stderr


def test_no_traceback_prints_the_values_of_variables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for each in (app, config_app, runs_app):
        assert not each.pretty_exceptions_enable
    monkeypatch.setattr(sys, "argv", ["absence", "--seeds", "0.12345"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # typer puts its own there
    with pytest.raises(ValueError, match=r"0\.12345") as caught:
        runpy.run_module("benchmarks.absence", run_name="__main__")
    sys.excepthook(caught.type, caught.value, caught.tb)  # as Python ends the process
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last):")
    assert "locals" not in said
