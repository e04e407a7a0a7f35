"""pFedFDA: a Gaussian classifier on the features, between the client's and the global one."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from client_app.methods.heads import all_features, training_only
from client_app.methods.method import Method, Task, Trained
from pfedgpa_app.parameters import copy_of
from pfedgpa_app.protocol import CLASS_MEANS, COVARIANCE
from pfedgpa_app.randomness import make_generator

Gaussians = tuple[Tensor, Tensor]
"""Class means ``(num_classes, dim)`` and their shared covariance ``(dim, dim)``, float64."""
NUM_FOLDS = 2
EPSILON = 1e-4
_MAX_ITERATIONS = 10


class PFedFDA(Method):
    """Feature distribution adaptation (arXiv 2411.00329, Algorithm 1), as the authors' code.

    The head is the linear discriminant of Gaussians with one covariance, under the client's class
    frequencies. The body trains under the head of the global Gaussians. Then the client estimates
    its own, with ``pfedfda.ridge`` on the diagonal of the covariance, and uploads
    ``beta local + (1 - beta) global``: beta, in 0 .. 1, has the smallest cross-entropy in two-fold
    cross-validation, one for the means and one for the covariance (``pfedfda.single-beta``: one for
    both). Classes with fewer than three examples have the global means.

    The personalized model has the head of such a mixture, estimated with its own body: that which
    was received or, after a training, that which was trained. Features are those after training,
    where the authors' code collects them during the training. With ``client.class-prior``, that
    takes the place of the class frequencies in the head.
    """

    def personal_model(self, task: Task) -> nn.Module:
        """Return the model with the head of the client's mixture."""
        _set_head(task, adapted(task))
        return task.model

    def train(self, task: Task) -> Trained:
        """Train the body, and upload it with the client's mixture; the head is sent back."""
        _set_head(task, received_gaussians(task))
        with training_only(task.model, task.body):
            task.fit(task.model)
        means, covariance = adapted(task)
        extras = {CLASS_MEANS: means.float(), COVARIANCE: covariance.float()}
        state = copy_of(task.model.state_dict())
        state |= {name: task.received[name] for name in task.head.names}
        return Trained(copy_of(state), extras)


def received_gaussians(task: Task) -> Gaussians:
    """Return the global Gaussians, on the CPU."""
    return task.extras[CLASS_MEANS].cpu().double(), task.extras[COVARIANCE].cpu().double()


def adapted(task: Task) -> Gaussians:
    """Return the client's mixture of its own and the global Gaussians."""
    features, labels = all_features(task).cpu().double(), task.data.train_labels.cpu()
    shared, settings = received_gaussians(task), task.config.pfedfda
    generator = make_generator(task.config.seed, "folds")
    betas = best_betas(
        *(features, labels, shared, _log_priors(task)),
        *(settings.ridge, 1 if settings.single_beta else 2, generator),
    )
    return mixture(estimate(features, labels, shared[0], settings.ridge), shared, betas)


def estimate(features: Tensor, labels: Tensor, shared: Tensor, ridge: float) -> Gaussians:
    """Return the Gaussians of features ``(n, dim)``; ``shared`` are the global means."""
    members = functional.one_hot(labels, len(shared)).double()
    counts = members.sum(dim=0).unsqueeze(1)
    means = torch.where(counts > NUM_FOLDS, members.T @ features / counts.clamp(min=1), shared)
    centred = features - means[labels]
    covariance = centred.T @ centred / max(1, len(labels) - 1)
    return means, covariance + ridge * torch.eye(len(covariance), dtype=torch.float64)


def mixture(local: Gaussians, shared: Gaussians, betas: Tensor) -> Gaussians:
    """Return ``beta local + (1 - beta) shared``, by the first beta for the means."""
    return (
        torch.lerp(shared[0], local[0], betas[0]),
        torch.lerp(shared[1], local[1], betas[-1]),
    )


def discriminant(gaussians: Gaussians, log_priors: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight ``(num_classes, dim)`` and bias of the linear discriminant.

    The covariance is shrunk towards a multiple of the identity by `EPSILON`.
    """
    means, covariance = gaussians
    identity = torch.eye(len(covariance), dtype=covariance.dtype)
    scale = covariance.trace() / len(covariance)
    weight = torch.linalg.solve(torch.lerp(covariance, scale * identity, EPSILON), means.T).T
    return weight, log_priors - (weight * means).sum(dim=1) / 2


def best_betas(
    features: Tensor,
    labels: Tensor,
    shared: Gaussians,
    log_priors: Tensor,
    ridge: float,
    number: int,
    generator: torch.Generator,
) -> Tensor:
    """Return the betas ``(number,)`` with the smallest cross-entropy in cross-validation.

    Folds are stratified. Classes with fewer examples than folds are left out; without any other,
    the betas are 0.
    """
    order = torch.randperm(len(labels), generator=generator)
    members = functional.one_hot(labels, len(log_priors))
    order = order[members.sum(dim=0)[labels[order]] >= NUM_FOLDS]
    if not len(order):
        return torch.zeros(number, dtype=torch.float64)
    places = members[order].cumsum(dim=0).gather(1, labels[order].unsqueeze(1)).squeeze(1)
    folds = []
    for fold in range(NUM_FOLDS):
        rows, others = order[places % NUM_FOLDS == fold], order[places % NUM_FOLDS != fold]
        local = estimate(features[others], labels[others], shared[0], ridge)
        folds.append((local, features[rows], labels[rows]))

    def error(values: np.ndarray) -> tuple[float, np.ndarray]:
        betas = torch.tensor(values, dtype=torch.float64, requires_grad=True)
        total = torch.zeros((), dtype=torch.float64)
        for local, inputs, right in folds:
            weight, bias = discriminant(mixture(local, shared, betas), log_priors)
            total = total + functional.cross_entropy(inputs @ weight.T + bias, right)
        [gradient] = torch.autograd.grad(total, betas)
        return float(total.detach()), gradient.numpy()

    from scipy.optimize import minimize  # imported here: few runs need it, and it takes long

    start, limits = np.full(number, 0.5), [(0.0, 1.0)] * number
    options = {"maxiter": _MAX_ITERATIONS, "gtol": 1e-3}
    found = minimize(error, start, jac=True, method="L-BFGS-B", bounds=limits, options=options)
    return torch.from_numpy(found.x)


def _log_priors(task: Task) -> Tensor:
    """Return the logarithms of the client's class frequencies, or zeros with a class prior."""
    num_classes = task.data.info.num_classes
    if task.config.client.class_prior:
        return torch.zeros(num_classes, dtype=torch.float64)
    counts = torch.bincount(task.data.train_labels.cpu(), minlength=num_classes).double()
    frequencies = counts / counts.sum() + EPSILON
    return (frequencies / frequencies.sum()).log()


@torch.no_grad()
def _set_head(task: Task, gaussians: Gaussians) -> None:
    layer = task.model.get_submodule(task.head.layer)
    assert isinstance(layer, nn.Linear)
    weight, bias = discriminant(gaussians, _log_priors(task))
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
