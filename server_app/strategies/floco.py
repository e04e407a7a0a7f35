"""Floco: one body, and a simplex of heads with a point for every client."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from pfedgpa_app.config import Config
from pfedgpa_app.model_spec import ModelSpec
from pfedgpa_app.parameters import ParameterLayout, StateDict, weighted_average
from pfedgpa_app.protocol import CENTER, ENDPOINTS, HAS_REGION
from pfedgpa_app.randomness import make_generator
from pfedgpa_app.stateful import Kept
from server_app.global_model import weights_of
from server_app.momentum import Momentum
from server_app.replies import Upload
from server_app.strategies.clientwise import ClientwiseFedAvg


class Floco(ClientwiseFedAvg):
    """Federated learning over connected modes, https://arxiv.org/abs/2403.03333.

    The head's weight is a point of a simplex, whose endpoints are trained with the body and
    averaged. In a given round the clients' last updates of the endpoints are projected onto
    principal components and then onto the simplex, at the scale with the smallest Riesz energy of
    1000; each client then trains the region about its point. As in the Flower Baseline, which has
    an extra round for the updates, endpoints have Xavier initialization. With fewer clients than
    endpoints, missing components are 0. A client without a point has the center of the simplex.
    Momentum is that of body and endpoints. Floco+ is not implemented.
    """

    arguments: ClassVar[Mapping[str, str]] = {"num_endpoints": "floco.num_endpoints"}
    endpoints: Kept[Tensor]
    endpoint_momentum: Kept[Momentum]
    updates: Kept[dict[int, Tensor]]
    points: Kept[dict[int, Tensor]]

    def __init__(
        self, *, num_endpoints: int = 10, projection_round: int = 250, **kwargs: Any
    ) -> None:
        self.num_endpoints = num_endpoints
        self.projection_round = projection_round
        self.updates = {}
        self.points = {}
        super().__init__(**kwargs)
        self.endpoint_momentum = Momentum(self.momentum, {ENDPOINTS})

    @classmethod
    def of(cls, config: Config, spec: ModelSpec, **kwargs: Any) -> Self:
        """Return the strategy with the settings of a run; ``kwargs`` are those of the class."""
        projection_round = max(1, round(config.floco.projection * config.num_server_rounds))
        return super().of(config, spec, projection_round=projection_round, **kwargs)

    def begin(self, spec: ModelSpec) -> None:
        """Draw the endpoints."""
        super().begin(spec)
        head = spec.linear_head
        self.weight_names, (num_classes, dim) = head.weights, head.size
        generator = make_generator(self.seed, "endpoints")
        draws = torch.randn(self.num_endpoints, num_classes, dim, generator=generator)
        self.endpoints = draws * (2 / (num_classes + dim)) ** 0.5
        self.extras_layout = ParameterLayout.of({ENDPOINTS: self.endpoints})

    def extras(self, client: int) -> StateDict:
        """Return the endpoints, the client's point and whether it has one."""
        return {
            ENDPOINTS: self.endpoints,
            CENTER: self._point(client),
            HAS_REGION: torch.tensor(client in self.points),
        }

    def learn(self, server_round: int, uploads: dict[int, Upload]) -> None:
        """Average the endpoints, and in the projection round compute all points."""
        for client, upload in uploads.items():
            self.updates[client] = (self.endpoints - upload.extras[ENDPOINTS]).flatten()
        extras = [upload.extras for upload in uploads.values()]
        averaged = weighted_average(extras, weights_of(uploads.values()))
        sent = {ENDPOINTS: self.endpoints}
        self.endpoints = self.endpoint_momentum.step(sent, averaged)[ENDPOINTS]
        if server_round >= self.projection_round and not self.points:
            clients = sorted(self.updates)
            updates = torch.stack([self.updates[client] for client in clients])
            points = project(updates, self.num_endpoints)
            self.points = dict(zip(clients, points, strict=True))
            self.updates = {}

    def evaluation_state(self, client: int) -> StateDict:
        """Return the average with the head at the client's point."""
        weight = torch.tensordot(self._point(client), self.endpoints, dims=1)
        return self.average | dict.fromkeys(self.weight_names, weight)

    training_state = evaluation_state

    def _point(self, client: int) -> Tensor:
        center = torch.full((self.num_endpoints,), 1 / self.num_endpoints)
        return self.points.get(client, center)


def project(updates: Tensor, num_endpoints: int) -> Tensor:
    """Return the points ``(n, num_endpoints)``, float32, of clients' updates ``(n, d)``.

    The scale in 0.0001 .. 1 is that of the smallest Riesz energy, ``sum 1 / |b_i - b_j|^2``.
    """
    centred = updates.double() - updates.double().mean(dim=0)
    left, singular, _ = torch.linalg.svd(centred, full_matrices=False)
    scores = left * singular
    # The sign of a component is arbitrary: its largest absolute score is made positive.
    farthest = scores.abs().argmax(dim=0, keepdim=True)
    scores = (scores * scores.gather(0, farthest).sign())[:, :num_endpoints]
    kappas = torch.nn.functional.pad(scores, (0, num_endpoints - scores.shape[1]))
    scaled = [onto_simplex(kappas, scale) for scale in torch.linspace(1e-4, 1, 1000).tolist()]
    candidates = [points / points.sum(dim=1, keepdim=True) for points in scaled]
    farthest_apart: Tensor = min(candidates, key=riesz_energy)
    return farthest_apart.float()


def onto_simplex(points: Tensor, total: float) -> Tensor:
    """Return the nearest points ``(n, m)`` with non-negative entries that sum to ``total``."""
    # A common shift does not change the projection, and avoids rounding errors.
    points = points - points.amax(dim=1, keepdim=True)
    ordered = points.sort(dim=1, descending=True).values
    excess = ordered.cumsum(dim=1) - total
    ranks = torch.arange(1, points.shape[1] + 1, dtype=points.dtype)
    num_positive = (ordered - excess / ranks > 0).sum(dim=1, keepdim=True)
    threshold = excess.gather(1, num_positive - 1) / num_positive
    nearest: Tensor = (points - threshold).clamp(min=0)
    return nearest


def riesz_energy(points: Tensor) -> float:
    """Return ``sum 1 / |b_i - b_j|^2`` over pairs of points ``(n, m)``, 1e-4 apart at least."""
    return float((1 / torch.nn.functional.pdist(points).clamp(min=1e-4).square()).sum())
