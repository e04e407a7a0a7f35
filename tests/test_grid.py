"""Replies that Flower cannot decode, or should not, cost their senders the round."""

import tracemalloc
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from simulated_grid import SimulatedGrid, learning_grid, upload, weights

from benchmarks.faulty_client import FORGERIES, ForgedArray, MisdirectedReply
from pfedgpa_app.parameters import ParameterLayout
from server_app import grid as guarded
from server_app.grid import GuardedGrid, bounded_arrays
from server_app.replies import ReplyError, max_bytes
from server_app.strategies import ClientwiseFedAvg

MAX_BYTES = 10_000_000


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded, "PAUSE", 0.0)


class DecodingGrid(SimulatedGrid):
    """A grid that takes replies apart and decodes them, as Flower's does on a network.

    Attributes
    ----------
    unasked
        Messages that are no replies; they come with whatever is asked for next.
    polls
        How often replies are asked for before any is there.
    """

    def __init__(self, nodes: dict[int, Any], polls: int = 0) -> None:
        super().__init__(nodes)
        self.unasked: list[Message] = []
        self.polls = polls

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        if self.polls:
            self.polls -= 1
            return []
        unasked, self.unasked = self.unasked, []
        return [decode(message) for message in [*unasked, *super().pull_messages(message_ids)]]


def decode(message: Message) -> Message:
    """Return what Flower makes of a message's objects."""
    objects = get_all_nested_objects(message)
    contents = {name: each.deflate() for name, each in objects.items()}
    decoded = inflate_object_from_contents(message.object_id, contents)
    assert isinstance(decoded, Message)
    return decoded


def ask(grid: DecodingGrid, timeout: float | None = None) -> dict[int, Message]:
    """Send every node a message; return the replies by node.

    Which one is replied to is taken from what the replies say.
    """
    messages = [
        Message(RecordDict(), dst_node_id=node, message_type=MessageType.TRAIN)
        for node in grid.nodes
    ]
    replies = GuardedGrid(grid, MAX_BYTES).send_and_receive(messages, timeout=timeout)
    addressees = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
    return {addressees[reply.metadata.reply_to_message_id]: reply for reply in replies}


def good(message: Message) -> RecordDict:
    return upload(weights(1.0))


def forged(fault: str) -> Any:
    """Return a node whose reply is falsified below what an app sees of it."""

    def answer(message: Message) -> RecordDict:
        content = upload({"layer.weight": torch.ones(100, 100)})
        arrays = content.array_records["arrays"]
        arrays["layer.weight"] = ForgedArray(arrays["layer.weight"], fault)
        return content

    return answer


@pytest.mark.parametrize("fault", FORGERIES)
def test_a_reply_that_cannot_be_decoded_is_an_error_of_its_sender(fault: str):
    replies = ask(DecodingGrid({1: good, 2: forged(fault), 3: good}))
    assert replies.keys() == {1, 2, 3}
    assert "its reply cannot be read" in replies[2].error.reason
    for node in (1, 3):
        state = replies[node].content.array_records["arrays"].to_torch_state_dict()
        assert torch.equal(state["layer.weight"], weights(1.0)["layer.weight"])


def test_a_piece_that_is_named_again_and_again_is_not_put_together():
    tracemalloc.start()
    replies = ask(DecodingGrid({1: forged("repeat")}))  # 4 GB
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "more than 10000000 bytes" in replies[1].error.reason
    assert peak < 4 * MAX_BYTES


def test_arrays_are_bounded_together():
    array = Array(torch.ones(100).numpy())
    size = len(array.data)
    with bounded_arrays(3 * size):
        for _ in range(3):
            Array.inflate(array.deflate(), array.children)
        with pytest.raises(ReplyError, match=f"more than {3 * size} bytes"):
            Array.inflate(array.deflate(), array.children)
    assert Array.inflate(array.deflate(), array.children).data == array.data


def test_the_bound_leaves_what_an_array_holds_as_it_is():
    state = {name: Array(tensor.numpy()) for name, tensor in weights(3.0).items()}
    sent = Message(RecordDict({"a": ArrayRecord(state)}), dst_node_id=1, message_type="train")
    with bounded_arrays(MAX_BYTES):
        received = decode(sent).content.array_records["a"]
    assert {name: array.data for name, array in received.items()} == {
        name: array.data for name, array in state.items()
    }


def test_what_the_strategy_asks_for_is_within_the_bound():
    layout = ParameterLayout.of(weights(1.0))
    extras = ParameterLayout.of({"more": torch.zeros(3_000_000)})
    assert max_bytes(layout, extras) > 2 * 4 * 3_000_000 > max_bytes(layout, None)


def test_a_reply_that_claims_to_answer_another_message_is_not_waited_for():
    class Misdirecting(DecodingGrid):
        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            pushed = super().push_messages(messages)
            self._replies[pushed[1]].__class__ = MisdirectedReply
            return pushed

    replies = ask(Misdirecting({1: good, 2: good, 3: good}))
    assert "answers another message" in replies[2].error.reason
    assert replies[1].has_content()
    assert replies[3].has_content()


def test_replies_are_read_when_they_come():
    assert ask(DecodingGrid({1: good, 2: good}, polls=5)).keys() == {1, 2}


def test_a_node_that_does_not_answer_is_waited_for_until_the_time_is_over(
    monkeypatch: pytest.MonkeyPatch,
):
    slept: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append)
    monkeypatch.setattr(guarded, "time", clock)
    monkeypatch.setattr(guarded, "PAUSE", 3.0)
    assert ask(DecodingGrid({1: good, 2: lambda message: None}), timeout=20.0).keys() == {1}
    assert 20.0 <= sum(slept) < 20.0 + guarded.PAUSE
    # A quick reply is there soon, and a slow one costs few polls.
    assert slept == sorted(slept)
    assert slept[0] < 0.2
    assert slept[-1] == guarded.PAUSE


def test_a_node_that_left_before_the_message_was_sent_is_not_waited_for():
    class Leaving(DecodingGrid):
        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            return ["", *super().push_messages(messages)[1:]]

    assert ask(Leaving({1: good, 2: good})).keys() == {2}


def test_a_message_that_is_no_reply_costs_nobody_anything():
    grid = DecodingGrid({1: good, 2: good})
    for fault in (None, "json"):
        content = good(None) if fault is None else forged(fault)(None)
        grid.unasked = [Message(content, dst_node_id=1, message_type="train")]
        replies = ask(grid)
        assert replies.keys() == {1, 2}
        assert all(reply.has_content() for reply in replies.values())


def test_a_superlink_that_is_gone_is_no_error_of_a_node():
    class Vanishing(DecodingGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            raise ConnectionError("no SuperLink")

        def get_node_ids(self) -> Iterable[int]:
            raise ConnectionError("no SuperLink")

    with pytest.raises(ConnectionError, match="no SuperLink"):
        ask(Vanishing({1: good, 2: good}))


def test_the_others_get_the_digits_of_a_run_without_the_sender_of_what_cannot_be_decoded():
    honest = learning_grid(first_id=10).nodes
    averages = []
    for nodes in (honest, {**honest, 16: forged("json")}):
        strategy = ClientwiseFedAvg()
        strategy.start(
            GuardedGrid(DecodingGrid(nodes), MAX_BYTES),  # type: ignore[arg-type]
            initial_arrays=ArrayRecord(weights(0.0)),
            num_rounds=2,
        )
        averages.append(strategy.average)
    assert "cannot be read" in strategy.record.clients[6]["status"]
    for name, tensor in averages[0].items():
        assert torch.equal(averages[1][name], tensor)
