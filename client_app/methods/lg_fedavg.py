"""LG-FedAvg: the head of a model is averaged, the rest stays with its client."""

from collections.abc import Collection

from client_app.methods.fedper import FedPer
from client_app.methods.method import Task


class LGFedAvg(FedPer):
    """Joint training of the client's own representation and the shared head.

    That is Algorithm 1 of arXiv 2001.01523 for supervised learning, without auxiliary losses.
    Statistics of normalization layers are a part of the representation.
    """

    def kept(self, task: Task) -> Collection[str]:
        """Return all names but the head's."""
        return [name for name in task.received if name not in task.head.names]
