"""Clients that come late, go and come back in whole runs."""

from collections.abc import Collection, Mapping

import pytest
import torch

from benchmarks.onboarding import NearestMember
from pfedgpa_app.config import Config
from server_app.app import make_strategy
from server_app.simulation import simulate
from server_app.strategies import PFedGPA

# Groups of three, apart; client i is in group i % 2.
SETTINGS = {
    "num-server-rounds": 9,
    "data.test-samples": 40,
    "client.local-epochs": 3,
    "client.learning-rate": 0.05,
    "diffusion.measure-every": 3,
    "diffusion.train-steps": 20,
    "onboarding.rounds": 1,
}


def run(
    absent: Mapping[int, Collection[int]], make=make_strategy, **settings
) -> tuple[PFedGPA, dict[int, dict[int, float]]]:
    """Return the strategy, and the accuracy of whoever trained, by round and node."""
    accuracies: dict[int, dict[int, float]] = {}

    def note(record) -> None:
        accuracies[record.server_round] = {
            int(row["node-id"]): row["personalized-accuracy"]
            for row in record.clients.values()
            if row.get("status") == "ok"
        }

    config = Config.from_flat({**SETTINGS, **settings})
    strategy, _ = simulate(
        config,
        6,
        num_processes=0,
        on_round=note,
        absent=lambda server_round: absent.get(server_round, ()),
        make_strategy=make,
    )
    assert isinstance(strategy, PFedGPA)
    return strategy, accuracies


def mean_of_last(accuracies: dict[int, dict[int, float]], nodes: Collection[int]) -> float:
    values = [accuracies[number][node] for number in (7, 8, 9) for node in nodes]
    return sum(values) / len(values)


@pytest.fixture(scope="module")
def everyone() -> dict[int, dict[int, float]]:
    return run({})[1]


@pytest.mark.parametrize(
    ("away", "rounds"),
    [((1, 3, 5), range(3, 5)), ((1, 3, 5), range(1, 4)), ((5,), range(1, 5))],
    ids=["a group is away", "newcomers found a group", "a newcomer"],
)
def test_who_was_away_catches_up_and_others_lose_nothing(
    away: Collection[int], rounds: range, everyone: dict[int, dict[int, float]]
):
    strategy, accuracies = run(dict.fromkeys(rounds, away))
    for server_round, found in accuracies.items():
        assert found.keys() == set(range(6)) - set(away if server_round in rounds else ())
    assert len(strategy.aggregator.bank.members) == 6
    assert not any(c.rounds_onboarded for c in strategy.aggregator.bank.clients.values())
    others = set(range(6)) - set(away)
    assert mean_of_last(accuracies, others) > mean_of_last(everyone, others) - 0.03
    assert mean_of_last(accuracies, away) > mean_of_last(everyone, away) - 0.15


def test_newcomers_may_be_given_the_nearest_members_model():
    strategy, _ = run(
        {1: (5,)}, NearestMember.of, **{"num-server-rounds": 3, "onboarding.rounds": 2}
    )
    assert list(strategy.aggregator.bank.non_members) == [5]
    [guest] = strategy.aggregator.bank.non_members.values()
    models = [strategy.aggregator.personalize(member) for member in range(5)]
    assert any(torch.equal(guest, model) for model in models)
