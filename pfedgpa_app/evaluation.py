"""Evaluation of a model on examples that it was not trained on."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pfedgpa_app import protocol
from pfedgpa_app.data import ImageStats, normalize
from pfedgpa_app.randomness import drawing_from, make_generator


class Evaluation(NamedTuple):
    """Accuracy in 0 .. 1 and mean cross-entropy of a model on a test set."""

    accuracy: float
    loss: float

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> "Evaluation":
        """Evaluate logits ``(num_examples, num_classes)`` by labels ``(num_examples,)``."""
        correct = int((logits.argmax(dim=1) == labels).sum())
        return cls(correct / len(labels), float(functional.cross_entropy(logits, labels)))


# Of the calibration error, as in Guo et al., arXiv 1706.04599.
_NUM_BINS = 15
_BATCH_SIZE = 512


def scores_of(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return further metrics of logits ``(n, num_classes)`` and labels ``(n,)``, each in 0 .. 1.

    By their names in `protocol`: the recall of each class in the test set, and their mean, the
    balanced accuracy; macro F1, the mean over classes in the test set or predicted; with two
    classes, both in the test set, the area under the ROC curve; the expected calibration error of
    the largest probability, in 15 bins of equal width. None if a logit is not finite.
    """
    if not bool(logits.isfinite().all()):
        return {}
    num_classes = logits.shape[1]
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    cells = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    confusion = cells.view(num_classes, num_classes).double()
    hits, actual, guessed = confusion.diag(), confusion.sum(dim=1), confusion.sum(dim=0)
    recalls, f1 = hits / actual, 2 * hits / (actual + guessed)
    bins = (confidence * _NUM_BINS).long().clamp(max=_NUM_BINS - 1)
    gaps = torch.bincount(bins, (predicted == labels).double() - confidence)
    scores = {
        protocol.BALANCED_ACCURACY: recalls.nanmean(),
        protocol.MACRO_F1: f1.nanmean(),
        protocol.CALIBRATION_ERROR: gaps.abs().sum() / len(labels),
    }
    if num_classes == 2 and bool((actual > 0).all()):
        scores[protocol.AUROC] = _auroc(logits[:, 1] - logits[:, 0], labels == 1)
    scores |= {f"{protocol.RECALL}{k}": each for k, each in enumerate(recalls) if actual[k]}
    return {name: float(value) for name, value in scores.items()}


def _auroc(scores: Tensor, is_positive: Tensor) -> Tensor:
    """Return how often a positive has a higher score than a negative; ties count one half."""
    _, place, counts = scores.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[place].double()
    num, num_others = is_positive.sum(), (~is_positive).sum()
    above: Tensor = ranks[is_positive].sum() - num * (num + 1) / 2
    return above / (num * num_others)


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
    model: nn.Module, images: Tensor, stats: ImageStats, precision: str = "fp32"
) -> Tensor:
    """Return a model's logits, ``(num_examples, num_classes)``, float32.

    ``images``, ``(num_examples, *shape)``, on the model's device, are normalized with ``stats``,
    a batch at a time. The model is left in evaluation mode.
    """
    model.eval()
    # Own models may draw at random in evaluation too.
    generator = make_generator(0, "evaluation")
    with drawing_from(generator, images.device), autocast(images.device, precision):
        logits = [model(normalize(batch, stats)) for batch in images.split(_BATCH_SIZE)]
    return torch.cat(logits).float()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return a context in which models compute in ``bf16`` where that is enough, or ``fp32``."""
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
    """Return a model's accuracy and loss; ``offset`` ``(num_classes,)`` is added to the logits."""
    logits = logits_of(model, images, stats, precision)
    return Evaluation.of(logits if offset is None else logits + offset, labels)
