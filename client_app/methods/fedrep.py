"""FedRep: first the client's own head, then the shared representation."""

from torch import nn

from client_app.methods.fedper import FedPer
from client_app.methods.heads import training_only
from client_app.methods.method import Task


class FedRep(FedPer):
    """ClientUpdate of arXiv 2102.07078 (Algorithm 1), in epochs as in its experiments.

    First the head on a fixed body, then the body under a fixed head.
    """

    def fit(self, task: Task, model: nn.Module) -> None:
        """Train head and body one after the other."""
        with training_only(model, task.head.names):
            task.fit(model, epochs=task.config.fedrep.head_epochs)
        with training_only(model, task.body):
            task.fit(model, epochs=task.config.fedrep.body_epochs)
