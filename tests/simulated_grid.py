"""A grid without network: nodes are functions that answer messages."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.task_identity import TaskIdentity

from server_app.strategies import ClientwiseFedAvg

Answer = Callable[[Message], RecordDict | Error | None]


def weights(value: float) -> dict[str, torch.Tensor]:
    """Return the state_dict of a model with 6 generated parameters and a counter."""
    return {
        "layer.weight": torch.full((2, 2), value),
        "layer.bias": torch.full((2,), -value),
        "norm.running_mean": torch.full((2,), 10 * value),
        "norm.num_batches_tracked": torch.tensor(abs(int(value))),
    }


def upload(state: dict[str, Any], num_examples: float = 10, **metrics: Any) -> RecordDict:
    """Return the content of a training reply."""
    arrays = {
        name: value if isinstance(value, Array) else Array(np.asarray(value))
        for name, value in state.items()
    }
    return RecordDict(
        {
            "arrays": ArrayRecord(arrays),
            "metrics": MetricRecord({"num-examples": num_examples, **metrics}),
        }
    )


class SimulatedGrid:
    """Deliver messages to nodes at once; a node that answers None is down.

    Parameters
    ----------
    nodes
        What each node answers to training and evaluation.
    partitions
        What a node answers to the question for its partition; others answer with an error.
    """

    def __init__(self, nodes: dict[int, Answer], partitions: dict[int, int] | None = None) -> None:
        self.nodes = nodes
        self.partitions = partitions or {}
        self.names: dict[int, str] = {}
        self.sent: list[Message] = []
        self._replies: dict[str, Message] = {}
        # What Flower's process of a ServerApp sets before the app starts.
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node, name=self.names.get(node, "")) for node in self.nodes]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        pushed = []
        for message in messages:
            self.sent.append(message)
            # Flower's grids write the id into a message when they send it.
            message.metadata.__dict__["_message_id"] = message_id = str(len(self.sent))
            pushed.append(message_id)
            answer = self._answer(message)
            if answer is not None:
                self._replies[message_id] = Message(answer, reply_to=message)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        found = [self._replies.pop(message_id, None) for message_id in message_ids]
        return [reply for reply in found if reply is not None]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        replies = self.pull_messages(self.push_messages(messages))
        return replies[::-1]  # replies come in any order

    def _answer(self, message: Message) -> RecordDict | Error | None:
        node = message.metadata.dst_node_id
        if message.metadata.message_type != MessageType.QUERY:
            return self.nodes[node](message)
        if node not in self.partitions:
            return Error(code=0, reason="no query function")
        return RecordDict({"m": MetricRecord({"partition-id": self.partitions[node]})})


def site(value: float, num_examples: int = 10) -> Answer:
    """Return a node that uploads the same weights in every round."""

    def answer(message: Message) -> RecordDict:
        if message.metadata.message_type == MessageType.EVALUATE:
            return RecordDict(
                {"m": MetricRecord({"num-examples": 4, "accuracy": 0.5, "loss": 1.0})}
            )
        return upload(weights(value), num_examples, **{"accuracy-after": 0.25})

    return answer


def learning_site(pull: float) -> Answer:
    """Return a node that moves what it is sent towards ``pull``: its uploads tell its past."""

    def answer(message: Message) -> RecordDict:
        state = message.content["arrays"].to_torch_state_dict()
        if message.metadata.message_type == MessageType.EVALUATE:
            accuracy = float(torch.sigmoid(state["layer.weight"].mean()))
            return RecordDict({"m": MetricRecord({"num-examples": 4, "accuracy": accuracy})})
        target = weights(pull)
        moved = {
            name: tensor + 0.3 * (target[name] - tensor)
            if tensor.is_floating_point()
            else tensor + 1
            for name, tensor in state.items()
        }
        return upload(moved, **{"accuracy-after": 0.5})

    return answer


def learning_grid(first_id: int) -> SimulatedGrid:
    """Return six sites whose node ids begin anywhere, as in a simulation."""
    ids = range(first_id, first_id + 6)
    sites = {node: learning_site(float(number - 3)) for number, node in enumerate(ids)}
    return SimulatedGrid(sites, {node: number for number, node in enumerate(ids)})


def received(grid: SimulatedGrid, kind: str) -> list[dict[int, float]]:
    """Return what each node was sent, round by round, as the value of its weights."""
    rounds: dict[int, dict[int, float]] = {}
    for message in grid.sent:
        if message.metadata.message_type == kind:
            state = message.content["arrays"].to_torch_state_dict()
            values = rounds.setdefault(message.content["config"]["server-round"], {})
            values[message.metadata.dst_node_id] = float(state["layer.weight"][0, 0])
    return list(rounds.values())


def start(strategy: ClientwiseFedAvg, grid: SimulatedGrid, num_rounds: int = 2):
    return strategy.start(grid, ArrayRecord(weights(0.0)), num_rounds=num_rounds)
