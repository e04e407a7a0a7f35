"""IFCA: every client chooses the cluster model with the lowest loss on its data."""

import torch
from torch import nn

from client_app.methods.method import Method, Task, Trained
from pfedgpa_app.evaluation import evaluate
from pfedgpa_app.parameters import StateDict
from pfedgpa_app.protocol import CHOICE, CLUSTER, RECEIVED
from pfedgpa_app.state import states_below


class IFCA(Method):
    """Training of the cluster model with the lowest training loss (arXiv 2006.04088).

    Algorithm 1, line 8: the cluster is chosen in every message, on all training examples.
    """

    chosen: int | None = None

    def personal_model(self, task: Task) -> nn.Module:
        """Return the model of the client's cluster."""
        if self.chosen is None:
            models, data = self._models(task), task.data
            sample = (data.train_inputs, data.train_labels, data.stats)
            precision, losses = task.config.client.precision, {}
            for cluster, state in models.items():
                task.model.load_state_dict(state)
                found = evaluate(task.model, *sample, precision, offset=task.offset)
                losses[cluster] = found.loss
            self.chosen = min(losses, key=lambda cluster: (losses[cluster], cluster))
            task.model.load_state_dict(models[self.chosen])
        return task.model

    def train(self, task: Task) -> Trained:
        """Train the chosen cluster's model, and upload the choice."""
        self.personal_model(task)
        trained = super().train(task)
        choice = torch.zeros(len(self._models(task)))
        choice[self.chosen] = 1.0
        return trained._replace(extras={CHOICE: choice})

    def _models(self, task: Task) -> dict[int, StateDict]:
        received = {int(task.extras[RECEIVED]): task.received}
        others = states_below(CLUSTER, task.extras)
        # Messages may leave out frozen weights.
        return received | {number: task.received | state for number, state in others.items()}
