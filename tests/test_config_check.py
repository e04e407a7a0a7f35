"""What `pfedgpa config check` tries of a run beforehand, and what it says that it cannot try."""

import os
import sys
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pfedgpa_app.config import Config
from pfedgpa_app.files import count_of
from pfedgpa_app.report import RunFolder
from pfedgpa_app.runs import CHECKPOINT
from server_app.app import make_strategy
from server_app.checkpoint import write_checkpoint
from server_app.cli import app
from server_app.simulation import simulate

DATA = """
from functools import partial
from pathlib import Path

import torch


def load(root):
    Path("called").touch()
    return torch.rand(60, 1, 8, 8), torch.arange(60) % 3


def owned(root):
    return *load(root), torch.arange(60) % 5


def wide(root):
    return torch.rand(60, 1, 8, 9), torch.arange(60) % 3


def many(root):
    return torch.rand(60, 1, 8, 8), torch.arange(60) % 4


def fail(root):
    raise OSError("the disk is away")
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.delitem(sys.modules, "checked", raising=False)
    (tmp_path / "checked.py").write_text(DATA)
    return tmp_path


def check(*options: str, **flat: object) -> Result:
    overrides = [
        f"{key.replace('__', '.').replace('_', '-')}={value!r}" for key, value in flat.items()
    ]
    given = [part for override in overrides for part in ("-c", override)]
    return CliRunner().invoke(app, ["config", "check", *options, *given])


def own(dataset: str, *options: str, **flat: object) -> Result:
    right = {"data__shape": "1x8x8", "data__num_classes": 3, "data__partition": "iid"}
    return check(*options, **{"data__dataset": dataset, **right, **flat})


def problems(result: Result) -> list[str]:
    assert result.exit_code == 1
    first, *rest = result.stderr.splitlines()
    assert first == f"The configuration has {count_of(len(rest), 'problem')}:"
    return [line.removeprefix("  - ") for line in rest]


def test_an_own_data_set_is_loaded(here: Path):
    result = own("checked:load")
    assert result.exit_code == 0, result.stderr
    assert (here / "called").exists()
    assert result.stdout.splitlines()[-1] == (
        "Not checked: the partition of the data; --clients NUMBER would check it"
    )


@pytest.mark.parametrize(
    ("dataset", "problem"),
    [
        ("unchecked:load", "unchecked:load: cannot be imported (No module named 'unchecked')"),
        ("checked:nothing", "checked:nothing: cannot be imported (module 'checked' has no"),
        (
            "checked:fail",
            "checked:fail: failed with OSError: the disk is away in fail (checked.py",
        ),
        ("checked:wide", "checked:wide: examples are 60x1x8x9, right would be nx1x8x8"),
        ("checked:many", "checked:many: labels go from 0 to 3, right would be 0 to 2"),
    ],
)
def test_an_own_data_set_that_a_client_would_refuse_is_refused(
    here: Path, dataset: str, problem: str
):
    (found,) = problems(own(dataset))
    assert found.startswith(problem)


def test_a_number_of_clients_that_does_not_fit_is_refused(here: Path):
    result = own("checked:load", "--clients", "48")
    assert result.exit_code == 0, result.stderr
    assert "Not checked" not in result.stdout
    late = {"onboarding__late_clients": 49, "onboarding__join_round": 2}
    assert problems(own("checked:load", "--clients", "49", **late)) == [
        "onboarding.late-clients = 49: there are only 49 clients; right would be less than that",
        "49 clients cannot share 48 training examples, right would be 1 to 48 clients",
    ]
    natural = {"data__partition": "natural"}
    assert own("checked:owned", "--clients", "5", **natural).exit_code == 0
    assert problems(own("checked:owned", "--clients", "6", **natural)) == [
        "data.partition = natural: 6 clients, and 5 owners; right would be 1 to 5 clients"
    ]
    assert problems(check("--clients", "1")) == [
        "server.min-available-nodes = 2: more than 1 client; a run would wait for them and end"
    ]
    result = check("--clients", "0")
    assert result.exit_code == 2
    assert "0 is not in the range x>=1" in result.stderr


def test_a_partition_of_ones_own_is_tried(here: Path):
    wrong = {"data__partition": "checked:load"}  # which takes the folder alone
    (found,) = problems(own("checked:load", "--clients", "3", **wrong))
    assert found.startswith("checked:load: failed with TypeError: load() takes 1")


def test_a_partition_that_does_not_fit_the_data_is_refused(here: Path):
    (found,) = problems(check("--clients", "9", data__test_samples=3000))
    assert "right would be a smaller data.test-samples" in found


def test_nothing_of_sites_can_be_tried(here: Path):
    sites = {"data__dataset": "sites", "data__shape": "1x8x8", "data__num_classes": 10}
    result = check("--clients", "3", **sites)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "Not checked: the data, which are at the sites"


def test_an_output_folder_that_cannot_be_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch):
    (here / "file").touch()
    assert problems(check(output_dir=str(here / "file" / "runs"))) == [
        f'output-dir = "{here}/file/runs": {here}/file is no folder; right would be one'
    ]
    assert check(output_dir=str(here / "new" / "runs")).exit_code == 0
    assert not (here / "new").exists()
    refused = []

    def access(path: Path, mode: int) -> bool:
        refused.append(path)
        return mode != os.W_OK | os.X_OK

    monkeypatch.setattr(os, "access", access)
    assert problems(check(output_dir=str(here / "new"))) == [
        f'output-dir = "{here}/new": nothing can be written in {here}; right would be a folder '
        "that the ServerApp may write to"
    ]
    assert refused == [here]


def test_what_a_strategy_would_refuse_is_refused(here: Path):
    (found,) = problems(check(strategy="pfedhn", pfedhn__hidden_size=1_000_000))
    assert found.startswith("pfedhn.hidden-size = 1000000: the hypernetwork of a model of 13,706")


def leave_run(bank: str = "memory") -> Path:
    """Leave a run of two rounds, of which one is complete."""
    flat = {"num-server-rounds": 2, "client.local-epochs": 1, "server.bank": bank}
    config = Config.from_flat({**flat, "diffusion.max-members": 2, "server.fraction-train": 0.5})
    path = config.output_path / "111"
    strategy, _ = simulate(
        config, 6, num_rounds=2, num_processes=0, make_strategy=partial(make_strategy, folder=path)
    )
    with RunFolder(path, config):
        write_checkpoint(path, strategy)
    return path


@pytest.mark.parametrize("bank", ["memory", "disk"])
def test_a_run_to_go_on_from_is_read_and_left_as_it_is(here: Path, bank: str):
    path = leave_run(bank)
    files = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    same = {"client__local_epochs": 1, "server__bank": bank, "diffusion__max_members": 2}
    same |= {"server__fraction_train": 0.5, "resume_from": "latest"}
    result = check(num_server_rounds=3, **same)
    assert result.exit_code == 0, result.stderr
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == files
    assert [each.name for each in path.parent.iterdir()] == ["111"]
    result = check(num_server_rounds=3, **same, seed=1)
    assert result.stderr.splitlines()[1:] == [
        "  - The settings differ from those of the run to go on from:",
        "    - seed = 1, there 0",
    ]
    (found,) = problems(check(num_server_rounds=1, **same))
    assert found.startswith("num-server-rounds = 1: the run has completed 2 rounds")
    if bank == "disk":
        next((path / "bank").iterdir()).unlink()
        assert "is missing or damaged" in problems(check(num_server_rounds=3, **same))[0]
    (path / CHECKPOINT).unlink()
    (found,) = problems(check(num_server_rounds=3, **same))
    assert f"{CHECKPOINT} is missing or damaged" in found


def test_a_run_to_go_on_from_that_is_not_there_is_named(here: Path):
    (found,) = problems(check(resume_from="digits-pfedgpa-7"))
    assert found.startswith('resume-from = "digits-pfedgpa-7": There is no run ')
