"""Momentum of the server, on the average and client by client."""

import pytest
import torch
from flwr.app import ArrayRecord
from simulated_grid import SimulatedGrid, received, site, start, weights

from pfedgpa_app.config import DiffusionConfig
from pfedgpa_app.model_spec import ModelSpec
from pfedgpa_app.parameters import default_trained
from server_app.momentum import ClientMomentum, Momentum
from server_app.strategies import ClientwiseFedAvg, PFedGPA

UPLOAD = DiffusionConfig(denoise=False, sharing="none", own_weight=0.0)


def test_the_average_goes_on_by_a_part_of_its_last_step():
    momentum = Momentum(0.5, {"w"})
    old = {"w": torch.tensor([1.0, 0.0])}
    first = momentum.step(old, {"w": torch.tensor([2.0, 4.0])})
    assert first["w"].tolist() == [2.0, 4.0]  # v = (1, 4)
    second = momentum.step(first, {"w": torch.tensor([2.0, 2.0])})
    assert second["w"].tolist() == [2.5, 4.0]  # v = (.5, 2) + (0, -2)


def test_counters_and_running_statistics_have_no_momentum():
    momentum = Momentum(0.9, default_trained(weights(0.0)))
    momentum.step(weights(0.0), weights(1.0))
    moved = momentum.step(weights(1.0), weights(3.0))
    assert moved["layer.weight"][0, 0] == pytest.approx(1 + 0.9 * 1 + 2)
    assert torch.equal(moved["norm.running_mean"], weights(3.0)["norm.running_mean"])
    assert moved["norm.num_batches_tracked"] == 3


def test_fedavg_sends_the_average_with_its_momentum():
    grid = SimulatedGrid({1: site(1.0), 2: site(3.0)})
    start(ClientwiseFedAvg(momentum=0.5), grid, num_rounds=4)
    # The average is 2 in every round: v = 2, then 1 + 0, then 1/2 - 1.
    values = [sent[1] for sent in received(grid, "train")]
    assert values == [0.0, 2.0, 3.0, 2.5]


def test_a_client_goes_on_by_a_part_of_its_last_step():
    momentum = ClientMomentum(0.5)
    sent, generated = torch.tensor([0.0]), torch.tensor([4.0])
    for number, expected in enumerate((4.0, 6.0, 5.0)):  # 4; 4 + (4 - 0) / 2; 4 + (6 - 4) / 2
        momentum.trained(3, sent, number)
        sent = momentum.ahead(3, generated)
        assert float(sent) == expected
    assert torch.equal(momentum.ahead(9, generated), generated)


def test_the_step_of_a_client_that_was_away_is_that_of_one_round():
    """A client that goes 1 a round is ahead by the same, however seldom it trains."""
    momentum = ClientMomentum(0.5)
    for number in (1, 2, 5, 11):
        momentum.trained(0, torch.tensor([float(number)]), number)
        if number > 1:
            assert float(momentum.ahead(0, torch.tensor([0.0]))) == 0.5


def test_pfedgpa_has_the_momentum_on_what_it_generates():
    grid = SimulatedGrid({1: site(1.0), 2: site(3.0)})
    start(PFedGPA(diffusion=UPLOAD, momentum=0.5), grid, num_rounds=4)
    values = [sent[2] for sent in received(grid, "train")]
    # The upload is 3 in every round: v = 0, then 3, then 3 - (3 + 1.5) + 1.5.
    assert values == pytest.approx([0.0, 3.0, 4.5, 3.75], abs=1e-5)


@pytest.mark.parametrize("strategy", [ClientwiseFedAvg, PFedGPA])
def test_momentum_survives_a_checkpoint(strategy):
    def new() -> ClientwiseFedAvg:
        more = {"diffusion": UPLOAD} if strategy is PFedGPA else {}
        return strategy(momentum=0.5, **more)

    nodes = {node: site(float(node)) for node in (1, 2, 5)}
    whole = new()
    start(whole, SimulatedGrid(nodes), num_rounds=4)
    first = new()
    start(first, SimulatedGrid(nodes), num_rounds=2)
    second = new()
    second.begin(ModelSpec.of_state(weights(0.0)))
    second.restore(first.state())
    second.completed_rounds = 2
    second.roster.clients = dict(first.roster.clients)
    initial = first.average
    second.start(SimulatedGrid(nodes), ArrayRecord(initial), num_rounds=2)
    for client in range(3):
        left, right = whole.training_state(client), second.training_state(client)
        assert all(torch.equal(left[name], right[name]) for name in left)
    assert whole.training_state(0)["layer.weight"][0, 0] != 1.0
