"""Guided denoising: a newcomer's parameters, drawn to what the others know and to its own data."""

import torch
from torch import Tensor

from pfedgpa_app.diffusion.inversion import Denoiser, posterior_mean, step_pairs
from pfedgpa_app.diffusion.schedule import NoiseSchedule


@torch.no_grad()
def guide(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    current: Tensor,
    previous: Tensor,
    guidance: float,
    timesteps: Tensor,
) -> Tensor:
    """Denoise ``current`` ``(batch, dim)`` with the guidance of its last local training.

    ``previous`` is what the training started from: ``previous - current`` stands for the gradient
    of the client's loss, so that classifier guidance (arXiv 2105.05233) with the strength
    ``1 + guidance`` has the noise
    ``denoiser(x, t) + (1 + guidance) sqrt(1 - abar_t) (previous - current)``. No noise is put in:
    a single client's parameters would be lost in it.
    """

    def guided(x: Tensor, t: Tensor) -> Tensor:
        noise_level = (1 - schedule.alpha_bar(t, x)).sqrt()
        return denoiser(x, t) + (1 + guidance) * noise_level * (previous - current)

    x = current
    for t, t_previous in step_pairs(timesteps):
        x = posterior_mean(guided, schedule, x, t, t_previous)
    return x
