"""Clients whose uploads and halves are drawn, and aggregators that learned from them."""

import torch
from torch import Tensor

from pfedgpa_app.aggregation import GenerativeAggregator
from pfedgpa_app.config import DiffusionConfig
from pfedgpa_app.diffusion.signal import sketched
from pfedgpa_app.randomness import make_generator

NUM_CLIENTS, DIM = 20, 4000


def clients(own: Tensor, noise: float, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Return uploads ``(20, 4000)`` and halves of clients that want ``own``, but for noise.

    The noise of half the images has twice the variance of that of all.
    """
    generator = make_generator(seed)
    first, second = (
        own + noise * 2**0.5 * torch.randn(NUM_CLIENTS, DIM, generator=generator) for _ in range(2)
    )
    return (first + second) / 2, list(torch.stack([first, second], dim=1))


def groups(num_groups: int, seed: int = 1) -> Tensor:
    centres = torch.randn(num_groups, DIM, generator=make_generator(seed))
    return centres[torch.arange(NUM_CLIENTS) % num_groups]


def sketches(halves: Tensor) -> Tensor:
    return torch.stack([sketched(half) for half in halves])


def fitted(uploads: Tensor, halves: list[Tensor | None], **settings) -> GenerativeAggregator:
    config = DiffusionConfig(**{"sharing": "measured", "train_steps": 20, **settings})
    aggregator = GenerativeAggregator(torch.zeros(DIM), config, seed=1)
    for client, upload in enumerate(uploads):
        aggregator.observe(client, upload)
        if (reported := halves[client]) is not None:
            aggregator.compare(client, sketches(reported))
    aggregator.fit(server_round=1)
    return aggregator


def generated(aggregator: GenerativeAggregator) -> Tensor:
    return torch.stack([aggregator.personalize(client) for client in aggregator.bank.members])
