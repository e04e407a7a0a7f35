"""Inversion: parameters to latent code (edit-friendly DDPM inversion, arXiv 2304.06140)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pfedgpa_app.diffusion.schedule import CLEAN, NoiseSchedule

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""Predicts the noise in x_t ``(batch, dim)`` at the timesteps t ``(batch,)``."""


class LatentCode(NamedTuple):
    """The diffused parameters and the intermediate noises of a batch."""

    x_start: Tensor
    """The parameters at the first of the timesteps, ``(batch, dim)``."""
    residuals: Tensor
    """What the posterior mean lacks at each step, ``sigma_k z_k``, ``(num_steps, batch, dim)``."""
    timesteps: Tensor
    """The descending timesteps, ``(num_steps,)``."""


def posterior_mean(
    denoiser: Denoiser, schedule: NoiseSchedule, x: Tensor, t: int, t_previous: int
) -> Tensor:
    """Return the mean of p(x at t_previous | x at t), both ``(batch, dim)``; DDPM's equation 7.

    ``t_previous`` is any earlier timestep, or `CLEAN`, where the mean is the predicted x_0.
    """
    steps = torch.full((len(x),), t, dtype=torch.long, device=x.device)
    alpha_bar = schedule.alpha_bar(steps, x)
    alpha_bar_previous = schedule.alpha_bar(torch.full_like(steps, t_previous), x)
    alpha = alpha_bar / alpha_bar_previous
    x0 = (x - (1 - alpha_bar).sqrt() * denoiser(x, steps)) / alpha_bar.sqrt()
    from_x0 = alpha_bar_previous.sqrt() * (1 - alpha) / (1 - alpha_bar)
    from_x = alpha.sqrt() * (1 - alpha_bar_previous) / (1 - alpha_bar)
    return from_x0 * x0 + from_x * x


def step_pairs(timesteps: Tensor) -> list[tuple[int, int]]:
    """Return (t, the timestep after it) for every step down to `CLEAN`."""
    steps: list[int] = timesteps.tolist()
    return list(zip(steps, [*steps[1:], CLEAN], strict=True))


@torch.no_grad()
def invert(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x0: Tensor,
    timesteps: Tensor,
    generator: torch.Generator,
) -> LatentCode:
    """Return the latent code of clean ``x0`` ``(batch, dim)`` at `sampling_timesteps`.

    Every x_k is diffused from ``x0`` with noise of its own, independent of the other steps', which
    imprints ``x0`` on the residuals far more strongly than a simulated forward process does. The
    generator is on the device of ``x0``.
    """
    pairs = step_pairs(timesteps)
    diffused = [
        schedule.add_noise(
            x0,
            torch.full((len(x0),), t, dtype=torch.long, device=x0.device),
            torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=x0.device),
        )
        for t, _ in pairs
    ]
    residuals = [
        x_previous - posterior_mean(denoiser, schedule, x, t, t_previous)
        for (t, t_previous), x, x_previous in zip(pairs, diffused, [*diffused[1:], x0], strict=True)
    ]
    return LatentCode(diffused[0], torch.stack(residuals), timesteps)
