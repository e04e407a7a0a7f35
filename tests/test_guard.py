"""Who is unusual, and that nobody learns from them."""

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from simulated_grid import SimulatedGrid, learning_site, upload, weights
from torch import Tensor

from pfedgpa_app.aggregation import GenerativeAggregator
from pfedgpa_app.bank import MAX_AGE, Standing
from pfedgpa_app.config import DiffusionConfig
from pfedgpa_app.diffusion.signal import SKETCH, sketched
from pfedgpa_app.guard import MEMORY, Guard, Move, cosines_with_others, misfits
from pfedgpa_app.parameters import ParameterLayout
from pfedgpa_app.randomness import make_generator
from server_app.strategies import ClientwiseFedAvg, PFedGPA

DIM = 400
ONES = torch.ones(SKETCH)


def honest_moves(num_clients: int, groups: Tensor, seed: int = 3) -> Tensor:
    """Return moves of which a third of the length each is everyone's, a group's and a client's."""
    generator = make_generator(seed)
    common = torch.randn(DIM, generator=generator)
    centres = torch.randn(int(groups.max()) + 1, DIM, generator=generator)
    return common + centres[groups] + torch.randn(num_clients, DIM, generator=generator)


def outliers_of(moves: Tensor) -> set[int]:
    """Return who is unusual in a first round."""
    return set(found(moves, moves))


def found(moves: Tensor, positions: Tensor) -> dict[int, str]:
    """Return who is unusual, and why, of clients that moved and came so far, ``(n, DIM)``."""
    layout = ParameterLayout.of({"weight": torch.zeros(DIM)})
    sent = {"weight": torch.zeros(DIM)}
    made = {row: Move.of(layout, sent, {"weight": move}) for row, move in enumerate(moves)}
    return Guard().find_outliers(made, dict(enumerate(positions)), torch.zeros(DIM), len(moves))


@pytest.mark.parametrize(
    "sizes", [[20], [4, 4, 4, 4, 4], [1] * 20, [15, 5], [19, 1]], ids=lambda sizes: f"{sizes}"
)
def test_honest_clients_are_usual_whatever_groups_they_are_in(sizes: list[int]):
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    for seed in range(10):
        assert outliers_of(honest_moves(20, groups, seed)) == set()


