"""Diffusion on vectors of parameters: schedule, denoiser, training, inversion and generation."""

from pfedgpa_app.diffusion.denoiser import ResidualDenoiser
from pfedgpa_app.diffusion.generation import generate
from pfedgpa_app.diffusion.guidance import guide
from pfedgpa_app.diffusion.inversion import Denoiser, LatentCode, invert, posterior_mean
from pfedgpa_app.diffusion.mixing import (
    are_alone,
    capped,
    excess_weights,
    kept_of,
    limited,
    mixing_from_halves,
    share_of,
)
from pfedgpa_app.diffusion.mixture import mix
from pfedgpa_app.diffusion.model import MakeGenerator, ParameterDiffusion, rank_of
from pfedgpa_app.diffusion.raw import RawSpace
from pfedgpa_app.diffusion.schedule import CLEAN, NoiseSchedule, sampling_timesteps
from pfedgpa_app.diffusion.signal import (
    SKETCH,
    agreement,
    centred,
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
    "Spectrum",
    "Subspace",
    "UNetDenoiser",
    "agreement",
    "are_alone",
    "capped",
    "centred",
    "ddpm_loss",
    "divergence",
    "excess_weights",
    "generate",
    "guide",
    "invert",
    "kept_of",
    "limited",
    "mix",
    "mixing_from_halves",
    "normalized",
    "posterior_mean",
    "rank_of",
    "sampling_timesteps",
    "share_of",
    "signal_parts",
    "sketched",
    "train_denoiser",
]
