"""Generative aggregation as a whole, on banks of groups that nobody tells it about."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pfedgpa_app.aggregation import GenerativeAggregator
from pfedgpa_app.config import DiffusionConfig
from pfedgpa_app.randomness import make_generator
from pfedgpa_app.state import load_state, save_state

NUM_CLIENTS, NUM_GROUPS, DIM = 20, 5, 2000


@pytest.fixture(scope="module")
def bank() -> tuple[Tensor, Tensor]:
    """Return uploads ``(20, 2000)`` and the true centres of their groups, client by client."""
    generator = make_generator(7)
    centres = torch.randn(NUM_GROUPS, DIM, generator=generator)
    centres = centres[torch.arange(NUM_CLIENTS) % NUM_GROUPS]
    return centres + 0.7 * torch.randn(NUM_CLIENTS, DIM, generator=generator), centres


def fitted(
    uploads: Tensor, order: range | list[int] | None = None, **settings
) -> GenerativeAggregator:
    aggregator = GenerativeAggregator(
        torch.zeros(uploads.shape[1]), DiffusionConfig(**settings), seed=1
    )
    for client in order or range(len(uploads)):
        aggregator.observe(client, uploads[client])
    aggregator.fit(server_round=1)
    return aggregator


def test_generated_parameters_are_nearer_to_the_group_than_the_upload(bank):
    uploads, centres = bank
    aggregator = fitted(uploads)
    generated = torch.stack([aggregator.personalize(client) for client in range(NUM_CLIENTS)])
    before = (uploads - centres).norm(dim=1)
    after = (generated - centres).norm(dim=1)
    # A group has four members: their mean halves the noise, and nothing linear does better.
    assert (after < 0.6 * before).all()
    # Everybody's average is no one's model.
    assert (after < 0.5 * (uploads.mean(0) - centres).norm(dim=1)).all()


def test_all_components_at_fidelity_one_are_the_uploads(bank):
    uploads, _ = bank
    aggregator = fitted(uploads, rank=NUM_CLIENTS - 1, fidelity=1.0, train_steps=1, sharing="none")
    for client in range(NUM_CLIENTS):
        torch.testing.assert_close(
            aggregator.personalize(client), uploads[client], atol=1e-3, rtol=1e-3
        )


def test_the_order_of_the_uploads_does_not_matter(bank):
    uploads, _ = bank
    forward = fitted(uploads, train_steps=3)
    backward = fitted(uploads, list(range(NUM_CLIENTS))[::-1], train_steps=3)
    for client in range(NUM_CLIENTS):
        assert torch.equal(forward.personalize(client), backward.personalize(client))


def test_a_new_upload_takes_the_place_of_the_old_one(bank):
    uploads, _ = bank
    aggregator = fitted(uploads, train_steps=1)
    aggregator.observe(3, uploads[4])
    aggregator.fit(server_round=2)
    assert len(aggregator.bank.members) == NUM_CLIENTS
    assert torch.equal(aggregator.bank.members[3], uploads[4])


def test_old_uploads_move_with_those_alike(bank):
    """Groups 0 and 1 move apart; of each, members that were not in the round move along."""
    uploads, centres = bank
    uploads = centres + 0.3 * (uploads - centres)
    aggregator = fitted(uploads[: 2 * NUM_GROUPS], train_steps=1)
    direction = torch.ones(DIM)
    before = dict(aggregator.bank.members)
    for client, sign in ((0, 1.0), (1, -1.0)):
        aggregator.observe(client, uploads[client] + sign * direction)
    aggregator.fit(server_round=2)
    for client, sign in ((5, 1.0), (6, -1.0)):
        moved = aggregator.bank.members[client] - before[client]
        torch.testing.assert_close(moved, sign * direction, atol=0.02, rtol=0)


def test_old_uploads_without_anyone_alike_in_the_round_move_with_everyone(bank):
    """Only members of group 0 and 1 come again; those of group 2 go the mean of their ways."""
    uploads, centres = bank
    aggregator = fitted((centres + 0.3 * (uploads - centres))[: 2 * NUM_GROUPS], train_steps=1)
    before = dict(aggregator.bank.members)
    for client, sign in ((0, 1.0), (1, 3.0)):
        aggregator.observe(client, before[client] + sign)
    aggregator.fit(server_round=2)
    for client, expected in ((5, 1.0), (6, 3.0), (7, 2.0)):
        moved = aggregator.bank.members[client] - before[client]
        torch.testing.assert_close(moved, torch.full((DIM,), expected), atol=0.05, rtol=0)


def test_a_fixed_rank_is_no_more_than_there_are_axes(bank):
    """Entries that nobody changes are on none of them."""
    uploads = bank[0][:10, :100].clone()
    uploads[:, 50:] = 1.0
    aggregator = fitted(uploads, rank=99, train_steps=1)
    assert aggregator.model.space.dim == 9
    torch.testing.assert_close(aggregator.personalize(3)[50:], uploads[3, 50:])


def test_where_clients_are_the_same_there_are_no_axes():
    assert fitted(torch.ones(10, 100), rank=99, train_steps=1).model.space.dim == 0


def test_a_newcomers_start_is_the_average_where_nothing_was_learned(bank):
    aggregator = GenerativeAggregator(torch.ones(5), DiffusionConfig(min_contributors=1))
    assert torch.equal(aggregator.default_model(), torch.ones(5))
    aggregator.observe(0, torch.zeros(5))
    aggregator.fit(1, average=torch.full((5,), 3.0))  # one client: nothing to learn
    # What a newcomer was sent stays what it was, although there is a newer average.
    assert torch.equal(aggregator.default_model(), torch.full((5,), 3.0))


@pytest.mark.parametrize(("way", "is_common"), [(5.0, True), (0.2, False)])
def test_clients_without_structure_are_alike_if_they_went_together(way: float, is_common: bool):
    """Then everyone is given the mean; if they went apart, everyone keeps its upload."""
    uploads = way + torch.randn(20, 500, generator=make_generator(0))
    aggregator = GenerativeAggregator(torch.zeros(500), DiffusionConfig())
    for client in range(20):
        aggregator.observe(client, uploads[client])
    aggregator.fit(1)
    for client in (0, 7):
        expected = uploads.mean(0) if is_common else uploads[client]
        torch.testing.assert_close(aggregator.personalize(client), expected)


def test_clients_that_began_apart_stay_so_however_far_they_come_together():
    """Those that are not in a round go the mean of the others' ways, and keep what is their own."""
    uploads = torch.randn(20, 500, generator=make_generator(0))
    aggregator = GenerativeAggregator(torch.zeros(500), DiffusionConfig())
    for server_round, members in ((1, range(20)), (2, range(10)), (3, range(10))):
        for client in members:
            aggregator.observe(client, uploads[client] + 10 * (server_round - 1))
        aggregator.fit(server_round)
        resumed = GenerativeAggregator(torch.zeros(500), DiffusionConfig())
        resumed.restore(aggregator.state())
        aggregator = resumed
    for client in (0, 9, 10, 19):
        torch.testing.assert_close(aggregator.personalize(client), uploads[client] + 20)


