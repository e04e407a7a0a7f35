"""What a client is sent of others, and how little of it may be one other client's."""

import pytest
import torch
from flwr.app import MessageType
from hypothesis import given
from hypothesis import strategies as st
from reported_halves import DIM, fitted, sketches
from simulated_grid import SimulatedGrid, learning_site, start
from torch import Tensor

from pfedgpa_app.aggregation import GenerativeAggregator
from pfedgpa_app.config import DiffusionConfig
from pfedgpa_app.diffusion.mixing import excess_weights
from pfedgpa_app.randomness import make_generator
from server_app.strategies import PFedGPA


@pytest.mark.parametrize("min_contributors", [1, 2, 3, 4, 6])
@given(seed=st.integers(0, 2**31), num_clients=st.integers(2, 12), power=st.floats(0, 8))
def test_no_other_client_has_too_large_a_part_of_what_one_is_sent(
    min_contributors: int, seed: int, num_clients: int, power: float
):
    weights = torch.randn(num_clients, generator=make_generator(seed), dtype=torch.float64)
    weights = weights.sign() * weights.abs() ** power
    left = weights - excess_weights(weights, min_contributors, own=0)
    assert left[0] == weights[0]
    others, before = left[1:].abs(), weights[1:].abs()
    assert (others <= before).all()
    if before.max() * (min_contributors - 1) <= before.sum():
        assert torch.equal(others, before)
    elif num_clients < min_contributors:
        assert not others.any()
    else:  # so many others have the largest part, and nobody loses more than that takes
        largest = before.sort(descending=True).values[min_contributors - 2]
        torch.testing.assert_close(others, before.clamp(max=largest))


def test_of_a_group_of_two_each_keeps_its_own_and_of_three_they_share():
    generator = make_generator(2)
    centres = torch.randn(4, DIM, generator=generator)
    groups = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3])
    noises = [0.3 * torch.randn(len(groups), DIM, generator=generator) for _ in range(3)]
    uploads, halves = centres[groups] + noises[0], [centres[groups] + n for n in noises[1:]]
    reported = torch.stack([sketches(half) for half in halves], dim=1)

    def nearness(min_contributors: int) -> Tensor:
        """Return how near each is to the true centre of its group, its own upload being at 1."""
        config = DiffusionConfig(denoise=False, min_contributors=min_contributors)
        aggregator = GenerativeAggregator(torch.zeros(DIM), config)
        for client in range(len(groups)):
            aggregator.observe(client, uploads[client])
            aggregator.compare(client, reported[client])
        aggregator.fit(1)
        given = torch.stack([aggregator.personalize(client) for client in range(len(groups))])
        return (given - centres[groups]).norm(dim=1) / (uploads - centres[groups]).norm(dim=1)

    free, kept = nearness(1), nearness(3)
    assert (free[:2] < 0.8).all()
    assert (kept[:2] > 0.9).all()
    torch.testing.assert_close(kept[2:], free[2:], atol=0.05, rtol=0)


@pytest.mark.parametrize("sharing", ["affinity", "measured"])
def test_two_clients_alone_are_sent_nothing_of_each_other(sharing: str):
    uploads = torch.randn(2, DIM, generator=make_generator(5))
    halves = [
        sketches(uploads + 0.1 * torch.randn(2, DIM, generator=make_generator(seed)))
        for seed in (6, 7)
    ]
    aggregator = fitted(uploads, halves, sharing=sharing, rank=1)
    for client in range(2):
        torch.testing.assert_close(aggregator.personalize(client), uploads[client])
    free = fitted(uploads, halves, sharing=sharing, rank=1, min_contributors=1)
    assert (free.personalize(0) - uploads[0]).norm() > 0.1 * uploads[0].norm()


def test_two_clients_are_not_sent_their_mean_to_be_measured():
    def requested(min_contributors: int) -> list[bool]:
        grid = SimulatedGrid({1: learning_site(1.0), 2: learning_site(3.0)})
        config = DiffusionConfig(min_contributors=min_contributors, measure_every=1, train_steps=5)
        start(PFedGPA(diffusion=config), grid)
        training = [m for m in grid.sent if m.metadata.message_type == MessageType.TRAIN]
        return ["extras" in message.content for message in training]

    assert requested(2) == [True] * 4
    assert requested(3) == [True, True, False, False]  # in the first round there is nothing to tell


def test_a_newcomer_is_not_sent_the_only_members_upload():
    aggregator = GenerativeAggregator(torch.zeros(DIM), DiffusionConfig(min_contributors=3))
    aggregator.observe(0, torch.ones(DIM))
    aggregator.fit(1, average=torch.ones(DIM))
    assert torch.equal(aggregator.default_model(), torch.zeros(DIM))
    aggregator.observe(1, torch.full((DIM,), 3.0))
    aggregator.fit(2, average=torch.full((DIM,), 2.0))
    torch.testing.assert_close(aggregator.default_model(), torch.full((DIM,), 2.0))
