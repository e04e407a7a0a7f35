"""Diffusion on vectors of parameters: schedule, denoiser, training, inversion and generation."""

from pfedgpa_app.diffusion.denoiser import ResidualDenoiser
from pfedgpa_app.diffusion.generation import generate
from pfedgpa_app.diffusion.guidance import guide
from pfedgpa_app.diffusion.inversion import Denoiser, LatentCode, invert, posterior_mean
from pfedgpa_app.diffusion.mixture import mix, withheld
from pfedgpa_app.diffusion.model import MakeGenerator, ParameterDiffusion
from pfedgpa_app.diffusion.raw import RawSpace
from pfedgpa_app.diffusion.schedule import CLEAN, NoiseSchedule, sampling_timesteps
from pfedgpa_app.diffusion.signal import (
    SKETCH,
    Shrinkage,
    agreement,
    normalized,
    signal_parts,
    sketched,
)
from pfedgpa_app.diffusion.subspace import Spectrum, Subspace, divergence
from pfedgpa_app.diffusion.training import ddpm_loss, train_denoiser
from pfedgpa_app.diffusion.unet import UNetDenoiser

__all__ = [
    "CLEAN",
    "SKETCH",
    "Denoiser",
    "LatentCode",
    "MakeGenerator",
    "NoiseSchedule",
    "ParameterDiffusion",
    "RawSpace",
    "ResidualDenoiser",
    "Shrinkage",
    "Spectrum",
    "Subspace",
    "UNetDenoiser",
    "agreement",
    "ddpm_loss",
    "divergence",
    "generate",
    "guide",
    "invert",
    "mix",
    "normalized",
    "posterior_mean",
    "sampling_timesteps",
    "signal_parts",
    "sketched",
    "train_denoiser",
    "withheld",
]
