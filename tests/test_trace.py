"""What the server writes down of what it learned."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from pfedgpa_app import trace
from pfedgpa_app.aggregation import GenerativeAggregator
from pfedgpa_app.config import DiffusionConfig
from pfedgpa_app.diffusion.signal import SKETCH
from pfedgpa_app.randomness import make_generator
from pfedgpa_app.trace import trace_of

DIM = 300


def fitted(num_clients: int = 12, **settings) -> GenerativeAggregator:
    """Return what was learned from two groups, the even and the odd clients."""
    generator = make_generator(5)
    centres = torch.randn(2, DIM, generator=generator)[torch.arange(num_clients) % 2]
    config = DiffusionConfig(train_steps=20, **{"sharing": "affinity", **settings})
    aggregator = GenerativeAggregator(torch.zeros(DIM), config, seed=1)
    for client, centre in enumerate(centres):
        noise = 0.3 * torch.randn(DIM, generator=generator)
        aggregator.observe(10 + client, centre + noise)
        if settings.get("sharing") == "measured":
            wish = centre.repeat(2, SKETCH // DIM + 1)[:, :SKETCH]
            halves = wish + torch.randn(2, SKETCH, generator=generator)
            aggregator.compare(10 + client, halves)
    aggregator.fit(1)
    return aggregator


def principal(vectors: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean, first two axes and all variances, by NumPy's singular value decomposition."""
    rows = vectors.double().numpy()
    mean = rows.mean(axis=0)
    _, singular, axes = np.linalg.svd(rows - mean, full_matrices=False)
    return mean, axes[:2], singular**2 / len(rows)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sharing": "measured"},
        {"space": "raw", "start": 200, "hidden_size": 8, "num_blocks": 1},
        {"denoise": False},
        {"min_contributors": 7},
    ],
    ids=str,
)
def test_coordinates_are_those_of_the_vectors_themselves(settings: dict):
    aggregator = fitted(**settings)
    clients = sorted(aggregator.bank.members)
    uploads = torch.stack([aggregator.bank.members[client] for client in clients])
    generated = torch.stack([aggregator.personalize(client) for client in clients])
    mean, axes, variances = principal(uploads)
    row = trace_of(aggregator)
    assert row["clients"] == clients
    assert row["explained"] == pytest.approx(variances[:2] / variances.sum(), rel=1e-3)
    for name, vectors in (("uploads", uploads), ("generated", generated)):
        right = (vectors.double().numpy() - mean) @ axes.T
        found = np.array(row[name])
        # Axes have any sign.
        signs = np.sign((found * right).sum(axis=0))
        np.testing.assert_allclose(found, right * signs, atol=2e-3)


@pytest.mark.parametrize("sharing", ["affinity", "measured"])
def test_kinship_is_each_ones_part_and_larger_within_a_group(sharing: str):
    mixing_weights = np.array(trace_of(fitted(sharing=sharing))["mixing-weights"])
    np.testing.assert_allclose(mixing_weights.sum(axis=1), 1, atol=1e-2)
    same = np.equal.outer(np.arange(12) % 2, np.arange(12) % 2)
    assert mixing_weights[same].min() > mixing_weights[~same].max()


def test_what_is_withheld_is_the_clients_own():
    """Of six in a group nobody may be given more than a tenth of another: it keeps its own."""
    mixing_weights = np.array(trace_of(fitted(min_contributors=11))["mixing-weights"])
    others = mixing_weights - np.diag(np.diag(mixing_weights))
    assert (np.diag(mixing_weights) > others.max(axis=1) + 0.1).all()


def test_the_spectrum_is_that_of_the_uploads():
    aggregator = fitted()
    row = trace_of(aggregator)
    uploads = torch.stack(
        [aggregator.bank.members[client] for client in sorted(aggregator.bank.members)]
    )
    variances = principal(uploads)[2][:-1]
    assert row["spectrum"] == pytest.approx(variances, rel=1e-3)
    assert row["floor"] == pytest.approx(np.sort(variances)[5], rel=1e-3)
    model = aggregator.model
    assert model is not None
    assert (row["rank"], row["start"], row["parameters"]) == (1, model.start, DIM)
    betas = np.linspace(1e-4, 2e-2, 1000)
    left = np.cumprod(1 - betas)[model.start]
    # One axis, of unit root mean square in the denoiser's units.
    assert row["noise"] == pytest.approx((1 - left) / left * variances[0], rel=1e-3)
    # Two groups of six: an axis between them, and along it nearly all is kept.
    assert row["kept"][0] > 0.9 > 0.2 > max(row["kept"][1:])


def test_of_many_clients_the_first_have_coordinates_and_none_kinship(
    monkeypatch: pytest.MonkeyPatch,
):
    whole = trace_of(fitted())
    monkeypatch.setattr(trace, "MAX_CLIENTS", 5)
    row = trace_of(fitted())
    assert row["members"] == 12
    assert row["clients"] == [10, 11, 12, 13, 14]
    assert row["uploads"] == whole["uploads"][:5]
    assert row["generated"] == whole["generated"][:5]
    assert "mixing-weights" not in row


def test_clients_of_which_nothing_is_generated_have_their_uploads():
    aggregator = fitted()
    aggregator.model, aggregator.mixing = None, torch.eye(12, dtype=torch.float64)
    row = trace_of(aggregator)
    assert row["generated"] == row["uploads"]
    assert row["mixing-weights"] == np.eye(12).tolist()
    assert "rank" not in row


def test_one_member_tells_nothing():
    assert trace_of(fitted(num_clients=1)) == {}


def test_equal_uploads_lie_in_one_point():
    aggregator = GenerativeAggregator(torch.zeros(20), DiffusionConfig(train_steps=1))
    for client in range(3):
        aggregator.observe(client, torch.ones(20))
    aggregator.fit(1)
    row = trace_of(aggregator)
    assert row["uploads"] == row["generated"] == [[0.0, 0.0]] * 3
    json.dumps(row, allow_nan=False)
