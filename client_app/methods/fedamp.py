"""FedAMP: local training that stays near the cloud model of the client."""

from torch import Tensor, nn

from client_app.methods.method import Method, Task, Trained
from pfedgpa_app.parameters import copy_of
from pfedgpa_app.training import cross_entropy, proximal


class FedAMP(Method):
    """``min F_i(w) + lambda / (2 alpha) |w - u_i|^2``, from u_i on (arXiv 2007.03797)."""

    def train(self, task: Task) -> Trained:
        """Train by cross-entropy and penalty."""
        settings = task.config.fedamp
        plain = cross_entropy(task.offset)
        distance = proximal(task.received, settings.penalty / settings.alpha)

        def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            return plain(model, images, labels) + distance(model)

        task.fit(task.model, loss)
        return Trained(copy_of(task.model.state_dict()), {})
