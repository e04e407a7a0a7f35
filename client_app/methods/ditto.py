"""Ditto: a personal model beside the global one, which it is drawn to."""

from torch import nn

from client_app.methods.method import Method, Task, Trained
from pfedgpa_app.parameters import copy_of


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
        task.fit(task.model)
        task.fit_near_received(personal, task.config.ditto.penalty)
        task.memory = copy_of(personal.state_dict())
        return self.upload(task, [task.model])
