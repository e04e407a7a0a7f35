"""The strategies on a grid without network."""

import pytest
import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from simulated_grid import Answer, SimulatedGrid, received, site, start, upload, weights

from pfedgpa_app.config import Config, DiffusionConfig, OnboardingConfig
from pfedgpa_app.model_spec import ModelSpec
from server_app import roster as roster_module
from server_app.roster import JoinTimeoutError, PartitionRoster, Roster
from server_app.simulation import simulate
from server_app.strategies import ClientwiseFedAvg, FedAvgFT, PFedGPA
from server_app.strategies.local import Local

# The nodes here move along one direction, in which some of them must be against the others.
UNGUARDED = DiffusionConfig(guard=False)


def test_fedavg_sends_everyone_the_average_weighted_by_examples():
    grid = SimulatedGrid({1: site(1.0, 30), 2: site(5.0, 10)})
    result = start(ClientwiseFedAvg(), grid)
    assert received(grid, "train") == [{1: 0.0, 2: 0.0}, {1: 2.0, 2: 2.0}]
    assert received(grid, "evaluate") == [{1: 2.0, 2: 2.0}] * 2
    state = result.arrays.to_torch_state_dict()
    assert torch.equal(state["norm.running_mean"], torch.full((2,), 20.0))
    assert state["norm.num_batches_tracked"] == 2


def test_local_sends_everyone_its_own_upload_and_the_initial_model_before():
    grid = SimulatedGrid({1: site(1.0), 2: Sometimes(site(5.0), {2})})
    start(Local(), grid, num_rounds=3)
    first, second, third = {1: 0.0, 2: 0.0}, {1: 1.0, 2: 0.0}, {1: 1.0, 2: 5.0}
    assert received(grid, "train") == [first, second, third]
    assert received(grid, "evaluate") == [second, third, third]


@pytest.mark.parametrize(
    ("own_weight", "evaluated"), [(1.0, {1: 1.0, 2: 5.0}), (0.5, {1: 2.0, 2: 4.0})]
)
def test_fedavg_ft_trains_from_the_average_and_evaluates_the_fine_tuned(
    own_weight: float, evaluated: dict[int, float]
):
    grid = SimulatedGrid({1: site(1.0), 2: site(5.0)})
    start(FedAvgFT(own_weight=own_weight), grid)
    assert received(grid, "train") == [{1: 0.0, 2: 0.0}, {1: 3.0, 2: 3.0}]
    assert received(grid, "evaluate") == [evaluated] * 2


class Sometimes:
    """A node that trains in some rounds only, and otherwise gives no reply."""

    def __init__(self, node: Answer, rounds: set[int]) -> None:
        self.node = node
        self.rounds = rounds

    def __call__(self, message: Message) -> RecordDict | Error | None:
        is_train = message.metadata.message_type == MessageType.TRAIN
        if is_train and message.content["config"]["server-round"] not in self.rounds:
            return None
        return self.node(message)


def groups() -> dict[int, Answer]:
    """Return 8 nodes, of which the even ones have weights about 1 and the odd ones about -1."""
    return {node: site((-1.0) ** node * (1 + node / 100)) for node in range(8)}


def test_pfedgpa_sends_each_node_parameters_of_its_own_group():
    grid = SimulatedGrid(groups())
    start(PFedGPA(), grid)
    generated = received(grid, "train")[1]
    for node, value in generated.items():
        assert value == pytest.approx((-1.0) ** node, abs=0.2)
    assert len(set(generated.values())) == 8
    # Four are in a group, so that others supply three quarters of what sets each apart. An eighth
    # of the way to its own upload is what it holds.
    held = received(grid, "evaluate")[0]
    for node, value in generated.items():
        upload = (-1.0) ** node * (1 + node / 100)
        assert held[node] == pytest.approx(value + (upload - value) / 8, abs=1e-3)


def test_who_was_not_in_the_round_holds_the_generated_model():
    nodes = groups()
    strategy = PFedGPA(diffusion=DiffusionConfig(own_weight=1.0))
    start(strategy, SimulatedGrid(nodes), num_rounds=1)
    del nodes[0]
    strategy.aggregator.observe(7, strategy.aggregator.bank.members[7] + 1)
    strategy.aggregator.fit(2)
    models = {
        name: [float(state["layer.weight"][0, 0]) for state in states([6, 7])]
        for name, states in (
            ("sent", strategy.training_states),
            ("held", strategy.evaluation_states),
        )
    }
    uploads = strategy.aggregator.bank.members
    assert models["held"][0] == models["sent"][0] != float(uploads[6][0])
    upload = float(uploads[7][0])
    assert abs(models["held"][1] - upload) < abs(models["sent"][1] - upload)


