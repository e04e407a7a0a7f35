"""Local training: SGD on the client's own data."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.sgd import sgd

from pfedgpa_app.config import ClientConfig
from pfedgpa_app.data import ImageStats, normalize
from pfedgpa_app.evaluation import autocast, logits_of
from pfedgpa_app.randomness import drawing_from, repeatable

Momenta = dict[str, Tensor | None]
"""Momentum buffers by parameter name; None before the first step."""
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Called with a model, normalized examples ``(n, *shape)`` and labels ``(n,)``."""


def cross_entropy(offset: Tensor | float) -> Loss:
    """Return the cross-entropy of logits to which ``offset`` ``(num_classes,)`` is added.

    With the logarithms of a client's class counts it is the balanced softmax (arXiv 2007.10740),
    as in FedRoD (arXiv 2107.00778): the model's logits are then free of the client's prior.
    """

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(model(images).float() + offset, labels)

    return loss


PLAIN = cross_entropy(0.0)


def proximal(anchor: Mapping[str, Tensor], strength: float) -> Callable[[nn.Module], Tensor]:
    """Return ``strength / 2 |w - anchor|^2``, over trained parameters, as a function of a model."""

    def penalty(model: nn.Module) -> Tensor:
        squares = [
            (parameter - anchor[name]).square().sum()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]
        return strength / 2 * torch.stack(squares).sum()

    return penalty


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    stats: ImageStats,
    config: ClientConfig,
    generator: torch.Generator,
    *,
    loss: Loss = PLAIN,
) -> None:
    """Train a model in place, on its device, for ``local_epochs`` of SGD.

    ``images``, ``(num_examples, *shape)``, are not normalized: every batch is, with ``stats``.
    ``labels`` are ``(num_examples,)``. ``generator``, on the CPU, draws the order of the examples.
    A step whose ``loss`` depends on no trained parameter is skipped.
    """
    _prefer_channels_last(model, images, stats, config.precision)
    momenta: Momenta = {}
    model.train()
    parameters = dict(model.named_parameters())
    with drawing_from(generator, images.device), repeatable():
        for rows in batches(len(images), config, generator, images.device):
            model.zero_grad()
            with autocast(images.device, config.precision):
                value = loss(model, normalize(images[rows], stats), labels[rows])
            if not value.requires_grad:
                continue  # as when stochastic depth skips all trained layers
            value.backward()
            gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
            step(parameters, gradients, momenta, config)


def _prefer_channels_last(
    model: nn.Module, images: Tensor, stats: ImageStats, precision: str
) -> None:
    """Use channels-last memory on a CPU, a third faster for small convolutions, if the model works.

    Some models do not: ``x.view(-1, n)`` fails.
    """
    if images.ndim != 4 or images.device.type != "cpu":
        return
    model.to(memory_format=torch.channels_last)
    try:
        logits_of(model, images[:2], stats, precision)
    except Exception:  # other errors of the model will be raised in training
        model.to(memory_format=torch.contiguous_format)


def step(
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    momenta: Momenta,
    config: ClientConfig,
) -> None:
    """Take a step of SGD in place, by the function that `torch.optim.SGD` calls.

    The class would import torch's compiler, 2 s of CPU in the process of each message.
    """
    buffers = [momenta.get(name) for name in gradients]
    with torch.no_grad():
        sgd(
            [parameters[name] for name in gradients],
            list(gradients.values()),
            buffers,
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
    momenta.update(zip(gradients, buffers, strict=True))


def batches(
    num_examples: int, config: ClientConfig, generator: torch.Generator, device: torch.device
) -> Iterator[Tensor]:
    """Yield the example indices of each step of all local epochs.

    A last batch of one example is merged into the one before: batch normalization fails on it.
    """
    for _ in range(config.local_epochs):
        order = torch.randperm(num_examples, generator=generator).to(device)
        split = list(torch.split(order, config.batch_size))
        if len(split) > 1 and len(split[-1]) == 1:
            split[-2:] = [torch.cat(split[-2:])]
        yield from split
