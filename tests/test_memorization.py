"""The measure of memorization."""

import pytest
import torch

from benchmarks.memorization import shared_errors


def test_shared_errors_are_a_part_of_those_of_either():
    labels = torch.tensor([0, 1, 2, 0, 1])
    one, other = torch.tensor([1, 1, 2, 2, 1]), torch.tensor([1, 1, 0, 0, 1])
    # Of three examples that one of the two gets wrong, one is shared.
    assert shared_errors(labels, one, other) == pytest.approx(1 / 3)
    assert shared_errors(labels, one, one) == 1
    assert shared_errors(labels, labels, labels) == 0
