"""Server momentum, of the average and of each client's model."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from pfedgpa_app.parameters import StateDict
from pfedgpa_app.stateful import Kept, Stateful, Vector


class Momentum(Stateful):
    """FedAvgM's server step (arXiv 1909.06335): ``v = beta v + (new - old)``, ``old + v``.

    ``beta`` is in 0 .. 1; 0 is no momentum. Tensors other than ``trained``, such as normalization
    statistics, have none.
    """

    velocity: Kept[dict[int, StateDict]]

    def __init__(self, beta: float, trained: Collection[str]) -> None:
        self.beta = beta
        self.trained = trained
        self.velocity = {}

    def step(self, old: StateDict, new: StateDict, key: int = 0) -> StateDict:
        """Return the parameters after a step from ``old`` to ``new``, of the model ``key``."""
        if not self.beta:
            return new
        moved, velocity = dict(new), self.velocity.setdefault(key, {})
        for name, tensor in new.items():
            if name not in self.trained:
                continue
            last = velocity.get(name, torch.zeros_like(tensor))
            velocity[name] = self.beta * last + (tensor - old[name])
            moved[name] = old[name] + velocity[name]
        return moved


@dataclass(frozen=True)
class Step:
    """The state of a client's momentum."""

    sent: Vector
    """Parameters sent for its last training, ``(d,)``."""
    velocity: Vector
    """Their change per round since the training before, ``(d,)``."""
    trained: int
    """Round of the last training."""


class ClientMomentum(Stateful):
    """Momentum of each client's own model.

    With ``s`` sent to a client before and ``g`` generated for it now, ``v = beta v + (g - s)`` and
    ``s + v`` is sent. The velocity, per round, is updated in the rounds in which the client trains;
    in the others ``beta v`` is added to what is generated. ``beta`` is in 0 .. 1; 0 is no momentum.
    """

    steps: Kept[dict[int, Step]]

    def __init__(self, beta: float) -> None:
        self.beta = beta
        self.steps = {}

    def ahead(self, client: int, generated: Tensor) -> Tensor:
        """Return a client's ``generated`` parameters ``(d,)``, moved by its momentum."""
        if client not in self.steps:
            return generated
        return generated + self.beta * self.steps[client].velocity

    def trained(self, client: int, vector: Tensor, server_round: int) -> None:
        """Update the velocity of a client that trained from ``vector`` ``(d,)`` of `ahead`."""
        if not self.beta:
            return
        before = self.steps.get(client)
        velocity = torch.zeros_like(vector)
        if before:
            velocity = (vector - before.sent) / (server_round - before.trained)
        self.steps[client] = Step(vector, velocity, server_round)