def test_clients_whose_uploads_are_noised_hold_the_generated_model():
    grid = SimulatedGrid(groups())
    start(PFedGPA(noised=True), grid)
    assert received(grid, "evaluate")[0] == received(grid, "train")[1]


def test_pfedgpa_averages_what_is_not_generated():
    grid = SimulatedGrid(groups())
    strategy = PFedGPA(diffusion=DiffusionConfig(generated_layers="layer.bias"))
    start(strategy, grid, num_rounds=1)
    for client in range(8):
        state = strategy.evaluation_state(client)
        torch.testing.assert_close(state["layer.weight"], strategy.average["layer.weight"])
        torch.testing.assert_close(
            state["norm.running_mean"], strategy.average["norm.running_mean"]
        )
        assert float(state["layer.bias"][0]) == pytest.approx(-((-1.0) ** client), abs=0.2)


def test_pfedgpa_gives_the_same_whatever_the_node_ids():
    """With partitions asked for, nothing depends on ids and the order of replies."""

    def run(ids: list[int]) -> list[float]:
        nodes = dict(zip(ids, groups().values(), strict=True))
        grid = SimulatedGrid(nodes, {node: partition for partition, node in enumerate(ids)})
        strategy = PFedGPA(roster=PartitionRoster(), fraction_train=0.5, seed=3)
        start(strategy, grid, num_rounds=3)
        return [
            float(strategy.evaluation_state(client)["layer.weight"][0, 0]) for client in range(8)
        ]

    assert run(list(range(100, 108))) == run([55, 3, 2**62, 17, 9, 1000, 4, 12])


def test_a_node_unknown_to_pfedgpa_gets_the_average():
    grid = SimulatedGrid({**groups(), 8: Sometimes(site(1.0), set())})
    strategy = PFedGPA(diffusion=UNGUARDED)
    start(strategy, grid)
    average = float(strategy.average["layer.weight"][0, 0])
    assert received(grid, "train")[1][8] == pytest.approx(average)


BAD = {
    "error": Error(code=0, reason="boom"),
    "no reply": None,
    "NaN": upload({**weights(1.0), "layer.bias": torch.tensor([float("nan"), 0.0])}),
    "wrong shape": upload({**weights(1.0), "layer.bias": torch.ones(9)}),
    "far off": upload(weights(1e9)),
    "absurd accuracy": upload(weights(1.0), **{"accuracy-after": 1e308}),
    "renamed": upload({"x": torch.ones(2)}),
    "no contrast": upload(weights(1.0), **{"image-mean": [1.0], "image-std": [0.0]}),
}


def quick_pfedgpa() -> PFedGPA:
    return PFedGPA(diffusion=DiffusionConfig(train_steps=20))


@pytest.mark.parametrize("strategy", [ClientwiseFedAvg, Local, FedAvgFT, quick_pfedgpa])
def test_bad_replies_cost_their_senders_the_round_and_nobody_else(strategy):
    bad = {node: lambda message, reply=reply: reply for node, reply in enumerate(BAD.values(), 8)}
    faulty = strategy()
    start(faulty, SimulatedGrid({**groups(), **bad}))
    assert faulty.record.num_failures == len(BAD)
    for client, name in enumerate(BAD, 8):
        assert faulty.record.clients[client]["status"] != "ok", name
        assert "accuracy-after" not in faulty.record.clients[client], name
    without = strategy()
    start(without, SimulatedGrid(groups()))
    for client in range(8):
        for name, tensor in without.evaluation_state(client).items():
            assert torch.equal(faulty.evaluation_state(client)[name], tensor)


def telling(value: float, mean: float, **others: list[int]) -> Answer:
    """Return a node that reports how its images are normalized."""
    reported = {"image-mean": [mean], "image-std": [2.0], **others}
    return lambda message: upload(weights(value), **reported)


