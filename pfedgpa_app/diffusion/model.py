"""The diffusion model of the clients' parameters: a space, a denoiser in it, a noise level."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from pfedgpa_app.config import DiffusionConfig, OnboardingConfig
from pfedgpa_app.diffusion.denoiser import ResidualDenoiser, UNetDenoiser
from pfedgpa_app.diffusion.generation import generate
from pfedgpa_app.diffusion.guidance import guide
from pfedgpa_app.diffusion.inversion import invert
from pfedgpa_app.diffusion.mixing import affinities
from pfedgpa_app.diffusion.raw import RawSpace
from pfedgpa_app.diffusion.schedule import NoiseSchedule, sampling_timesteps
from pfedgpa_app.diffusion.subspace import Spectrum, Subspace
from pfedgpa_app.diffusion.training import train_denoiser
from pfedgpa_app.parameters import StateDict
from pfedgpa_app.randomness import drawing_from

MakeGenerator = Callable[..., torch.Generator]
"""Called with the name of a purpose and, by keyword, with a device."""


@dataclass(frozen=True)
class ParameterDiffusion:
    """What a denoiser that learned the distribution of a bank makes of its vectors."""

    space: Subspace | RawSpace
    """Where the denoiser works. It may have no dimensions, where nothing is denoised."""
    weights: StateDict
    """The state_dict of the denoiser, which predicts noise in coordinates of the space; empty
    without one."""
    start: int
    """First timestep of inversion and denoising."""
    noise_to_signal: float
    """Variance of the noise there, in units of the signal's."""
    coordinates: Annotated[Tensor, "num_members dim"]
    """Those of the bank's vectors, ``(num_clients, dim)``."""
    changes: Annotated[Tensor, "num_members dim"]
    """By how much inversion and denoising moved them, ``(num_clients, dim)``."""

    @classmethod
    def fit(
        cls,
        config: DiffusionConfig,
        vectors: Sequence[Tensor],
        spectrum: Spectrum,
        device: torch.device,
        make_generator: MakeGenerator,
    ) -> "ParameterDiffusion":
        """Learn the distribution of vectors ``(d,)`` with a known spectrum, and denoise them.

        Raises `FloatingPointError` if the training diverged.
        """
        rank = rank_of(config, spectrum)
        if config.space == "raw":
            space: RawSpace | Subspace = RawSpace.fit(vectors, multiple=2**config.num_blocks)
        else:
            space = Subspace.fit(vectors, rank, spectrum)
        start = first_timestep(config, spectrum, rank)
        coordinates = space.project(vectors)
        alpha_bar = float(schedule_of(config).alphas_cumprod[start])
        noise_to_signal = (1 - alpha_bar) / alpha_bar
        weights: StateDict = {}
        changes = torch.zeros_like(coordinates)
        if space.dim and config.denoise:
            weights, changes = _train(config, start, coordinates, device, make_generator)
        return cls(space, weights, start, noise_to_signal, coordinates, changes)

    def denoiser(self, config: DiffusionConfig, device: torch.device) -> nn.Module:
        """Return the denoiser with the settings with which it was trained.

        Raises `ValueError` if they are others.
        """
        with torch.random.fork_rng(devices=[]):
            denoiser = _new_denoiser(config, self.space.dim)
        try:
            denoiser.load_state_dict(self.weights)
        except RuntimeError as error:
            raise ValueError(f"not the state of these settings: {error}") from error
        return denoiser.to(device)

    def guided(
        self,
        current: Tensor,
        previous: Tensor,
        config: DiffusionConfig,
        onboarding: OnboardingConfig,
        device: torch.device,
    ) -> Tensor:
        """Return the coordinates ``(1, dim)`` of a newcomer after guided denoising.

        Local training took it from ``previous`` to ``current``, both ``(d,)``. Without a denoiser
        there is no guidance, and they are those of ``current``.
        """
        here = self.space.project([current])
        if not self.weights:
            return here
        guided: Tensor = guide(
            self.denoiser(config, device),
            schedule_of(config),
            here.to(device),
            self.space.project([previous]).to(device),
            onboarding.guidance,
            sampling_timesteps(onboarding.start, onboarding.num_steps),
        )
        return guided.cpu()

    def affinities(self, coordinates: Tensor) -> Tensor:
        """Return how near coordinates ``(n, dim)`` are to those of the bank's vectors.

        Rows ``(n, num_clients)``, float64, that sum to 1.
        """
        return affinities(coordinates, self.coordinates, self.noise_to_signal)


def rank_of(config: DiffusionConfig, spectrum: Spectrum) -> int:
    """Return how many principal axes the settings take."""
    if config.rank == "auto":
        return spectrum.signal_rank
    return min(config.rank, spectrum.max_rank)


def first_timestep(config: DiffusionConfig, spectrum: Spectrum, rank: int) -> int:
    """Return the first timestep of inversion and denoising.

    ``auto`` is where the noise is as strong as `Spectrum.noise_to_signal` says.
    """
    if config.start != "auto":
        return config.start
    alphas_cumprod = schedule_of(config).alphas_cumprod
    enough = (1 - alphas_cumprod) / alphas_cumprod >= spectrum.noise_to_signal(rank)
    first = int(enough.nonzero()[0]) if bool(enough.any()) else config.num_timesteps - 1
    return max(first, config.num_steps)


def schedule_of(config: DiffusionConfig) -> NoiseSchedule:
    """Return the forward process that the settings describe."""
    return NoiseSchedule.linear(config.num_timesteps, config.beta_start, config.beta_end)


def _new_denoiser(config: DiffusionConfig, dim: int) -> nn.Module:
    if not dim or not config.denoise:
        return nn.Identity()
    if config.space == "raw":
        return UNetDenoiser(config.hidden_size, config.num_blocks)
    return ResidualDenoiser(dim, config.hidden_size, config.num_blocks)


def _train(
    config: DiffusionConfig,
    start: int,
    coordinates: Tensor,
    device: torch.device,
    make_generator: MakeGenerator,
) -> tuple[StateDict, Tensor]:
    """Return the weights of a denoiser trained on coordinates ``(n, dim)``, and what it changes.

    These are the changes ``(n, dim)`` by inversion and denoising, averaged over the draws of the
    noises.
    """
    schedule, x0 = schedule_of(config), coordinates.to(device)
    with drawing_from(make_generator("denoiser")):
        denoiser = _new_denoiser(config, coordinates.shape[1]).to(device)
    train_denoiser(
        denoiser,
        schedule,
        x0,
        train_steps=config.train_steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        generator=make_generator("training", device=device),
    )
    draws, timesteps = x0.repeat(config.num_draws, 1), sampling_timesteps(start, config.num_steps)
    noises = make_generator("inversion", device=device)
    code = invert(denoiser, schedule, draws, timesteps, noises)
    denoised = generate(denoiser, schedule, code, config.fidelity)
    generated = denoised.view(config.num_draws, *x0.shape).mean(dim=0)
    if not bool(torch.isfinite(generated).all()):
        raise FloatingPointError(
            "the diffusion model generates values that are not finite; right would be a smaller "
            "diffusion.learning-rate"
        )
    weights = {name: tensor.cpu() for name, tensor in denoiser.state_dict().items()}
    return weights, generated.cpu() - coordinates