def test_unlike_clients_that_come_later_end_what_was_common():
    """Two clients of the first round are alike, and ten that come afterwards like nobody."""
    generator = make_generator(0)
    aggregator = GenerativeAggregator(torch.zeros(500), DiffusionConfig())
    for client in (0, 1):
        aggregator.observe(client, 3 + 0.1 * torch.randn(500, generator=generator))
    aggregator.fit(1)
    assert aggregator.model is not None
    unlike = {client: 3 * torch.randn(500, generator=generator) for client in range(2, 12)}
    for client, upload in unlike.items():
        aggregator.observe(client, upload)
    aggregator.fit(2)
    for client, upload in unlike.items():
        assert torch.equal(aggregator.personalize(client), upload)


def test_a_state_of_another_denoiser_is_refused(bank):
    aggregator = fitted(bank[0], train_steps=1)
    other = GenerativeAggregator(torch.zeros(DIM), DiffusionConfig(train_steps=1, hidden_size=8))
    with pytest.raises(ValueError, match="not the state of these settings"):
        other.restore(aggregator.state())
    assert not other.bank.members


def test_who_is_like_nobody_keeps_what_lies_outside_of_the_subspace(bank):
    """Three groups and a client that is far from all: its noise is not averaged away."""
    uploads, _ = bank
    lonely = uploads[19] + 3 * torch.randn(DIM, generator=make_generator(9))
    some = [uploads[client] for client in range(15)]
    aggregator = fitted(torch.stack([*some, lonely]))
    kept = (aggregator.personalize(15) - lonely).norm() / lonely.norm()
    averaged = (aggregator.personalize(0) - uploads[0]).norm() / uploads[0].norm()
    assert kept < 0.1
    assert averaged > 0.3


