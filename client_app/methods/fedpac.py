"""FedPAC: feature alignment to global class means, and heads combined over clients."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from client_app.methods.heads import all_features, logits_and_features, training_only
from client_app.methods.method import Method, Task, Trained
from pfedgpa_app.parameters import StateDict, copy_of
from pfedgpa_app.protocol import CLASS_COUNTS, CLASS_MEANS, VARIANCE, WEIGHTED_MEANS
from pfedgpa_app.training import Loss


class FedPAC(Method):
    """Local training of arXiv 2306.11867 (Algorithm 1), with the details of the authors' code.

    First the head on fixed features, for one epoch by default; then the body under a fixed head,
    for the local epochs, by cross-entropy plus ``lambda`` times the mean squared difference between
    features and their class's global mean. The first round has no such means. Clients upload their
    class counts.
    """

    def train(self, task: Task) -> Trained:
        """Train, and upload the statistics for combining heads and means."""
        settings, model, labels = task.config.fedpac, task.model, task.data.train_labels
        before = all_features(task)
        extras = head_statistics(before, labels, task.data.info.num_classes)
        rate, epochs = settings.head_learning_rate, settings.head_epochs
        with training_only(model, task.head.names):
            task.fit(model, epochs=epochs, learning_rate=rate)
        with training_only(model, task.body):
            task.fit(model, aligned(task, before))
        extras |= class_means(all_features(task), labels, task.data.info.num_classes)
        return Trained(copy_of(model.state_dict()), copy_of(extras))


def aligned(task: Task, features: Tensor) -> Loss:
    """Return the body's loss; ``features`` ``(n, dim)`` are those before training."""
    strength = task.config.fedpac.alignment
    targets = None
    if task.extras:
        own = class_means(features, task.data.train_labels, task.data.info.num_classes)
        known = task.extras[CLASS_COUNTS].unsqueeze(1) > 0
        targets = torch.where(known, task.extras[CLASS_MEANS], own[CLASS_MEANS])

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        logits, features = logits_and_features(model, task.head, images)
        value = functional.cross_entropy(logits.float() + task.offset, labels)
        if targets is not None:
            value = value + strength * functional.mse_loss(features.float(), targets[labels])
        return value

    return loss


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> StateDict:
    """Return ``class-means`` ``(num_classes, dim)``, 0 without examples, and ``class-counts``."""
    members = functional.one_hot(labels, num_classes).to(features.dtype)
    counts = members.sum(dim=0)
    means = members.T @ features / counts.clamp(min=1).unsqueeze(1)
    return {CLASS_MEANS: means, CLASS_COUNTS: counts}


def head_statistics(features: Tensor, labels: Tensor, num_classes: int) -> StateDict:
    """Return the statistics that estimate bias and variance of a combined head.

    ``weighted-means`` ``(num_classes, dim)`` is ``p_k mu_k``, with the class frequency p_k and the
    class mean mu_k; ``variance`` ``(1,)`` is ``sum (p_k E|f|^2 - p_k^2 |mu_k|^2) / n``.
    """
    found = class_means(features, labels, num_classes)
    parts = found[CLASS_COUNTS] / len(labels)
    weighted = parts.unsqueeze(1) * found[CLASS_MEANS]
    # sum_k p_k E_k |f|^2 is the mean over all examples.
    variance = (features.square().sum(dim=1).mean() - weighted.square().sum()) / len(labels)
    return {WEIGHTED_MEANS: weighted, VARIANCE: variance.reshape(1)}
