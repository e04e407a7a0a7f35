"""Denoising: latent code to personalized parameters."""

import torch
from torch import Tensor

from pfedgpa_app.diffusion.inversion import Denoiser, LatentCode, posterior_mean, step_pairs
from pfedgpa_app.diffusion.schedule import NoiseSchedule


@torch.no_grad()
def generate(
    denoiser: Denoiser, schedule: NoiseSchedule, code: LatentCode, fidelity: float
) -> Tensor:
    """Denoise a latent code ``(batch, dim)`` with its own noises, scaled by ``fidelity``.

    Fidelity 1 gives back what was inverted, whatever the denoiser; at 0 the diffused parameters
    are all that is left of it. Between, the result keeps its own semantics and takes on what the
    denoiser learned.
    """
    x = code.x_start
    for (t, t_previous), residual in zip(step_pairs(code.timesteps), code.residuals, strict=True):
        x = posterior_mean(denoiser, schedule, x, t, t_previous) + fidelity * residual
    return x
