"""What a large model costs the server: the bank, and little beside it."""

import pytest

from benchmarks.scaling import measure


@pytest.mark.parametrize("mode", ["whole", "per-layer"])
def test_twenty_resnets_take_less_than_three_times_the_memory_of_their_bank(mode: str):
    result = measure("resnet18", mode)
    assert result["dim"] > 11_000_000
    assert result["memory"] < 3
    # Four clients a group: their mean has half of the noise's deviation.
    assert result["error"] < 0.6
