"""Messages to clients: who is sent what, each its own or all the same."""

from collections.abc import Callable, Iterable, Sequence

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from pfedgpa_app.parameters import StateDict
from server_app.replies import EXTRAS
from server_app.roster import Roster

FINGERPRINT = "fixed-weights"
"""In a message's config, the hash of the weights that it does not contain: clients have them."""


def draw(clients: Sequence[int], size: int, generator: torch.Generator) -> list[int]:
    """Draw ``size`` of the clients, and sort them."""
    chosen = torch.randperm(len(clients), generator=generator)[:size].tolist()
    return sorted(clients[position] for position in chosen)


def make_messages(
    kind: str,
    roster: Roster,
    clients: Sequence[int],
    states: Iterable[StateDict],
    extras_of: Callable[[int], StateDict],
    to_send: Callable[[StateDict], StateDict],
    contents: Callable[[ArrayRecord], dict[str, ArrayRecord | ConfigRecord]],
) -> list[Message]:
    """Make a message a client, each with its state; the same state is one record for all.

    ``to_send`` returns what of a state goes out. ``contents`` names the records of a message, given
    that of the state. Beside them is what ``extras_of`` returns, if it is anything.
    """
    made: dict[int, tuple[StateDict, ArrayRecord]] = {}
    messages = []
    for client, state in zip(clients, states, strict=True):
        if id(state) not in made:
            # The state is kept with its record: ids are unique among living objects only.
            made[id(state)] = (state, ArrayRecord(to_send(state)))
        content = RecordDict({**contents(made[id(state)][1])})
        if extras := extras_of(client):
            content[EXTRAS] = ArrayRecord(extras)
        node_id = roster.node_id(client)
        messages.append(Message(content=content, message_type=kind, dst_node_id=node_id))
    return messages


def num_bytes(message: Message) -> int:
    """Return how many bytes the arrays of a message have."""
    return sum(record.count_bytes() for record in message.content.array_records.values())


def shared_metrics(metrics: Sequence[dict[str, float]]) -> list[RecordDict]:
    """Return the metrics that all replies have, as Flower's functions take them."""
    shared = sorted(set.intersection(*(set(values) for values in metrics)))
    return [
        RecordDict({"metrics": MetricRecord({name: values[name] for name in shared})})
        for values in metrics
    ]