def test_the_server_keeps_what_clients_last_reported_of_their_data():
    first = {1: telling(1.0, 5.0, partition=[0, 3]), 2: site(1.0), 3: telling(1.0, 7.0)}
    grid = SimulatedGrid(first)
    strategy = ClientwiseFedAvg(fraction_evaluate=0.0)
    start(strategy, grid, num_rounds=1)
    # The first client reports something new, the third nothing any more.
    grid.nodes = {1: telling(1.0, 6.0, partition=[0, 3]), 2: site(1.0), 3: site(1.0)}
    start(strategy, grid, num_rounds=1)
    assert strategy.sites.keys() == {0, 2}
    assert strategy.sites[0]["image-stats"].tolist() == [[6.0], [2.0]]
    assert strategy.sites[0]["partition"].tolist() == [0, 3]
    assert strategy.sites[2]["image-stats"].tolist() == [[7.0], [2.0]]


def test_a_client_whose_data_are_another_partition_is_refused():
    strategy = ClientwiseFedAvg(fraction_evaluate=0.0)
    grid = SimulatedGrid({1: telling(1.0, 5.0, partition=[0, 3]), 2: site(1.0)})
    start(strategy, grid, num_rounds=1)
    grid.nodes = {1: telling(9.0, 5.0, partition=[0, 6]), 2: site(1.0)}
    start(strategy, grid, num_rounds=1)
    assert "are partition 0 of 6, and were 0 of 3" in strategy.record.clients[0]["status"]
    assert strategy.record.clients[1]["status"] == "ok"
    assert float(strategy.average["layer.weight"][0, 0]) == 1.0


def test_counters_are_no_part_of_how_far_a_client_moved():
    counting = upload({**weights(1.0), "norm.num_batches_tracked": torch.tensor(10**9)})
    grid = SimulatedGrid({**groups(), 8: lambda message: counting})
    strategy = ClientwiseFedAvg(fraction_evaluate=0.0)
    start(strategy, grid, num_rounds=1)
    assert strategy.record.num_failures == 0


def test_of_an_upload_that_is_not_used_nothing_is_kept():
    grid = SimulatedGrid({**groups(), 8: telling(1e9, 5.0)})
    strategy = ClientwiseFedAvg(fraction_evaluate=0.0)
    start(strategy, grid, num_rounds=1)
    assert strategy.record.clients[8]["status"] != "ok"
    assert strategy.sites == {}


@pytest.mark.parametrize("strategy", [Local, PFedGPA])
def test_what_clients_report_of_their_data_survives_a_checkpoint(strategy):
    before = strategy(fraction_evaluate=0.0)
    grid = SimulatedGrid({1: telling(1.0, 5.0), 2: telling(2.0, 6.0, partition=[1, 2])})
    start(before, grid, num_rounds=1)
    after = strategy(spec=ModelSpec.of_state(weights(0.0)))
    after.restore(before.state())
    assert after.sites.keys() == {0, 1}
    for client, reported in before.sites.items():
        assert after.sites[client].keys() == reported.keys()
        assert all(
            torch.equal(after.sites[client][name], tensor) for name, tensor in reported.items()
        )
    assert after.average.keys() == weights(0.0).keys()


def test_a_round_without_any_reply_changes_nothing():
    nodes = {node: Sometimes(answer, {1}) for node, answer in groups().items()}
    grid = SimulatedGrid(nodes)
    strategy = PFedGPA()
    start(strategy, grid, num_rounds=3)
    assert strategy.record.num_failures == 8
    first, second, third = received(grid, "evaluate")
    assert first == second == third


def configured(
    strategy: ClientwiseFedAvg, grid: SimulatedGrid
) -> tuple[list[Message], list[Message]]:
    """Return the training messages of a first round, and honest replies to them."""
    strategy.begin(ModelSpec.of_state(weights(0.0)))
    messages = list(strategy.configure_train(1, ArrayRecord(weights(0.0)), ConfigRecord(), grid))
    return messages, list(grid.send_and_receive(messages))