def test_the_raw_space_generates_nearer_to_the_group_than_the_upload():
    generator = make_generator(7)
    pattern = torch.randn(32, generator=generator)
    centres = pattern * (-1.0) ** torch.arange(8)[:, None]
    uploads = centres + 0.3 * torch.randn(8, 32, generator=generator)
    settings = {"start": 400, "fidelity": 0.0, "hidden_size": 16, "learning_rate": 3e-3}
    aggregator = fitted(uploads, space="raw", batch_size=64, **settings)
    generated = torch.stack([aggregator.personalize(client) for client in range(8)])
    before, after = ((each - centres).norm(dim=1) for each in (uploads, generated))
    assert after.mean() < 0.9 * before.mean()


def test_a_newcomer_is_guided_to_its_group(bank):
    """From the mean, a step of local training toward its group is enough to be placed there."""
    uploads, centres = bank
    aggregator = fitted(uploads[:15])
    mean = aggregator.default_model()
    torch.testing.assert_close(mean, uploads[:15].mean(0))
    for newcomer in (15, 16):
        current = mean + 0.2 * (uploads[newcomer] - mean)
        aggregator.onboard(newcomer, current, mean)
        generated = aggregator.personalize(newcomer)
        distances = [(generated - centres[group]).norm() for group in range(NUM_GROUPS)]
        assert min(distances) == distances[newcomer % NUM_GROUPS]
        assert min(distances) < 0.6 * (current - centres[newcomer]).norm()
        assert newcomer not in aggregator.bank.members
    # Later it moves with those alike, until it is a member with an upload of its own.
    placed = aggregator.personalize(15)
    for member in (0, 5, 10):
        aggregator.observe(member, uploads[member] + 1.0)
    aggregator.fit(server_round=2)
    torch.testing.assert_close(aggregator.personalize(15), placed + 1.0, atol=0.05, rtol=0)
    aggregator.observe(15, uploads[15])
    aggregator.fit(server_round=3)
    assert 15 in aggregator.bank.members
    assert 15 not in aggregator.bank.non_members


def test_auto_start_rises_with_the_noise(bank):
    uploads, centres = bank
    starts = [
        fitted(centres + noise * (uploads - centres), train_steps=1).model.start
        for noise in (0.25, 0.5, 1.0)
    ]
    assert starts[0] < starts[1] < starts[2]


def test_an_unknown_client_is_refused(bank):
    aggregator = fitted(bank[0], train_steps=1)
    aggregator.observe(20, bank[0][0])
    with pytest.raises(KeyError):  # observed, and not yet learned from
        aggregator.personalize(20)


@pytest.mark.parametrize("uploads", [torch.ones(1, 10), torch.ones(3, 10)])
def test_without_differences_everyone_keeps_its_upload(uploads: Tensor):
    aggregator = fitted(uploads)
    assert torch.equal(aggregator.personalize(0), uploads[0])


