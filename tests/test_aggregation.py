"""Generative aggregation as a whole, on banks of groups that nobody tells it about."""

import pytest
import torch
from torch import Tensor

from pfedgpa_app.aggregation import GenerativeAggregator
from pfedgpa_app.config import DiffusionConfig
from pfedgpa_app.randomness import make_generator

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
    aggregator = GenerativeAggregator(DiffusionConfig(**settings), seed=1)
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
    aggregator = fitted(uploads, rank=NUM_CLIENTS - 1, fidelity=1.0, train_steps=1)
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
    assert len(aggregator.bank) == NUM_CLIENTS
    assert torch.equal(aggregator.bank[3], uploads[4])


@pytest.mark.parametrize("old_uploads", ["deviation", "as-uploaded"])
def test_old_uploads_keep_their_deviation_from_their_own_rounds_average(bank, old_uploads: str):
    uploads, _ = bank
    settings = DiffusionConfig(train_steps=1, old_uploads=old_uploads)
    aggregator = GenerativeAggregator(settings)
    for client in range(4):
        aggregator.observe(client, uploads[client])
    averages = [uploads[:4].mean(0), uploads[:4].mean(0) + 5, uploads[:4].mean(0) - 2]
    aggregator.fit(1, averages[0])
    for server_round in (2, 3):  # clients 0 and 1 take part, 2 and 3 do not
        for client in (0, 1):
            aggregator.observe(client, uploads[client] + server_round)
        aggregator.fit(server_round, averages[server_round - 1])
    for client in (0, 1):
        assert torch.equal(aggregator.bank[client], uploads[client] + 3)
    for client in (2, 3):
        drift = averages[2] - averages[0] if old_uploads == "deviation" else 0
        torch.testing.assert_close(aggregator.bank[client], uploads[client] + drift)


def test_with_everyone_in_the_round_the_average_changes_nothing(bank):
    uploads, _ = bank
    with_average, without = (GenerativeAggregator(DiffusionConfig(train_steps=3)) for _ in range(2))
    for server_round in (1, 2):
        for client in range(NUM_CLIENTS):
            with_average.observe(client, uploads[client] * server_round)
            without.observe(client, uploads[client] * server_round)
        with_average.fit(server_round, uploads.mean(0) * server_round)
        without.fit(server_round)
    assert torch.equal(with_average.personalize(3), without.personalize(3))


def test_an_unknown_client_is_refused(bank):
    aggregator = fitted(bank[0], train_steps=1)
    aggregator.observe(20, bank[0][0])
    with pytest.raises(KeyError):  # observed, and not yet learned from
        aggregator.personalize(20)


@pytest.mark.parametrize("uploads", [torch.ones(1, 10), torch.ones(3, 10)])
def test_without_differences_everyone_keeps_its_upload(uploads: Tensor):
    aggregator = fitted(uploads)
    assert torch.equal(aggregator.personalize(0), uploads[0])


def test_a_loaded_state_personalizes_as_the_saved_one(bank, tmp_path):
    uploads, _ = bank
    aggregator = fitted(uploads, train_steps=3)
    aggregator.save(tmp_path / "state.safetensors")
    loaded = GenerativeAggregator(DiffusionConfig(train_steps=3), seed=1)
    loaded.load(tmp_path / "state.safetensors")
    for client in range(NUM_CLIENTS):
        assert torch.equal(loaded.personalize(client), aggregator.personalize(client))
    # What comes after is the same too.
    for each in (aggregator, loaded):
        each.observe(0, uploads[1] + 1)
        each.fit(server_round=2)
    assert torch.equal(loaded.personalize(0), aggregator.personalize(0))


def test_a_state_saved_before_the_first_fit_can_be_loaded(bank, tmp_path):
    GenerativeAggregator(DiffusionConfig()).save(tmp_path / "state.safetensors")
    loaded = fitted(bank[0], train_steps=1)
    loaded.load(tmp_path / "state.safetensors")
    assert not loaded.bank


@pytest.mark.parametrize("damage", ["truncated", "foreign", "missing"])
def test_a_damaged_state_is_refused_and_changes_nothing(bank, tmp_path, damage: str):
    from safetensors.torch import save_file

    file = tmp_path / "state.safetensors"
    aggregator = fitted(bank[0], train_steps=1)
    aggregator.save(file)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "foreign":
        save_file({"weight": torch.zeros(3)}, file)
    else:
        file.unlink()
    with pytest.raises(ValueError, match=r"state\.safetensors"):
        aggregator.load(file)
    assert len(aggregator.bank) == NUM_CLIENTS