def test_replies_that_nobody_asked_for_and_second_ones_are_passed_over():
    grid = SimulatedGrid(groups())
    strategy = ClientwiseFedAvg(fraction_train=0.5)
    messages, replies = configured(strategy, grid)
    outsider = ({*range(8)} - {message.metadata.dst_node_id for message in messages}).pop()
    not_sent = Message(content=RecordDict(), message_type=MessageType.TRAIN, dst_node_id=outsider)
    unasked = Message(upload(weights(2.0)), reply_to=not_sent)
    twice = Message(upload(weights(2.0)), reply_to=messages[0])
    strategy.aggregate_train(1, [*replies, unasked, twice])
    assert strategy.record.num_trained == 4
    assert float(strategy.average["layer.weight"].abs().max()) < 1.5


def test_the_superlinks_word_about_a_node_that_left_is_put_down_to_that_node():
    grid = SimulatedGrid(groups())
    strategy = ClientwiseFedAvg()
    messages, replies = configured(strategy, grid)
    gone = Message(Error(code=3, reason="node unavailable"), reply_to=messages[2])
    gone.metadata.__dict__["_src_node_id"] = 1
    others = [reply for reply in replies if reply.metadata.src_node_id != 2]
    strategy.aggregate_train(1, [gone, *others])
    assert "node unavailable" in strategy.record.clients[2]["status"]
    assert strategy.record.num_trained == 7


def test_a_client_cannot_write_into_other_columns_of_the_report():
    forged = {"personalized-accuracy": 1.0, "round": 99.0, "client": 0.0, "accuracy-after": 0.5}
    nodes = {**groups(), 3: lambda message: upload(weights(1.0), **forged)}
    strategy = ClientwiseFedAvg(fraction_evaluate=0.0)
    start(strategy, SimulatedGrid(nodes), num_rounds=1)
    row = strategy.record.clients[3]
    assert (row["round"], row["client"], row["accuracy-after"]) == (1, 3, 0.5)
    assert "personalized-accuracy" not in row


def test_metrics_are_aggregated_by_the_functions_of_fedavg():
    seen = []

    def aggregate(records: list[RecordDict], weighted_by_key: str) -> MetricRecord:
        seen.append([dict(record["metrics"]) for record in records])
        return MetricRecord({"mine": 1.0})

    strategy = ClientwiseFedAvg(train_metrics_aggr_fn=aggregate)
    result = start(strategy, SimulatedGrid({1: site(1.0), 2: site(2.0)}), num_rounds=1)
    assert seen == [[{"num-examples": 10, "accuracy-after": 0.25}] * 2]
    assert result.train_metrics_clientapp[1]["mine"] == 1.0


def test_nodes_that_come_and_go_keep_their_numbers():
    nodes = groups()
    grid = SimulatedGrid(nodes)
    strategy = PFedGPA(diffusion=DiffusionConfig())
    start(strategy, grid, num_rounds=1)
    kept = float(strategy.training_state(7)["layer.weight"][0, 0])
    del nodes[0]
    nodes[50] = site(1.0)
    messages = strategy.configure_train(2, ArrayRecord(strategy.average), ConfigRecord(), grid)
    sent = {message.metadata.dst_node_id: message for message in messages}
    assert sent.keys() == {*range(1, 8), 50}
    assert strategy.roster.client(50) == 8
    state = sent[7].content["arrays"].to_torch_state_dict()
    assert float(state["layer.weight"][0, 0]) == kept


def test_diverged_training_leaves_everyone_its_upload():
    wild = DiffusionConfig(learning_rate=1e30)
    strategy = PFedGPA(diffusion=wild)
    start(strategy, SimulatedGrid(groups()), num_rounds=1)
    for node in range(8):
        value = float(strategy.evaluation_state(node)["layer.weight"][0, 0])
        assert value == pytest.approx((-1.0) ** node * (1 + node / 100))


def test_a_fraction_of_the_clients_is_drawn_from_the_seed():
    def sampled(seed: int) -> list[set[int]]:
        grid = SimulatedGrid(groups())
        start(ClientwiseFedAvg(fraction_train=0.5, seed=seed), grid, num_rounds=3)
        return [set(values) for values in received(grid, "train")]

    assert sampled(0) == sampled(0)
    assert sampled(0) != sampled(1)
    assert all(len(nodes) == 4 for nodes in sampled(0))
    assert len({frozenset(nodes) for nodes in sampled(0)}) > 1


