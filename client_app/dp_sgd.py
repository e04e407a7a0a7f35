"""DP-SGD (arXiv 1607.00133): local training with example-level privacy, by Opacus."""

from typing import Any, cast

import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from pfedgpa_app.config import ClientConfig, PrivacyConfig
from pfedgpa_app.data import ImageStats, normalize
from pfedgpa_app.privacy import Uniform, gaussian, quiet_opacus, sampling_plan
from pfedgpa_app.randomness import drawing_from, repeatable
from pfedgpa_app.training import Loss


class _Optimizer(DPOptimizer):
    """Opacus' optimizer with a given source of noise.

    Opacus draws from a torch generator, whose 32-bit seed can be found by brute force.
    """

    uniform: Uniform

    def add_noise(self) -> None:
        """Add noise to the sum of the clipped gradients."""
        for parameter in cast(list[Any], self.params):
            summed: Tensor = parameter.summed_grad
            noise = self.noise_multiplier * self.max_grad_norm * gaussian(summed, self.uniform)
            parameter.grad = (summed + noise).view_as(parameter)


def train_privately(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    stats: ImageStats,
    config: ClientConfig,
    privacy: PrivacyConfig,
    uniform: Uniform,
    generator: torch.Generator,
    *,
    loss: Loss,
) -> None:
    """Train a model in place by the steps of `sampling_plan`, with the arguments of `train`.

    The model passes `unfit_layers`; ``loss`` is a mean of per-example losses. ``uniform`` is the
    source of the Poisson sampling and of the noise, ``generator`` that of layers such as dropout.
    """
    sample_rate, num_steps = sampling_plan(len(images), config)
    model.train()
    wrapped = GradSampleModule(model)
    sgd = torch.optim.SGD(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    optimizer = _Optimizer(
        sgd,
        noise_multiplier=privacy.noise_multiplier,
        max_grad_norm=privacy.max_grad_norm,
        expected_batch_size=max(1, int(len(images) * sample_rate)),
    )
    optimizer.uniform = uniform
    try:
        with drawing_from(generator, images.device), repeatable(), quiet_opacus():
            for _ in range(num_steps):
                drawn = uniform(len(images)) < sample_rate
                rows = drawn.nonzero()[:, 0].to(images.device)
                optimizer.zero_grad()
                loss(wrapped, normalize(images[rows], stats), labels[rows]).backward()
                optimizer.step()
    finally:
        wrapped.to_standard_module()
