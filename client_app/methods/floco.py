"""Floco: a simplex of heads, in which each client trains its own region."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from client_app.methods.method import Method, Task, Trained
from pfedgpa_app.parameters import StateDict, copy_of
from pfedgpa_app.protocol import CENTER, ENDPOINTS, HAS_REGION


class Simplex(nn.Module):
    """A model whose head weight is a convex combination of endpoints, drawn in each training step.

    ``model`` ends in a linear layer, whose weight has the names ``weight_names``; ``endpoints`` are
    ``(num_endpoints, num_classes, dim)``. Evaluation uses the client's point ``center``,
    ``(num_endpoints,)``; training draws points within ``radius`` of it in the 1-norm, or from the
    whole simplex if that is None, by ``generator``, on the CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        weight_names: Sequence[str],
        endpoints: Tensor,
        center: Tensor,
        radius: float | None,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.model, self.weight_names = model, weight_names
        self.endpoints, self.center = nn.Parameter(endpoints), center
        self.radius, self.generator = radius, generator

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of the center, or of a random point of the region in training."""
        head = self._head(self._sample() if self.training else self.center)
        logits: Tensor = functional_call(self.model, head, (images,))
        return logits

    @torch.no_grad()
    def state_at_center(self) -> StateDict:
        """Return the model at the client's point, with one head."""
        return copy_of(self.model.state_dict() | self._head(self.center))

    def _head(self, point: Tensor) -> StateDict:
        weight = torch.tensordot(point.to(self.endpoints), self.endpoints, dims=1)
        return dict.fromkeys(self.weight_names, weight)

    def _sample(self) -> Tensor:
        size = len(self.center)
        if self.radius is None:
            # Normalized exponential variables are uniform on the simplex.
            draws = -torch.rand(size, generator=self.generator).clamp(min=1e-12).log()
            return draws / draws.sum()
        direction = 2 * torch.rand(size, generator=self.generator) - 1
        length = self.radius * torch.rand(1, generator=self.generator)
        return self.center.cpu() + length * direction / direction.abs().sum()


class Floco(Method):
    """Training of the endpoints at random points of the region (arXiv 2403.03333, Algorithm 1)."""

    simplex: Simplex | None = None

    def personal_model(self, task: Task) -> Simplex:
        """Return the model at the client's point."""
        if self.simplex is None:
            extras = task.extras
            self.simplex = Simplex(
                task.model,
                task.head.weights,
                extras[ENDPOINTS].clone(),
                extras[CENTER],
                task.config.floco.radius if bool(extras[HAS_REGION]) else None,
                task.generator,
            )
        return self.simplex

    def personal_state(self, task: Task) -> StateDict:
        """Return the model at the client's point, with one head."""
        return self.personal_model(task).state_at_center()

    def train(self, task: Task) -> Trained:
        """Train the body, the head's bias and all endpoints."""
        simplex = self.personal_model(task)
        task.fit(simplex)
        return Trained(simplex.state_at_center(), copy_of({ENDPOINTS: simplex.endpoints}))