def test_bytes_are_those_of_the_arrays():
    grid = SimulatedGrid({1: site(1.0), 2: site(5.0)})
    strategy = ClientwiseFedAvg()
    start(strategy, grid, num_rounds=1)
    size = ArrayRecord(weights(1.0)).count_bytes()
    assert strategy.record.bytes_up == 2 * size
    assert strategy.record.bytes_down == 4 * size  # to train and to be evaluated


def test_a_roster_numbers_nodes_by_partition_and_gives_nobody_a_number_twice():
    roster = PartitionRoster()
    grid = SimulatedGrid({n: site(0.0) for n in (10, 20, 30, 40)}, {10: 2, 20: 0, 30: 0})
    roster.admit(grid, [10, 20])
    roster.admit(grid, [10, 20, 30, 40])
    assert roster.clients[10] == 2
    assert roster.clients[20] == 0
    assert sorted(roster.clients.values()) == [0, 1, 2, 3]
    assert roster.node_id(2) == 10


def test_a_roster_without_questions_numbers_nodes_by_their_ids():
    roster = Roster()
    roster.admit(SimulatedGrid({}), [30, 10])
    roster.admit(SimulatedGrid({}), [5, 10, 30])
    assert roster.clients == {10: 0, 30: 1, 5: 2}


class Joining(SimulatedGrid):
    """A grid on which a node appears after a number of sent messages."""

    def __init__(self, nodes: dict[int, Answer], newcomer: int, after: int) -> None:
        super().__init__(nodes)
        self.newcomer = newcomer
        self.after = after

    def get_node_ids(self):
        ids = super().get_node_ids()
        return [i for i in ids if i != self.newcomer or len(self.sent) >= self.after]


def test_a_node_that_connects_later_is_onboarded_before_it_counts():
    """In a round of 7 members, 14 messages are sent; node 7 appears in the second round."""
    nodes = groups() | {7: site(-3.0)}
    grid = Joining(nodes, newcomer=7, after=14)
    strategy = PFedGPA(diffusion=UNGUARDED, onboarding=OnboardingConfig(rounds=2))
    start(strategy, grid, num_rounds=3)
    sent = received(grid, "train")
    assert 7 not in sent[0]
    # Its start is the mean of what the members' models are, not the untrained one.
    members = [(-1.0) ** node * (1 + node / 100) for node in range(7)]
    assert sent[1][7] == pytest.approx(sum(members) / 7, abs=1e-5)
    # Then it is drawn to the group that its training went to, never as far out as its upload.
    assert sent[2][7] == pytest.approx(-1.0, abs=0.3)
    # Neither average nor bank know of it before it had its two rounds.
    assert strategy.aggregator.bank.clients[7].rounds_onboarded == 2
    assert set(strategy.aggregator.bank.members) == set(range(7))
    average = float(strategy.average["layer.weight"][0, 0])
    assert average == pytest.approx(sum(members) / 7)
    start(strategy, grid, num_rounds=1)
    assert 7 in strategy.aggregator.bank.members
    assert strategy.aggregator.bank.clients[7].rounds_onboarded == 0


def test_without_rounds_of_onboarding_a_newcomer_is_a_member_at_once():
    grid = Joining(groups(), newcomer=7, after=14)
    strategy = PFedGPA(diffusion=UNGUARDED, onboarding=OnboardingConfig(rounds=0))
    start(strategy, grid)
    assert 7 in strategy.aggregator.bank.members


def test_onboarding_goes_on_after_a_restart():
    grid = Joining(groups(), newcomer=7, after=14)
    strategy = PFedGPA(diffusion=UNGUARDED, onboarding=OnboardingConfig(rounds=2))
    start(strategy, grid)
    again = PFedGPA(
        diffusion=UNGUARDED,
        onboarding=OnboardingConfig(rounds=2),
        spec=ModelSpec.of_state(weights(0.0)),
    )
    again.restore(strategy.state())
    assert again.aggregator.bank.clients[7].rounds_onboarded == 1
    for client in range(8):
        left, right = (s.training_state(client) for s in (strategy, again))
        assert all(torch.equal(left[name], right[name]) for name in left)


LATE = OnboardingConfig(late_clients=3, join_round=3)


