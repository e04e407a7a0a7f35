"""Diffusion on vectors of parameters: schedule, denoiser, training, inversion and generation."""

from pfedgpa_app.diffusion.denoiser import ExactDenoiser, ResidualDenoiser
from pfedgpa_app.diffusion.generation import generate
from pfedgpa_app.diffusion.inversion import Denoiser, LatentCode, invert, posterior_mean
from pfedgpa_app.diffusion.schedule import CLEAN, NoiseSchedule, sampling_timesteps
from pfedgpa_app.diffusion.subspace import Subspace, signal_rank
from pfedgpa_app.diffusion.training import ddpm_loss, train_denoiser

__all__ = [
    "CLEAN",
    "Denoiser",
    "ExactDenoiser",
    "LatentCode",
    "NoiseSchedule",
    "ResidualDenoiser",
    "Subspace",
    "ddpm_loss",
    "generate",
    "invert",
    "posterior_mean",
    "sampling_timesteps",
    "signal_rank",
    "train_denoiser",
]
