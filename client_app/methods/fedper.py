"""FedPer: personal heads on a shared body."""

from collections.abc import Collection

from torch import nn

from client_app.methods.method import Method, Task, Trained
from pfedgpa_app.parameters import copy_of


class FedPer(Method):
    """Joint training of the shared base and the client's own head (arXiv 1912.00818, Algorithm 1).

    One personalization layer, the head. It is not uploaded: the received head is sent back.
    """

    def personal_model(self, task: Task) -> nn.Module:
        """Return the received model with the parts that the client keeps, if it has any."""
        task.model.load_state_dict(task.memory, strict=False)
        return task.model

    def train(self, task: Task) -> Trained:
        """Train, and keep the client's own part."""
        self.fit(task, self.personal_model(task))
        state = copy_of(task.model.state_dict())
        task.memory = {name: state[name] for name in self.kept(task)}
        shared = state | {name: task.received[name] for name in task.memory}
        return Trained(copy_of(shared), {})

    def kept(self, task: Task) -> Collection[str]:
        """Return the names of what stays with the client."""
        return task.head.names

    def fit(self, task: Task, model: nn.Module) -> None:
        """Train head and base together."""
        task.fit(model)
