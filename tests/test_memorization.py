"""The measures of memorization, on models whose predictions are given."""

import pytest
import torch

from benchmarks import memorization
from pfedgpa_app.config import Config


def test_distance_shared_errors_and_accuracy_are_those_of_hand_computation(
    monkeypatch: pytest.MonkeyPatch,
):
    labels = torch.tensor([0, 1, 2, 0, 1])
    # By a vector's first entry: the upload has two errors, the model one of them and one more.
    classes = {
        0.0: torch.tensor([1, 1, 2, 2, 1]),
        3.0: torch.tensor([1, 1, 0, 0, 1]),
    }
    monkeypatch.setattr(
        memorization, "_predict", lambda config, client, vector: (labels, classes[float(vector[0])])
    )
    uploads = {7: torch.tensor([0.0, 0.0])}
    models = {7: torch.tensor([3.0, 4.0])}
    row = memorization._row(Config(), models, {7: 7}, uploads, unit=2.0)
    # Of three images that one of the two gets wrong, one is shared.
    assert row == pytest.approx([5 / 2, 1 / 3, 3 / 5])
    assert memorization._row(Config(), uploads, {7: 7}, uploads, unit=2.0) == [0.0, 1.0, 3 / 5]