@pytest.mark.parametrize(
    "strategy",
    [PFedGPA(onboarding=LATE), Local(onboarding=LATE), ClientwiseFedAvg(onboarding=LATE)],
)
def test_late_clients_take_no_part_before_their_round(strategy: ClientwiseFedAvg):
    grid = SimulatedGrid(groups())
    start(strategy, grid, num_rounds=3)
    for message_type in ("train", "evaluate"):
        sent = received(grid, message_type)
        assert [sorted(each) for each in sent] == [list(range(5))] * 2 + [list(range(8))]


def test_more_late_clients_than_there_are_is_an_error():
    late = OnboardingConfig(late_clients=8, join_round=2)
    with pytest.raises(ValueError, match=r"late-clients = 8: there are only 8"):
        start(ClientwiseFedAvg(onboarding=late), SimulatedGrid(groups()))


def test_clients_that_were_not_sampled_have_up_to_date_models():
    """Half of the clients train in the second round, and everyone's model follows them."""

    def moving(node: int) -> Answer:
        def answer(message: Message) -> RecordDict:
            if message.metadata.message_type == MessageType.EVALUATE:
                return RecordDict({"m": MetricRecord({"num-examples": 1, "accuracy": 1.0})})
            value = (-1.0) ** node * (1 + node / 100)
            return upload(weights(value + message.content["config"]["server-round"]))

        return answer

    nodes = {node: Sometimes(moving(node), {1, 2} if node < 4 else {1}) for node in range(8)}
    grid = SimulatedGrid(nodes)
    start(PFedGPA(), grid)
    first, second = received(grid, "evaluate")
    for node in range(8):
        assert second[node] - first[node] == pytest.approx(1.0, abs=0.1)


class Filling(SimulatedGrid):
    """A grid to which one node more connects each time that it is asked."""

    def __init__(self, nodes: dict[int, Answer]) -> None:
        super().__init__(nodes)
        self.num_connected = 0

    def get_node_ids(self):
        self.num_connected = min(len(self.nodes), self.num_connected + 1)
        return list(self.nodes)[: self.num_connected]


def test_a_run_waits_for_nodes_and_says_whom_it_misses(caplog, monkeypatch):
    monkeypatch.setattr(roster_module, "PAUSE", 0.0)
    roster = Roster()
    roster.clients = {1: 0, 2: 1, 3: 2}
    caplog.set_level("INFO")
    roster.assemble(Filling({1: site(1.0), 2: site(1.0), 3: site(1.0)}), 3)
    assert roster.connected == {1, 2, 3}
    assert "Waiting for nodes: 1 of at least 3 nodes are connected; not here: " in caplog.text
    assert "client 1 (node 2), client 2 (node 3)" in caplog.text
    assert caplog.text.count("Waiting") == 1  # again after 30 seconds only


def test_a_run_gives_up_on_nodes_that_never_come():
    strategy = ClientwiseFedAvg(min_available_nodes=3, join_timeout=0.1)
    with pytest.raises(JoinTimeoutError, match=r"2 of at least 3 nodes are connected; right would"):
        start(strategy, SimulatedGrid({1: site(1.0), 2: site(1.0)}))


def evaluated_every(rounds: int) -> list[dict]:
    """Return the metrics of a run of three rounds with three clients."""
    settings = {"client.local-epochs": 1, "diffusion.train-steps": 5, "num-server-rounds": 3}
    settings |= {"data.train-samples": 20, "data.test-samples": 20}
    settings |= {"server.evaluate-every": rounds, "client.device": "cpu"}
    settings |= {"diffusion.own-weight": 0.0}
    return simulate(Config.from_flat(settings), 3, num_processes=0)[1]


def test_models_are_evaluated_as_often_as_set_and_in_the_last_round():
    plain, sometimes, once = map(evaluated_every, (1, 2, 0))
    for rows, evaluated in ((plain, [1, 2, 3]), (sometimes, [2, 3]), (once, [3])):
        assert [
            row["round"] for row in rows if row["personalized-accuracy"] is not None
        ] == evaluated
        # Who trains evaluates what it is sent, which is what was generated in the round before.
        for before, row, each in zip(plain, rows[1:], plain[1:], strict=False):
            assert row["received-accuracy"] == before["personalized-accuracy"]
            assert row["finetuned-accuracy"] == each["finetuned-accuracy"]
    assert sum(row["bytes-down"] for row in once[:2]) * 2 == pytest.approx(
        sum(row["bytes-down"] for row in plain[:2]), rel=0.01
    )
