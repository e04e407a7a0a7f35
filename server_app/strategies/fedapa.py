"""FedAPA: mixtures of clients' bodies, by weights that the server learns."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from pfedgpa_app.model_spec import ModelSpec
from pfedgpa_app.parameters import StateDict
from pfedgpa_app.stateful import Kept
from server_app.momentum import ClientMomentum
from server_app.replies import Upload
from server_app.strategies.fedavg_ft import FedAvgFT


class FedAPA(FedAvgFT):
    """Gradient-based adaptive personalized aggregation, https://arxiv.org/abs/2502.07456.

    A client trains from ``m_i = sum_j a_ij theta_j / sum_j a_ij`` over the last uploads, in which
    ``a_ii = 1``. Its upload is the pseudo-gradient's end: ``a_ij <- clip(a_ij - eta v_ij, 0, 1)``
    with ``v_ij <- momentum v_ij + <theta_j, m_i - theta_i>``, from the weights that were in use.
    As in the authors' code, weights of others are 0 at first, the step has momentum, the head is
    the client's own, and its personalized model is its upload. There a client's head stays with it;
    here it is uploaded and sent back, so that runs can go on. Clients of a round are served at
    once, where that code takes one after the other, and a row's momentum is that of its own steps.
    Buffers and frozen weights are averaged. ``server.momentum`` is that of each mixture.
    """

    arguments: ClassVar[Mapping[str, str]] = {
        "learning_rate": "fedapa.learning_rate",
        "weight_momentum": "fedapa.momentum",
    }
    weights: Kept[dict[int, dict[int, float]]]
    velocities: Kept[dict[int, dict[int, float]]]
    client_momentum: Kept[ClientMomentum]

    def __init__(
        self, *, learning_rate: float = 0.01, weight_momentum: float = 0.9, **kwargs: Any
    ) -> None:
        self.learning_rate = learning_rate
        self.weight_momentum = weight_momentum
        self.weights = {}
        self.velocities = {}
        super().__init__(**kwargs)
        self.client_momentum = ClientMomentum(self.momentum)

    def begin(self, spec: ModelSpec) -> None:
        """Find the head in the vectors."""
        super().begin(spec)
        assert spec.head is not None, "preflight has found it"
        entries = self.global_model.layout.generated
        self.is_head = torch.cat(
            [torch.full((entry.numel,), entry.name in spec.head.names) for entry in entries]
        )

    def learn(self, server_round: int, uploads: dict[int, Upload]) -> None:
        """Update the weights of the clients, and keep the uploads."""
        vectors = self._vectors()
        for client in uploads.keys() & vectors.keys():
            start = uploads[client].start
            moved = (start - uploads[client].vector).double()
            moved[self.is_head] = 0
            shares = self._shares(client)
            before = self.velocities.get(client, {})
            steps = {
                other: self.weight_momentum * before.get(other, 0.0)
                + float(vectors[other].double() @ moved)
                for other in vectors
            }
            self.velocities[client] = steps
            self.weights[client] = {
                other: min(1.0, max(0.0, shares.get(other, 0.0) - self.learning_rate * step))
                for other, step in steps.items()
            }
            self.client_momentum.trained(client, start, server_round)
        super().learn(server_round, uploads)

    def training_state(self, client: int) -> StateDict:
        """Return the client's mixture under its own head, or the average before its first one."""
        vectors = self._vectors()
        if client not in vectors:
            return self.average
        shares = self._shares(client)
        mixed = sum(
            (share * vectors[other].double() for other, share in shares.items()),
            start=torch.zeros(len(self.is_head), dtype=torch.float64),
        )
        moved = self.client_momentum.ahead(client, mixed.float())
        return self.global_model.with_vector(torch.where(self.is_head, vectors[client], moved))

    def _vectors(self) -> dict[int, Tensor]:
        return {c: self.global_model.vector(self.fine_tuned[c]) for c in sorted(self.fine_tuned)}

    def _shares(self, client: int) -> dict[int, float]:
        """Return the weights in a client's mixture, which sum to 1; without those that are 0."""
        weights = self.weights.get(client, {}) | {client: 1.0}
        total = sum(weights.values())
        return {other: weight / total for other, weight in weights.items() if weight}
