"""The denoiser that needs no training."""

import torch
from torch import Tensor

from pfedgpa_app.diffusion.schedule import NoiseSchedule


class ExactDenoiser:
    """The optimal denoiser of a finite bank ``(num_points, dim)``, in closed form.

    ``E[x_0 | x_t]`` is the mean of the points weighted by
    ``softmax(-|x_t - sqrt(abar_t) point|^2 / (2 (1 - abar_t)))``. No denoiser has a lower DDPM loss
    on the bank.
    """

    def __init__(self, points: Tensor, schedule: NoiseSchedule) -> None:
        self.points = points
        self.schedule = schedule

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the expected noise ``(batch, dim)`` at the timesteps t ``(batch,)``."""
        alpha_bar = self.schedule.alpha_bar(t, x)
        # |x_t - sqrt(abar) p|^2 without |x_t|^2, which the softmax does not see.
        energy = alpha_bar * self.points.square().sum(1) - 2 * alpha_bar.sqrt() * x @ self.points.T
        x0 = torch.softmax(-energy / (2 * (1 - alpha_bar)), dim=1) @ self.points
        return (x - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
