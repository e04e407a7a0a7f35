"""Ditto: a personal model beside the global one, which it is drawn to."""

from torch import Tensor, nn

from client_app.methods.method import Method, Task, Trained
from pfedgpa_app.parameters import copy_of
from pfedgpa_app.training import cross_entropy, proximal


class Ditto(Method):
    """FedAvg's client, with a personal model that stays with it (arXiv 2012.04221, Algorithm 1).

    ``v = v - eta (grad F(v) + lambda (v - w_t))``, with w_t as it was received, in as many epochs
    as the global model has. The personal model begins as the first that is received.
    """

    def personal_model(self, task: Task) -> nn.Module:
        """Return the personal model, or what was received before there is one."""
        return task.new_model(task.memory or task.received)

    def train(self, task: Task) -> Trained:
        """Train both models, and upload the global one."""
        personal = self.personal_model(task)
        plain = cross_entropy(task.offset)
        distance = proximal(task.received, task.config.ditto.penalty)

        def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            return plain(model, images, labels) + distance(model)

        task.fit(task.model)
        task.fit(personal, loss)
        task.memory = copy_of(personal.state_dict())
        return Trained(copy_of(task.model.state_dict()), {})
