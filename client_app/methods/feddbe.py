"""FedDBE: a personal offset of the features, whose mean is drawn to that of all clients."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from client_app.methods.heads import all_features
from client_app.methods.method import Method, Task, Trained
from pfedgpa_app.model_spec import Head
from pfedgpa_app.parameters import StateDict, copy_of
from pfedgpa_app.protocol import FEATURE_MEAN


class Debiased(nn.Module):
    """A model with a personalized representation bias memory: an offset of its head's inputs."""

    def __init__(self, model: nn.Module, head: Head, offset: Tensor | None) -> None:
        super().__init__()
        layer = model.get_submodule(head.layer)
        start = torch.zeros(head.size[1]) if offset is None else offset.clone()
        self.model = model
        self.head = head
        self.offset = nn.Parameter(start.to(next(layer.parameters()).device))

    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits ``(n, num_classes)``, and the features without offset ``(n, dim)``."""
        inputs: list[Tensor] = []

        def shift(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            inputs.append(args[0])
            return args[0] + self.offset, *args[1:]

        with self.model.get_submodule(self.head.layer).register_forward_pre_hook(shift):
            return self.model(images), inputs[-1]

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.both(images)[0]


class FedDBE(Method):
    """Domain bias eliminator on FedAvg (arXiv 2311.14975, Algorithm 1).

    The features ``f`` get a personal offset ``z``, which is trained with the model, by the same
    SGD, and never uploaded: the loss is the cross-entropy of ``head(f + z)`` plus ``kappa / 2``
    times the mean square, over the features, of ``m - g``. ``g`` is the global mean, and ``m`` the
    running mean of the training, ``(1 - mu) m + mu mean(f)`` after each batch. Defaults are those
    of the authors for CNNs, ``kappa = 50`` and ``mu = 1``.

    Before there is a global mean, in the first round, a client trains as FedAvg's and uploads the
    mean of its features after the training. The authors train every client once before the first
    round for that, and take the running mean.
    """

    def personal_model(self, task: Task) -> nn.Module:
        """Return the model with the client's offset."""
        return Debiased(task.model, task.head, task.memory.get("offset"))

    def personal_state(self, task: Task) -> StateDict:
        """Return the model with the offset in the bias of its head."""
        state = copy_of(task.model.state_dict())
        if task.memory:
            layer = task.model.get_submodule(task.head.layer)
            assert isinstance(layer, nn.Linear)
            bias = f"{task.head.layer}.bias".lstrip(".")
            shifted = state[bias] + (layer.weight @ task.memory["offset"]).detach().cpu()
            state |= dict.fromkeys(task.spec.with_aliases([bias]), shifted)
        return state

    def train(self, task: Task) -> Trained:
        """Train model and offset, or in the first round the model alone."""
        if not task.extras:
            task.fit(task.model)
            mean = all_features(task).mean(dim=0)
            return self.upload(task, [task.model])._replace(extras={FEATURE_MEAN: mean})
        settings, goal = task.config.feddbe, task.extras[FEATURE_MEAN]
        running = torch.zeros_like(goal)

        def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            nonlocal running
            assert isinstance(model, Debiased)
            logits, features = model.both(images)
            mean = torch.lerp(running, features.float().mean(dim=0), settings.momentum)
            running = mean.detach()
            value = functional.cross_entropy(logits.float() + task.offset, labels)
            return value + settings.kappa / 2 * (mean - goal).square().mean()

        model = self.personal_model(task)
        task.fit(model, loss)
        assert isinstance(model, Debiased)
        task.memory = copy_of({"offset": model.offset})
        return self.upload(task, [task.model])
