"""Ditto: a personal model, regularized towards the global one."""

from torch import nn

from client_app.methods.method import Method, Task, Trained
from pfedgpa_app.parameters import copy_of


class Ditto(Method):
    """FedAvg's client with a personal model that is never uploaded (arXiv 2012.04221, Algorithm 1).

    ``v = v - eta (grad F(v) + lambda (v - w_t))`` with the received w_t, for as many epochs as the
    global model. The personal model is initialized with the first received model.
    """

    def personal_model(self, task: Task) -> nn.Module:
        """Return the personal model, or the received one before the first training."""
        return task.new_model(task.memory or task.received)

    def train(self, task: Task) -> Trained:
        """Train both models, and upload the global one."""
        personal = self.personal_model(task)
        task.fit(task.model)
        task.fit_near_received(personal, task.config.ditto.penalty)
        task.memory = copy_of(personal.state_dict())
        return self.upload(task, [task.model])
