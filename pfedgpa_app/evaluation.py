"""Judging a model on images that it was not trained on."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pfedgpa_app.data import ImageStats, normalize
from pfedgpa_app.randomness import drawing_from, make_generator


class Evaluation(NamedTuple):
    """Accuracy in 0 .. 1 and mean cross-entropy of a model on a test set."""

    accuracy: float
    loss: float


def class_prior(labels: Tensor, num_classes: int) -> Tensor:
    """Return the `log_prior` ``(num_classes,)`` of labels ``(n,)``."""
    return log_prior(torch.bincount(labels, minlength=num_classes))


def log_prior(counts: Tensor) -> Tensor:
    """Return ``log(n_c + 1/2)`` of the counts n_c of each class, ``(num_classes,)``.

    Added to a model's logits in training and prediction it leaves to the model what does not depend
    on how often a client has a class (balanced softmax, arXiv 2007.10740).
    """
    return (counts + 0.5).log()


@torch.no_grad()
def logits_of(
    model: nn.Module,
    images: Tensor,
    stats: ImageStats,
    precision: str = "fp32",
    batch_size: int = 512,
) -> Tensor:
    """Return a model's logits, ``(num_examples, num_classes)``, float32.

    Parameters
    ----------
    model
        On the device of the images; it is left in evaluation mode.
    images
        As the data set has them, ``(num_examples, *shape)``; they are normalized with ``stats``.
    stats
        Mean and deviation of each channel or feature.
    precision
        As `autocast` takes it.
    batch_size
        Images that are in the model at a time.
    """
    model.eval()
    # So that what draws at random in evaluation too gives the same each time.
    generator = make_generator(0, "evaluation")
    with drawing_from(generator, images.device), autocast(images.device, precision):
        logits = [model(normalize(batch, stats)) for batch in images.split(batch_size)]
    return torch.cat(logits).float()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return a block in which models compute in ``bf16`` where that is enough, or in ``fp32``."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    stats: ImageStats,
    precision: str = "fp32",
    *,
    offset: Tensor | None = None,
) -> Evaluation:
    """Return a model's accuracy and loss on images and their labels, ``(num_examples,)``.

    ``offset`` ``(num_classes,)`` is added to the logits, as `class_prior` has it.
    """
    logits = logits_of(model, images, stats, precision)
    if offset is not None:
        logits = logits + offset
    correct = int((logits.argmax(dim=1) == labels).sum())
    return Evaluation(correct / len(labels), float(functional.cross_entropy(logits, labels)))
