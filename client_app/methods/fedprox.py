"""FedProx: local training with a proximal penalty to the received model."""

from client_app.methods.method import Method, Task, Trained


class FedProx(Method):
    """Local training with the penalty ``mu / 2 |w - w_t|^2`` (arXiv 1812.06127, Algorithm 2)."""

    def train(self, task: Task) -> Trained:
        """Train by cross-entropy and proximal penalty."""
        task.fit_near_received(task.model, task.config.fedprox.mu)
        return self.upload(task, [task.model])