@pytest.mark.parametrize("space", ["subspace", "raw"])
def test_a_loaded_state_personalizes_as_the_saved_one(bank, tmp_path, space: str):
    uploads = bank[0][:, :100]
    settings = {"train_steps": 3, "batch_size": 16, "space": space, "start": 50, "hidden_size": 8}
    aggregator = fitted(uploads, **settings)
    aggregator.onboard(50, uploads[0], uploads[1])
    save_state(tmp_path / "state.safetensors", "state", aggregator.state())
    loaded = GenerativeAggregator(torch.zeros(100), DiffusionConfig(**settings), seed=1)
    loaded.restore(load_state(tmp_path / "state.safetensors", "state")[0])
    for client in [*range(NUM_CLIENTS), 50]:
        assert torch.equal(loaded.personalize(client), aggregator.personalize(client))
    # What comes after is the same too.
    for each in (aggregator, loaded):
        each.observe(0, uploads[1] + 1)
        each.fit(server_round=2)
    for client in (0, 50):
        assert torch.equal(loaded.personalize(client), aggregator.personalize(client))


def test_a_state_saved_before_the_first_fit_can_be_loaded(bank, tmp_path):
    save_state(
        tmp_path / "state.safetensors",
        "state",
        GenerativeAggregator(torch.zeros(DIM), DiffusionConfig()).state(),
    )
    loaded = fitted(bank[0], train_steps=1)
    loaded.onboard(30, bank[0][0], bank[0][1])
    loaded.restore(load_state(tmp_path / "state.safetensors", "state")[0])
    assert not loaded.bank.members
    assert not loaded.bank.non_members


def test_without_sharing_and_denoiser_everyone_is_given_its_upload(bank):
    uploads, _ = bank
    aggregator = fitted(uploads, denoise=False, sharing="none")
    for client in range(NUM_CLIENTS):
        assert torch.equal(aggregator.personalize(client), uploads[client])


def test_without_sharing_a_newcomer_is_denoised_alone(bank):
    """Outside of the space it keeps what it has, and no member's upload is mixed in."""
    uploads, _ = bank
    aggregator = fitted(uploads, sharing="none", rank=4, train_steps=20)
    current = uploads[0] + 0.1
    aggregator.onboard(99, current, uploads[0])
    assert aggregator.model is not None
    moved = aggregator.personalize(99) - current
    inside = moved @ aggregator.model.space.basis.T @ aggregator.model.space.basis
    assert float(moved.norm()) > 0.01
    torch.testing.assert_close(moved, inside, atol=1e-4, rtol=1e-3)


def test_without_a_denoiser_uploads_are_weighed_by_their_nearness(bank):
    uploads, _ = bank
    aggregator = fitted(uploads, denoise=False, rank=4, start=300)
    # Independently: whitened principal components of numpy's SVD, and a softmax of distances.
    centred = (uploads - uploads.mean(0)).double().numpy()
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    scale = np.sqrt((singular[:4] ** 2).mean() / NUM_CLIENTS)
    points = left[:, :4] * singular[:4] / scale
    alpha_bar = float(np.prod(1 - np.linspace(1e-4, 0.02, 1000, dtype=np.float64)[:301]))
    distances = ((points[:, None] - points[None]) ** 2).sum(axis=2)
    weights = np.exp(-distances * alpha_bar / (2 * (1 - alpha_bar)))
    weights /= weights.sum(axis=1, keepdims=True)
    actual = torch.stack([aggregator.personalize(client) for client in range(NUM_CLIENTS)])
    np.testing.assert_allclose(actual.numpy(), weights @ uploads.double().numpy(), atol=1e-3)
    assert np.abs(weights - np.eye(NUM_CLIENTS)).max() > 0.1  # the weights do something here


def test_models_without_a_denoiser_are_kept_and_onboard_newcomers(bank):
    uploads, centres = bank
    aggregator = fitted(uploads, denoise=False)
    restored = GenerativeAggregator(torch.zeros(DIM), DiffusionConfig(denoise=False), seed=1)
    restored.restore(aggregator.state())
    for one in (aggregator, restored):
        one.onboard(99, uploads[0] + 0.1, uploads[0])
    assert torch.equal(aggregator.personalize(99), restored.personalize(99))
    assert torch.equal(aggregator.personalize(3), restored.personalize(3))
    distances = (aggregator.personalize(99) - centres).norm(dim=1)
    assert int(distances.argmin()) % NUM_GROUPS == 0