LIES = {
    "ten times as far": lambda move: 10 * move,
    "the other way": lambda move: -move,
    "far in any direction": lambda move: 100 * torch.randn(DIM, generator=make_generator(0)),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
@pytest.mark.parametrize("num_liars", [1, 4, 6])
def test_less_than_half_are_found_that_move_unlike_the_others(lie, num_liars: int):
    moves = honest_moves(20, torch.arange(20) % 5)
    for row in range(num_liars):
        moves[row] = lie(moves[row])
    assert outliers_of(moves) == set(range(num_liars))


def test_who_went_far_step_by_step_is_found():
    moves = honest_moves(20, torch.arange(20) % 5)
    positions = 5 * moves
    positions[7] *= 3
    [(row, reason)] = found(moves, positions).items()
    assert row == 7
    assert reason.startswith("it came")


def test_up_to_three_clients_are_not_judged():
    moves = honest_moves(3, torch.zeros(3, dtype=torch.int64))
    moves[0] *= 1000
    assert outliers_of(moves) == set()


def test_clients_that_do_not_move_are_usual():
    assert outliers_of(torch.zeros(10, DIM)) == set()


@given(seed=st.integers(0, 2**31), scale=st.floats(1e-6, 1e6), num_liars=st.integers(0, 9))
def test_those_who_lie_cannot_make_others_unusual(seed: int, scale: float, num_liars: int):
    moves = honest_moves(20, torch.zeros(20, dtype=torch.int64), seed)
    generator = make_generator(seed, "liars")
    moves[:num_liars] = scale * torch.randn(num_liars, DIM, generator=generator)
    assert outliers_of(moves) <= set(range(num_liars))


def test_cosines_are_those_with_the_mean_direction_of_the_others():
    moves = honest_moves(6, torch.arange(6) % 2)
    units = moves.double().numpy()
    units = units / np.linalg.norm(units, axis=1, keepdims=True)
    expected = []
    for row in range(6):
        others = np.delete(units, row, axis=0).mean(axis=0)
        expected.append(units[row] @ others / np.linalg.norm(others))
    np.testing.assert_allclose(cosines_with_others(list(moves)), expected, rtol=1e-12)


def fitted(vector: Tensor) -> GenerativeAggregator:
    """Return what learned from seven clients, and was given an eighth that is kept apart."""
    aggregator = GenerativeAggregator(torch.zeros(DIM), DiffusionConfig(train_steps=5))
    moves = honest_moves(7, torch.arange(7) % 2)
    for client in range(7):
        aggregator.observe(client, moves[client])
    aggregator.observe(7, vector, is_outlier=True)
    aggregator.fit(1)
    return aggregator


def test_nobody_learns_from_who_is_quarantined_and_its_model_is_its_upload():
    near, far = (fitted(torch.full((DIM,), value)) for value in (1.0, 1e6))
    for client in range(7):
        assert torch.equal(near.personalize(client), far.personalize(client))
    assert torch.equal(far.personalize(7), torch.full((DIM,), 1e6))


def test_who_is_quarantined_and_away_stays_where_it_is():
    aggregator = fitted(torch.ones(DIM))
    for client in range(7):
        aggregator.observe(client, aggregator.bank.members[client] + 1)
    aggregator.fit(2)
    assert torch.equal(aggregator.personalize(7), torch.ones(DIM))


def test_who_is_usual_again_is_learned_from_again():
    aggregator = fitted(torch.ones(DIM))
    aggregator.observe(7, torch.zeros(DIM))
    aggregator.fit(2)
    assert sorted(aggregator.bank.members) == list(range(8))
    assert not aggregator.bank.non_members


def test_who_becomes_unusual_leaves_the_bank():
    aggregator = fitted(torch.ones(DIM))
    aggregator.observe(3, torch.full((DIM,), 2.0), is_outlier=True)
    aggregator.fit(2)
    assert sorted(aggregator.bank.members) == [0, 1, 2, 4, 5, 6]
    assert torch.equal(aggregator.personalize(3), torch.full((DIM,), 2.0))


def rounds_without(client: int, aggregator: GenerativeAggregator, last: int) -> None:
    for server_round in range(2, last + 1):
        for other in range(7):
            if other != client:
                aggregator.observe(other, aggregator.bank.members[other])
        aggregator.fit(server_round)


def test_nobody_learns_any_more_from_who_was_not_heard_of_for_long():
    aggregator = fitted(torch.ones(DIM))
    before = aggregator.bank.members[2]
    rounds_without(2, aggregator, 1 + MAX_AGE)
    assert 2 in aggregator.bank.members
    rounds_without(2, aggregator, 2 + MAX_AGE)
    assert 2 not in aggregator.bank.members
    torch.testing.assert_close(aggregator.personalize(2), before)
    aggregator.observe(2, before)
    aggregator.fit(3 + MAX_AGE)
    assert 2 in aggregator.bank.members


def test_where_all_take_part_seldom_old_uploads_are_no_exception():
    """One client a round of thirty: the median upload is fifteen rounds old."""
    aggregator = GenerativeAggregator(torch.zeros(DIM), DiffusionConfig(train_steps=1))
    moves = honest_moves(30, torch.arange(30) % 2)
    for client in range(30):
        aggregator.observe(client, moves[client])
    for server_round in range(1, 61):
        aggregator.observe(server_round % 30, moves[server_round % 30])
        aggregator.fit(server_round)
    assert len(aggregator.bank.members) == 30


def test_where_most_are_gone_the_rest_do_not_wait_for_them_forever():
    aggregator = fitted(torch.ones(DIM))
    for server_round in range(2, 4 + MAX_AGE):
        for client in range(2):
            aggregator.observe(client, torch.full((DIM,), float(server_round + client)))
        aggregator.fit(server_round)
    assert sorted(aggregator.bank.members) == [0, 1]


def test_the_restored_state_knows_who_is_quarantined_and_how_old_uploads_are():
    aggregator = fitted(torch.ones(DIM))
    aggregator.observe(7, torch.ones(DIM), is_outlier=True)
    aggregator.fit(2)
    restored = GenerativeAggregator(torch.zeros(DIM), DiffusionConfig(train_steps=5))
    restored.restore(aggregator.state())
    clients = restored.bank.clients
    assert [client for client in clients if clients[client].standing is Standing.QUARANTINED] == [7]
    assert [clients[client].seen for client in range(8)] == [*[1] * 7, 2]
    assert [clients[client].interval for client in range(8)] == [*[None] * 7, 1]
    uploads = {client: vector + 1 for client, vector in aggregator.bank.members.items()}
    for one in (aggregator, restored):
        for client, vector in uploads.items():
            one.observe(client, vector)
        one.fit(3)
    for client in range(8):
        assert torch.equal(aggregator.personalize(client), restored.personalize(client))


def lying(message: Message) -> RecordDict:
    """Answer as a site that sends ten times its update, and much of it."""
    if message.metadata.message_type == MessageType.EVALUATE:
        return learning_site(1.0)(message)
    return upload(weights(-50.0), **{"accuracy-after": 0.5})


def run(node_8, guard: bool = True) -> tuple[PFedGPA, dict[int, float]]:
    """Return the strategy, and what nodes 0 .. 6 were sent in the last round."""
    nodes = {node: learning_site(1.0 + node / 10) for node in range(7)}
    grid = SimulatedGrid({**nodes, 8: node_8})
    strategy = PFedGPA(diffusion=DiffusionConfig(guard=guard, train_steps=5))
    strategy.start(grid, ArrayRecord(weights(0.0)), num_rounds=3)
    sent = [m for m in grid.sent if m.metadata.message_type == MessageType.EVALUATE][-8:]
    values = {
        m.metadata.dst_node_id: float(
            m.content["arrays"].to_torch_state_dict()["layer.weight"][0, 0]
        )
        for m in sent
    }
    return strategy, values


def test_a_liar_is_served_its_own_upload_and_changes_nothing_for_others():
    strategy, values = run(lying)
    _, without = run(lambda message: None)
    assert values.pop(8) == -50.0
    assert values == {node: without[node] for node in values}
    assert "times as far as the median client" in strategy.record.clients[7]["unusual"]
    assert strategy.record.clients[7]["status"] == "ok"


def test_without_the_guard_a_liar_moves_the_others():
    strategy, values = run(lying, guard=False)
    _, without = run(lambda message: None)
    assert abs(values[0] - without[0]) > 0.1
    assert not strategy.outliers


def test_nobody_counts_in_an_average_for_more_than_ten_times_the_median_client():
    def site(value: float, num_examples: int):
        return lambda message: (
            RecordDict()
            if message.metadata.message_type == MessageType.EVALUATE
            else upload(weights(value), num_examples)
        )

    grid = SimulatedGrid({1: site(1.0, 10), 2: site(1.0, 10), 3: site(13.0, 10**9)})
    strategy = ClientwiseFedAvg(fraction_evaluate=0.0)
    result = strategy.start(grid, ArrayRecord(weights(0.0)), num_rounds=1)
    average = result.arrays.to_torch_state_dict()["layer.weight"]
    torch.testing.assert_close(average, torch.full((2, 2), 1.0 + 12.0 * 100 / 120))


STATE = {
    "layer.weight": torch.zeros(30, 10),
    "layer.bias": torch.zeros(10),
    "body.weight": torch.zeros(40, 10),
    "norm.running_mean": torch.zeros(10),
    "norm.num_batches_tracked": torch.tensor(0),
}
LAYOUT = ParameterLayout.of(STATE, ["layer.*"])
BODY = slice(310, 710)  # after the generated layer, before the statistics


def in_states(vectors: Tensor) -> list[dict[str, Tensor]]:
    """Return vectors ``(n, 720)`` as states of a model whose body is averaged."""
    states = []
    for vector in vectors:
        pieces = vector.split([300, 10, 400, 10])
        floats = dict(zip(list(STATE)[:4], pieces, strict=True))
        states.append({name: floats.get(name, t).reshape(t.shape) for name, t in STATE.items()})
    return states


def common_moves(num_clients: int, seed: int = 0) -> Tensor:
    """Return moves ``(num_clients, 720)`` that have a direction in common."""
    generator = make_generator(seed, "common")
    common = torch.randn(720, generator=make_generator(0))
    return common + torch.randn(num_clients, 720, generator=generator)


def compared(guard: Guard, moves: dict[int, Tensor], num_connected: int = 20) -> dict[int, str]:
    """Return whom a guard finds of those that moved from 0."""
    states = dict(zip(moves, in_states(torch.stack(list(moves.values()))), strict=True))
    made = {client: Move.of(LAYOUT, STATE, state) for client, state in states.items()}
    positions = {client: torch.ones(310) for client in range(30)}  # what all of them have by now
    return guard.find_outliers(made, positions, torch.zeros(310), num_connected)


def in_place(part: slice, change) -> Tensor:
    moves = common_moves(12)
    moves[3, part] = change(moves, part)
    return moves


HIDDEN = {
    "one number of the statistics": (slice(712, 713), lambda m, p: 100.0),
    "all statistics": (slice(710, 720), lambda m, p: m[3, p] + 100),
    "averaged layers, 50 times back": (BODY, lambda m, p: -50 * m[3, p]),
    "averaged layers, against the others": (BODY, lambda m, p: -m[3, p]),
    "averaged layers, so that the average is 0": (BODY, lambda m, p: -11 * m[:, p].mean(dim=0)),
    "one number of an averaged layer": (slice(500, 501), lambda m, p: 30.0),
    "ten numbers of the generated ones": (slice(300, 310), lambda m, p: 10 * m[3, p]),
}


@pytest.mark.parametrize(("part", "change"), HIDDEN.values(), ids=HIDDEN.keys())
def test_a_lie_in_a_part_of_the_model_is_found(part: slice, change):
    assert compared(Guard(), dict(enumerate(common_moves(12)))) == {}
    assert set(compared(Guard(), dict(enumerate(in_place(part, change))))) == {3}


def filled(rounds: int = 4) -> Guard:
    """Return a guard that has seen rounds of four of twenty honest clients."""
    guard = Guard()
    for number in range(rounds):
        clients = range(4 * number, 4 * number + 4)
        moves = common_moves(4, seed=number)
        assert compared(guard, dict(zip(clients, moves, strict=True))) == {}
    return guard


@pytest.mark.parametrize("lie", LIES.keys())
def test_in_a_small_round_liars_are_found_although_they_are_most_of_it(lie: str):
    honest, *lying = common_moves(4, seed=9)
    noise = torch.randn(720, generator=make_generator(5))
    lies = [100 * noise if "any" in lie else LIES[lie](move) for move in lying]
    round_of_four = dict(zip((19, 16, 17, 18), [honest, *lies], strict=True))
    guard = filled()
    assert set(compared(guard, round_of_four)) == {16, 17, 18}
    assert not {16, 17, 18} & set(guard.memory)  # what they did is no measure of others
    restored = Guard()
    restored.restore(filled().state())
    assert set(compared(restored, round_of_four)) == {16, 17, 18}
    assert set(compared(Guard(), round_of_four)) != {16, 17, 18}


def test_of_few_clients_it_is_remembered_how_they_moved():
    guard = filled(rounds=7)
    assert list(guard.memory) == list(range(28 - MEMORY, 28))
    assert sum(tensor.numel() for tensor in guard.state().values()) < MEMORY * 5000


@pytest.mark.parametrize(("num_connected", "is_used"), [(3, True), (20, False)])
def test_who_cannot_be_compared_is_not_learned_from_where_there_are_more(
    num_connected: int, is_used: bool
):
    guard, moves = Guard(), dict(enumerate(common_moves(3)))
    reasons = compared(guard, moves, num_connected)
    assert set(reasons) == (set() if is_used else {0, 1, 2})
    assert all("only 3 are known" in reason for reason in reasons.values())
    later = dict(zip(range(3, 6), common_moves(3, seed=1), strict=True))
    assert compared(guard, later, num_connected) == {}  # six are enough


def test_halves_that_contradict_each_other_or_the_upload_are_found():
    generator = make_generator(0)
    common = torch.randn(SKETCH, generator=generator)
    moves = common + torch.randn(8, SKETCH, generator=generator)
    halves = moves[:, None] + torch.randn(8, 2, SKETCH, generator=generator)
    assert misfits(list(halves), list(moves)) == {}
    halves[2, 1] = -halves[2, 0]
    halves[5] *= -1
    found = misfits(list(halves), list(moves))
    assert set(found) == {2, 5}
    assert "its halves is -1.00" in found[2]
    assert "its halves with its move" in found[5]


def test_in_the_middle_of_four_no_positive_cosine_is_against_anybody():
    halves, moves = torch.eye(4, SKETCH)[[0, 0, 0, 0]], torch.eye(4, SKETCH)
    reported = [torch.stack([half, half]) for half in halves]
    tilted = [moves[0], moves[0], 0.4 * moves[0] + moves[1], 0.4 * moves[0] + moves[2]]
    assert misfits(reported, tilted) == {}


def telling(pull: float, lies=lambda server_round, halves: halves):
    """Return a site that reports halves, or what it makes of them in a round."""

    def answer(message: Message) -> RecordDict:
        reply = learning_site(pull)(message)
        if "extras" in message.content:
            state, start = (
                part["arrays"].to_torch_state_dict() for part in (reply, message.content)
            )
            vector, before = (
                torch.cat([each["layer.weight"].flatten(), each["layer.bias"]])
                for each in (state, start)
            )
            server_round = message.content["config"]["server-round"]
            halves = lies(server_round, sketched(vector - before).expand(2, -1).clone())
            if halves is not None:
                reply["extras"] = ArrayRecord({"halves": halves})
        return reply

    return answer


class Watched(PFedGPA):
    """PFedGPA that remembers who was unusual in each round, and whose halves it then had."""

    seen: tuple = ()

    def learn(self, server_round, uploads):
        super().learn(server_round, uploads)
        with_halves = {c for c in uploads if self.aggregator.bank.of(c).halves is not None}
        self.seen += ((set(self.outliers), with_halves),)


def test_whose_halves_do_not_fit_is_not_learned_from_until_they_do():
    """What all clients did is known by what each of them says, newcomers too."""

    def lies(server_round: int, halves: Tensor) -> Tensor | None:
        return {1: torch.stack([ONES, -ONES]), 2: None}.get(server_round, halves)

    others = {n: telling(1 + n / 10) for n in range(6)}
    strategy = Watched(diffusion=DiffusionConfig(train_steps=5))
    strategy.start(
        SimulatedGrid({**others, 6: telling(1.6, lies)}), ArrayRecord(weights(0.0)), num_rounds=3
    )
    honest = set(range(6))
    assert strategy.seen == (({6}, honest), ({6}, honest), (set(), honest | {6}))


def test_whose_halves_never_fit_is_asked_again_in_every_second_round():
    requested = []

    def lies(server_round: int, halves: Tensor) -> Tensor:
        requested.append(server_round)
        return torch.stack([ONES, -ONES])

    others = {n: telling(1 + n / 10) for n in range(6)}
    strategy = Watched(diffusion=DiffusionConfig(train_steps=5))
    strategy.start(
        SimulatedGrid({**others, 6: telling(1.6, lies)}), ArrayRecord(weights(0.0)), num_rounds=4
    )
    assert requested == [1, 3]
    assert [outliers for outliers, _ in strategy.seen] == 4 * [{6}]


def test_halves_that_did_not_fit_count_only_where_there_are_enough_to_compare_them_with():
    def lies(server_round: int, halves: Tensor) -> Tensor:
        if server_round == 1:
            for node in range(3):
                grid.nodes.pop(node, None)  # from the next round on
        return torch.stack([ONES, -ONES])

    grid = SimulatedGrid({**{n: telling(1 + n / 10) for n in range(5)}, 5: telling(1.5, lies)})
    strategy = Watched(diffusion=DiffusionConfig(train_steps=5), fraction_evaluate=0.0)
    strategy.start(grid, ArrayRecord(weights(0.0)), num_rounds=2)
    assert [outliers for outliers, _ in strategy.seen] == [{5}, set()]


def test_where_rounds_are_too_small_clients_are_compared_once_enough_are_known():
    grid = SimulatedGrid({node: learning_site(1 + node / 20) for node in range(12)})
    strategy = Watched(
        diffusion=DiffusionConfig(train_steps=5, sharing="affinity"),
        fraction_train=0.25,
        fraction_evaluate=0.0,
    )
    strategy.start(grid, ArrayRecord(weights(0.0)), num_rounds=4)
    outliers = [len(outliers) for outliers, _ in strategy.seen]
    assert outliers == [3, 0, 0, 0]


@pytest.mark.parametrize("num_sites", [3, 4])
def test_a_round_that_is_too_small_to_compare_clients_says_so(num_sites: int, caplog):
    caplog.set_level("INFO")
    grid = SimulatedGrid({node: learning_site(1.0) for node in range(num_sites)})
    strategy = PFedGPA(diffusion=DiffusionConfig(train_steps=5), fraction_evaluate=0.0)
    strategy.start(grid, ArrayRecord(weights(0.0)), num_rounds=1)
    assert ("no outlier detection, with uploads of 3 clients" in caplog.text) == (num_sites == 3)


def test_a_run_that_goes_on_remembers_how_clients_moved():
    grid = SimulatedGrid({node: learning_site(1.0) for node in range(5)})
    first, second = (PFedGPA(diffusion=DiffusionConfig(train_steps=5)) for _ in range(2))
    first.start(grid, ArrayRecord(weights(0.0)), num_rounds=1)
    second.begin(first.global_model.spec)
    second.restore(first.state())
    assert list(second.guard.memory) == list(first.guard.memory) == list(range(5))
    for client, row in first.guard.memory.items():
        assert torch.equal(second.guard.memory[client], row)
