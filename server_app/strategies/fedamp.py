"""FedAMP: attention-weighted mixtures of similar clients' models."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from pfedgpa_app.parameters import StateDict
from pfedgpa_app.stateful import Kept
from server_app.momentum import ClientMomentum
from server_app.replies import Upload
from server_app.strategies.fedavg_ft import FedAvgFT


class FedAMP(FedAvgFT):
    """Attentive message passing, https://arxiv.org/abs/2007.03797.

    Implementation of its Algorithm 1 with the attention-inducing function
    ``A(x) = 1 - exp(-x / sigma)``. A client trains near its cloud model, a mixture of all clients'
    last uploads (equation 6), and its personalized model is its upload. Buffers and frozen weights
    are averaged. Momentum is that of each cloud model.
    """

    arguments: ClassVar[Mapping[str, str]] = {"alpha": "fedamp.alpha", "sigma": "fedamp.sigma"}
    client_momentum: Kept[ClientMomentum]

    def __init__(self, *, alpha: float = 1e4, sigma: float = 1e6, **kwargs: Any) -> None:
        self.alpha = alpha
        self.sigma = sigma
        super().__init__(**kwargs)
        self.client_momentum = ClientMomentum(self.momentum)

    def learn(self, server_round: int, uploads: dict[int, Upload]) -> None:
        """Keep the uploads."""
        for client in uploads.keys() & self.fine_tuned.keys():
            self.client_momentum.trained(client, uploads[client].start, server_round)
        super().learn(server_round, uploads)

    def training_state(self, client: int) -> StateDict:
        """Return the client's cloud model u_i, or the average if it never took part."""
        if client not in self.fine_tuned:
            return self.average
        clients = sorted(self.fine_tuned)
        vectors = torch.stack([self.global_model.vector(self.fine_tuned[each]) for each in clients])
        weights = attention(vectors, clients.index(client), self.alpha, self.sigma)
        mixture = (weights @ vectors.double()).float()
        vector = self.client_momentum.ahead(client, mixture)
        return self.global_model.with_vector(vector)


def attention(vectors: Tensor, row: int, alpha: float, sigma: float) -> Tensor:
    """Return the weights ``(n,)``, float64, of the vectors ``(n, d)`` in the mixture of one.

    ``xi_ij = alpha A'(|w_i - w_j|^2)`` for the others and ``1 - sum xi_ij`` for itself. The paper
    requires an alpha that keeps the latter positive; for larger ones the others' weights sum to 1.
    """
    distances = (vectors.double() - vectors[row].double()).square().sum(dim=1)
    weights = alpha / sigma * torch.exp(-distances / sigma)
    weights[row] = 0.0
    weights /= weights.sum().clamp(min=1.0)
    weights[row] = 1 - weights.sum()
    return weights
