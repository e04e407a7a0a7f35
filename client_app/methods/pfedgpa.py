"""pFedGPA's clients: FedAvg's, who tell once how far two halves of their images agree."""

import copy
from dataclasses import replace

import torch
from torch import Tensor

from client_app.methods.method import Method, Task, Trained
from pfedgpa_app.parameters import ParameterLayout

HALVES = "halves"


class PFedGPA(Method):
    """FedAvg's client; when asked, it trains twice more, on each half of its images apart."""

    def train(self, task: Task) -> Trained:
        """Train, and upload with the parameters what was asked for."""
        trained = super().train(task)
        extras = {HALVES: half_moves(task)} if HALVES in task.extras else {}
        return Trained(trained.state, extras)


def half_moves(task: Task) -> Tensor:
    """Return how training on two random halves moves the generated parameters, ``(2, d)``.

    Both start from the received model. Fewer than four images have no halves to speak of: 0.
    """
    layout = ParameterLayout.of(task.received, task.config.diffusion.patterns)
    start, _ = layout.split(task.received)
    moves = start.new_zeros(2, len(start))
    data = task.data
    order = torch.randperm(len(data.train_labels), generator=task.generator)
    if len(order) < 4:
        return moves
    for move, rows in zip(moves, order.to(data.train_labels.device).tensor_split(2), strict=True):
        model = copy.deepcopy(task.model)
        model.load_state_dict(task.received)
        half = data._replace(
            train_images=data.train_images[rows], train_labels=data.train_labels[rows]
        )
        replace(task, data=half).fit(model)
        move.copy_(layout.split(model.state_dict())[0] - start)
    return moves
