"""Access to a model's head, the layer that maps features to logits."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from pfedgpa_app.model_spec import Head


def logits_and_features(model: nn.Module, head: Head, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return a model's logits ``(n, num_classes)`` and the inputs of its head, ``(n, dim)``."""
    inputs: list[Tensor] = []
    layer = model.get_submodule(head.layer)
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        logits = model(images)
    finally:
        handle.remove()
    return logits, inputs[-1]


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
