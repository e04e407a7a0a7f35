"""What a large model costs the server: the bank, and little beside it."""

import json

import pytest

from benchmarks import many_clients
from benchmarks.scaling import measure


def test_twenty_large_models_take_less_than_three_times_the_memory_of_their_bank():
    result = measure("mlp of 50,000 features", "whole")
    assert result["dim"] > 3_000_000
    assert result["memory"] < 3
    # Four clients a group: their mean has half of the noise's deviation.
    assert result["error"] < 0.6


def test_what_is_on_disk_is_in_no_checkpoint_and_models_are_those_of_the_group(
    capsys: pytest.CaptureFixture[str],
):
    many_clients.main(clients=300, members=100, bank="disk", dim=20_000, rounds=1)
    result = json.loads(capsys.readouterr().out)
    # 100 members, as many newly archived on disk alone, and sketches of 16 KB a client.
    assert result["megabytes"] * 2**20 < 100 * 20_000 * 4 * 1.5 + 300 * 2**14
    # Twenty members a group: their mean has less than a quarter of the noise's deviation.
    assert result["error"] < 0.3
