"""A run that is killed and resumed goes on as if nothing had happened."""

from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord
from simulated_grid import SimulatedGrid, learning_grid, weights

from pfedgpa_app.config import Config
from pfedgpa_app.model_spec import ModelSpec
from pfedgpa_app.report import RunFolder
from pfedgpa_app.rounds import summarize
from pfedgpa_app.state import load_state, save_state
from server_app.app import make_strategy
from server_app.checkpoint import (
    CHECKPOINT,
    CHECKPOINT_KIND,
    ResumeError,
    resume,
    write_checkpoint,
)
from server_app.roster import PartitionRoster, Roster
from server_app.strategies import ClientwiseFedAvg

MODEL = ModelSpec.of_state(weights(0.0))
STRATEGIES = ["pfedgpa", "local", "fedavg", "fedavg-ft"]


def config(tmp_path: Path, strategy: str, **settings) -> Config:
    base = {"strategy": strategy, "output-dir": str(tmp_path), "server.fraction-train": 0.5}
    return Config.from_flat(
        {**base, "diffusion.train-steps": 5, "num-server-rounds": 4, **settings}
    )


def go(
    config: Config, name: str, num_rounds: int, first_id: int = 100
) -> tuple[ClientwiseFedAvg, list[dict]]:
    """Run rounds and leave a folder with a checkpoint; return strategy and metrics."""
    strategy = make_strategy(config, MODEL)
    strategy.roster.ids_stay = False
    initial = ArrayRecord(weights(0.0))
    if config.resume_from:
        resume(config, strategy)
        initial = ArrayRecord(strategy.average)
    folder = RunFolder(config.output_path / name, config)
    rows = []

    def end_of_round(server_round: int, arrays: ArrayRecord) -> None:
        if server_round:
            row = summarize(strategy.record, config.strategy, 0.0)
            rows.append({k: v for k, v in row.items() if not k.startswith("seconds")})
            folder.add_round(row, strategy.record.clients.values())
            write_checkpoint(folder.path, strategy)

    strategy.start(
        learning_grid(first_id), initial, num_rounds=num_rounds, evaluate_fn=end_of_round
    )
    return strategy, rows


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_resumed_run_has_the_metrics_of_one_that_was_never_stopped(tmp_path: Path, strategy: str):
    whole, expected = go(config(tmp_path, strategy), "whole", 4)
    _, begun = go(config(tmp_path, strategy), "killed", 2)
    # New node ids, as whenever a simulation starts again.
    later = config(tmp_path, strategy, **{"resume-from": "killed"})
    resumed, rest = go(later, "resumed", 2, first_id=5000)
    assert begun + rest == expected
    for client in range(6):
        for name, tensor in whole.evaluation_state(client).items():
            assert torch.equal(resumed.evaluation_state(client)[name], tensor)


def test_other_settings_another_model_and_fewer_rounds_are_refused(tmp_path: Path):
    go(config(tmp_path, "local"), "first", 3)
    other = ModelSpec.of_state({**weights(0.0), "layer.bias": torch.zeros(7)})
    for settings, model, problem in (
        ({"client.momentum": 0.9}, MODEL, r"client\.momentum = 0\.9, there 0\.5"),
        ({}, other, r"not that of the run.*layer\.bias"),
        ({"num-server-rounds": 2}, MODEL, "= 2: the run has completed 3 rounds"),
    ):
        later = config(tmp_path, "local", **{"resume-from": "first", **settings})
        with pytest.raises(ResumeError, match=problem):
            resume(later, make_strategy(later, model))


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "missing", "no run"])
def test_what_is_no_checkpoint_is_refused_with_its_path(tmp_path: Path, damage: str):
    go(config(tmp_path, "local"), "first", 1)
    file = tmp_path / "first" / CHECKPOINT
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[: -file.stat().st_size // 2])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "foreign":
        save_state(file, "something-else", {"x": torch.ones(1)})
    elif damage == "missing":
        file.unlink()
    else:
        (tmp_path / "first" / "config.json").unlink()
    again = config(tmp_path, "local", **{"resume-from": "first"})
    with pytest.raises(ResumeError, match=r'resume-from = "first".*first'):
        resume(again, make_strategy(again, MODEL))


def test_a_crash_while_writing_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch):
    strategy, _ = go(config(tmp_path, "local"), "first", 1)
    file = tmp_path / "first" / CHECKPOINT
    before = file.read_bytes()

    def crash(tensors, path, metadata):
        Path(path).write_bytes(b"half of a")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", crash)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(file.parent, strategy)
    assert file.read_bytes() == before
    load_state(file, CHECKPOINT_KIND)


