"""Server momentum, of the average and of each client's model."""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from pfedgpa_app.parameters import StateDict
from pfedgpa_app.state import states_below, states_under


class Momentum:
    """FedAvgM's server step (arXiv 1909.06335): ``v = beta v + (new - old)``, ``old + v``.

    Parameters
    ----------
    beta
        In 0 .. 1; 0 is no momentum.
    trained
        Names of the tensors that train; others have no momentum, such as normalization statistics.
    """

    def __init__(self, beta: float, trained: Collection[str]) -> None:
        self.beta = beta
        self.trained = trained
        self.velocity: StateDict = {}

    def step(self, old: StateDict, new: StateDict) -> StateDict:
        """Return the parameters after a step from ``old`` to ``new`` with momentum."""
        if not self.beta:
            return new
        moved = dict(new)
        for name, tensor in new.items():
            if name not in self.trained:
                continue
            last = self.velocity.get(name, torch.zeros_like(tensor))
            self.velocity[name] = self.beta * last + (tensor - old[name])
            moved[name] = old[name] + self.velocity[name]
        return moved

    def state(self) -> StateDict:
        """Return the state, as named tensors."""
        return dict(self.velocity)

    def restore(self, tensors: StateDict) -> None:
        """Restore the result of `state`."""
        self.velocity = dict(tensors)


class Step(NamedTuple):
    """The state of a client's momentum.

    Attributes
    ----------
    sent
        The parameters sent for its last training, ``(d,)``.
    velocity
        Their change per round since the training before, ``(d,)``.
    trained
        The round of its last training, ``()``.
    """

    sent: Tensor
    velocity: Tensor
    trained: Tensor


class ClientMomentum:
    """Momentum of each client's own model.

    If ``s`` was sent to a client and ``g`` is generated for it next, then ``v = beta v + (g - s)``
    and ``s + v`` is sent. The velocity is updated in the rounds in which the client trains; in
    between, ``beta v`` is added to what is generated. It is a velocity per round: a change since a
    training three rounds ago counts a third, or one step would repeat the way of three rounds.

    Parameters
    ----------
    beta
        In 0 .. 1; 0 is no momentum.
    """

    def __init__(self, beta: float) -> None:
        self.beta = beta
        self.steps: dict[int, Step] = {}

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
            velocity = (vector - before.sent) / (server_round - int(before.trained))
        self.steps[client] = Step(vector, velocity, torch.tensor(server_round))

    def state(self) -> StateDict:
        """Return the state, as named tensors."""
        return states_under("step", {client: step._asdict() for client, step in self.steps.items()})

    def restore(self, tensors: StateDict) -> None:
        """Restore the result of `state`."""
        steps = states_below("step", tensors)
        self.steps = {client: Step(**step) for client, step in steps.items()}
