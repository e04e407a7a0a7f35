"""Who is sent a message, how large messages are, and what replies have in common."""

from collections.abc import Sequence

import torch
from flwr.app import Message, MetricRecord, RecordDict

from pfedgpa_app.protocol import METRICS


def draw(clients: Sequence[int], size: int, generator: torch.Generator) -> list[int]:
    """Draw ``size`` of the clients, and sort them."""
    chosen = torch.randperm(len(clients), generator=generator)[:size].tolist()
    return sorted(clients[position] for position in chosen)


def num_bytes(message: Message) -> int:
    """Return how many bytes the arrays of a message have."""
    return sum(record.count_bytes() for record in message.content.array_records.values())


def shared_metrics(metrics: Sequence[dict[str, float]]) -> list[RecordDict]:
    """Return the metrics that all replies have, as Flower's functions take them."""
    shared = sorted(set.intersection(*(set(values) for values in metrics)))
    return [
        RecordDict({METRICS: MetricRecord({name: values[name] for name in shared})})
        for values in metrics
    ]