def test_a_node_that_is_known_by_its_id_keeps_its_number_whoever_else_connects():
    roster = Roster()
    roster.clients = {70: 0, 80: 1}
    roster.admit(SimulatedGrid({}), [80, 5])
    assert roster.clients == {70: 0, 80: 1, 5: 2}


def test_new_ids_of_a_simulation_are_numbered_by_partition_if_they_claim_all_old_numbers():
    roster = PartitionRoster()
    roster.ids_stay = False
    roster.clients = {70: 0, 80: 1}
    roster.admit(SimulatedGrid({}, {5: 1, 6: 0, 7: 2}), [5, 6, 7])
    assert roster.clients == {5: 1, 6: 0, 7: 2}


@pytest.mark.parametrize("claimed", [{5: 0}, {5: 0, 6: 1}])
def test_on_a_network_nodes_are_newcomers_whatever_they_claim(
    caplog: pytest.LogCaptureFixture, claimed: dict[int, int]
):
    roster = PartitionRoster()
    roster.clients = {70: 0, 80: 1}
    roster.admit(SimulatedGrid({}, claimed), list(claimed))
    numbers = dict(zip(claimed, (2, 3), strict=False))
    assert roster.clients == {70: 0, 80: 1} | numbers
    assert "registered SuperNodes" in caplog.text


def test_a_contested_claim_numbers_nobody_and_leaves_the_others_theirs(
    caplog: pytest.LogCaptureFixture,
):
    roster = PartitionRoster()
    claims = {50: 0, 60: 1, 70: 2, 80: 3}
    roster.admit(SimulatedGrid({}, {**claims, 10: 1}), [*claims, 10])
    assert roster.clients == {50: 0, 70: 2, 80: 3, 10: 4, 60: 5}
    for node in (10, 60):
        assert (
            f"Node {node} says that it has partition 1, which others claim as well" in caplog.text
        )
    assert caplog.text.count("others claim") == 2
    # Nor does anybody get the number later.
    roster.admit(SimulatedGrid({}, {**claims, 90: 1}), [*claims, 10, 90])
    assert roster.clients[90] == 6


def test_a_claim_of_a_partition_that_is_taken_is_said(caplog: pytest.LogCaptureFixture):
    roster = PartitionRoster()
    roster.admit(SimulatedGrid({}, {50: 0, 60: 1}), [50, 60])
    roster.admit(SimulatedGrid({}, {50: 0, 60: 1, 70: 0}), [50, 60, 70])
    assert roster.clients == {50: 0, 60: 1, 70: 2}
    assert (
        "Node 70 says that it has partition 0, which is that of client 0 (node 50)" in caplog.text
    )


def test_a_simulated_node_alone_is_not_given_the_number_of_a_client_that_is_away(
    caplog: pytest.LogCaptureFixture,
):
    roster = PartitionRoster()
    roster.ids_stay = False
    roster.clients = {70: 0, 80: 1}
    roster.admit(SimulatedGrid({}, {5: 0}), [5])
    assert roster.clients == {70: 0, 80: 1, 5: 2}
    assert "No client of the earlier run (2) is here, so all 1 are newcomers" in caplog.text
