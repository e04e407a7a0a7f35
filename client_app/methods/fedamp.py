"""FedAMP: local training that stays near the cloud model of the client."""

from client_app.methods.method import Method, Task, Trained


class FedAMP(Method):
    """``min F_i(w) + lambda / (2 alpha) |w - u_i|^2``, starting from u_i (arXiv 2007.03797)."""

    def train(self, task: Task) -> Trained:
        """Train by cross-entropy and proximal penalty."""
        settings = task.config.fedamp
        task.fit_near_received(task.model, settings.penalty / settings.alpha)
        return self.upload(task, [task.model])
