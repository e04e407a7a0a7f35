"""Access to a model's head, the layer that maps features to logits."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from client_app.methods.method import Task
from pfedgpa_app.data import normalize
from pfedgpa_app.evaluation import autocast
from pfedgpa_app.model_spec import Head


def logits_and_features(model: nn.Module, head: Head, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return a model's logits ``(n, num_classes)`` and the inputs of its head, ``(n, dim)``."""
    inputs: list[Tensor] = []
    layer = model.get_submodule(head.layer)
    with layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0])):
        return model(images), inputs[-1]


@torch.no_grad()
def all_features(task: Task) -> Tensor:
    """Return the features of the client's training examples, ``(n, dim)``, float32."""
    task.model.eval()
    data = task.data
    with autocast(data.train_inputs.device, task.config.client.precision):
        features = [
            logits_and_features(task.model, task.head, normalize(batch, data.stats))[1]
            for batch in data.train_inputs.split(512)
        ]
    return torch.cat(features).float()


@contextmanager
def training_only(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Freeze all parameters but those of these names."""
    frozen = [p for n, p in model.named_parameters() if n not in names and p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
