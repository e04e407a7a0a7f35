"""Clients that lie in whole runs, and what honest ones have then."""

import numpy as np
import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from benchmarks.attacks import ATTACKS, RULES, Attack, AttackedGrid, Case, together
from benchmarks.lying_client import TARGET, falsified, with_trigger
from pfedgpa_app.config import Config
from pfedgpa_app.data import client_data
from pfedgpa_app.model_spec import ModelSpec
from pfedgpa_app.parameters import ParameterLayout, StateDict
from pfedgpa_app.randomness import make_generator
from server_app.replies import Upload
from server_app.simulation import simulate
from server_app.strategies import PFedGPA

NUM_CLIENTS, LIARS = 6, (1, 4)
SETTINGS = {"num-server-rounds": 1, "client.local-epochs": 1, "diffusion.train-steps": 5}


class Kept(PFedGPA):
    """Keeps the uploads of a round as they come."""

    def learn(self, server_round: int, uploads: dict[int, Upload]) -> None:
        """Keep the uploads, and learn from them."""
        self.uploads = uploads
        super().learn(server_round, uploads)


def uploads(attack: Attack) -> tuple[Tensor, Tensor, dict[int, Upload]]:
    """Return each client's move, ``(6, d)``, its halves, and the uploads of a run's one round."""
    config = Config.from_flat(SETTINGS)
    strategy, _ = simulate(
        config,
        NUM_CLIENTS,
        make_strategy=Kept.of,
        make_grid=lambda *args: AttackedGrid(attack, Case(LIARS), *args),
        num_processes=0,
    )
    assert isinstance(strategy, Kept)
    moves = [
        strategy.uploads[client].vector - strategy.uploads[client].start
        for client in range(NUM_CLIENTS)
    ]
    halves = [strategy.uploads[client].extras["halves"] for client in range(NUM_CLIENTS)]
    return torch.stack(moves), torch.stack(halves), strategy.uploads


@pytest.fixture(scope="module")
def honest() -> tuple[Tensor, Tensor]:
    """Return what is uploaded where nobody lies."""
    return uploads(Attack())[:2]


def test_liars_change_what_they_move_and_report_and_nothing_of_others(honest):
    moves, halves = honest
    forged, reported, _ = uploads(ATTACKS["sign flip"])
    for client in range(NUM_CLIENTS):
        sign = -1 if client in LIARS else 1
        torch.testing.assert_close(forged[client], sign * moves[client], atol=1e-6, rtol=0)
        torch.testing.assert_close(reported[client], sign * halves[client])


def test_what_liars_make_of_the_others_moves_is_what_byzfl_says(honest):
    moves, _ = honest
    others = torch.stack([moves[c] for c in range(NUM_CLIENTS) if c not in LIARS]).double()
    forged, _, _ = uploads(ATTACKS["inner product"])
    torch.testing.assert_close(forged[1].double(), -2 * others.mean(dim=0), atol=1e-6, rtol=0)
    forged, _, _ = uploads(ATTACKS["a little is enough"])

    little = others.mean(dim=0) + 1.5 * others.std(dim=0)
    torch.testing.assert_close(forged[4].double(), little, atol=1e-5, rtol=0)


def test_liars_claim_examples_and_metrics_like_others():
    _, _, found = uploads(ATTACKS["1000 times the examples, flipped"])
    assert found[1].num_examples == 1000 * found[0].num_examples
    assert found[1].metrics["loss-after"] == found[0].metrics["loss-after"]


@pytest.mark.parametrize("poison", ["labels", "trigger"])
def test_falsified_data_are_what_the_attack_says(poison: str):
    data = client_data(Config.from_flat({}).data, 0, 0, NUM_CLIENTS)
    other = falsified(data, poison)
    if poison == "labels":
        assert torch.equal(other.train_labels, 9 - data.train_labels)
        assert torch.equal(other.train_inputs, data.train_inputs)
    else:
        assert torch.equal(other.train_inputs[::2], with_trigger(data.train_inputs[::2]))
        assert torch.equal(other.train_inputs[1::2], data.train_inputs[1::2])
        assert bool((other.train_labels[::2] == TARGET).all())
    assert torch.equal(other.test_labels, data.test_labels)


def test_robust_rules_take_the_place_of_the_average():
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    generator = make_generator(0)
    states: list[StateDict] = [{"weight": torch.randn(3, 2, generator=generator)} for _ in range(8)]
    every = np.stack([state["weight"].numpy() for state in states])
    given = [Upload(ParameterLayout.of(state), {}, state, 10, {}, {}, {}) for state in states]
    config = Config.from_flat({"strategy": "fedavg-ft"})
    spec = ModelSpec.of_state(states[0])
    ordered = np.sort(every, axis=0)
    for name, expected in {
        "median, FT": np.median(every, axis=0),
        "trimmed mean, FT": ordered[1:-1].mean(axis=0),  # a fifth of eight on either side
    }.items():
        make, _ = RULES[name]
        np.testing.assert_allclose(make(config, spec).combine(given)["weight"], expected, rtol=1e-5)
    make, _ = RULES["Krum, FT"]
    chosen = make(config, spec).combine(given)["weight"]
    assert any(torch.equal(chosen, state["weight"]) for state in states)


SURFACES = {
    "statistics": {"1.running_mean", "1.running_var"},
    "averaged": {"0.weight", "0.bias", "1.weight"},
    "halves": set(),
    "all": {"0.weight", "0.bias", "1.weight", "2.weight"},
}


@pytest.mark.parametrize(("lies", "expected"), SURFACES.items(), ids=SURFACES.keys())
def test_liars_lie_about_the_part_of_an_upload_that_a_case_names(lies: str, expected: set[str]):
    config = Config.from_flat({"diffusion.generated-layers": "2.*"})
    state = {
        "0.weight": torch.zeros(2),
        "0.bias": torch.zeros(2),
        "1.weight": torch.zeros(2),
        "1.running_mean": torch.zeros(2),
        "1.running_var": torch.ones(2),
        "1.num_batches_tracked": torch.tensor(0),
        "2.weight": torch.zeros(2),
    }
    grid = AttackedGrid(Attack(), Case((0,), lies), config, 1, 0)
    assert set(grid.attacked("arrays", state)) == expected
    halves = grid.attacked("extras", {"halves": torch.zeros(2, 4)})
    assert bool(halves) == (lies in ("all", "halves"))


def test_liars_that_go_together_are_just_not_unusual():
    honest = torch.ones(100) + torch.randn(8, 100, generator=make_generator(0))
    first, second = (together(move, honest, make_generator(1)) for move in honest[:2])
    assert torch.equal(first, second)
    assert float(first.norm() / honest.norm(dim=1).median()) == pytest.approx(1.9, rel=1e-3)
    assert float(first @ honest.mean(dim=0)) > 0
