"""Local training: SGD on the client's own images, and evaluation."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pfedgpa_app.config import ClientConfig


class Evaluation(NamedTuple):
    """Accuracy in 0 .. 1 and mean cross-entropy of a model on a test set."""

    accuracy: float
    loss: float


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    config: ClientConfig,
    generator: torch.Generator,
) -> None:
    """Train a model in place for ``local_epochs`` of SGD.

    Parameters
    ----------
    model
        On the device of the images.
    images
        Normalized, ``(num_examples, channels, height, width)``.
    labels
        ``(num_examples,)``.
    config
        Epochs, batch size and the optimizer's settings.
    generator
        On the CPU; draws the order of the examples.
    """
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    model.train()
    for _ in range(config.local_epochs):
        order = torch.randperm(len(images), generator=generator).to(images.device)
        for rows in order.split(config.batch_size):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 512) -> Evaluation:
    """Return a model's accuracy and loss on normalized images."""
    model.eval()
    logits = torch.cat([model(batch) for batch in images.split(batch_size)])
    correct = int((logits.argmax(dim=1) == labels).sum())
    return Evaluation(correct / len(labels), float(functional.cross_entropy(logits, labels)))
