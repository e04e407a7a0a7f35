"""FedProx: local training that stays near the model that it started from."""

from torch import Tensor, nn

from client_app.methods.method import Method, Task, Trained
from pfedgpa_app.parameters import copy_of
from pfedgpa_app.training import cross_entropy, proximal


class FedProx(Method):
    """Local training with the penalty ``mu / 2 |w - w_t|^2`` (arXiv 1812.06127, Algorithm 2)."""

    def train(self, task: Task) -> Trained:
        """Train by cross-entropy and penalty."""
        plain = cross_entropy(task.offset)
        distance = proximal(task.received, task.config.fedprox.mu)

        def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            return plain(model, images, labels) + distance(model)

        task.fit(task.model, loss)
        return Trained(copy_of(task.model.state_dict()), {})
