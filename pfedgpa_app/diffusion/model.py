"""The diffusion model of the clients' parameters: a space, a denoiser in it, a noise level."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pfedgpa_app.config import DiffusionConfig, OnboardingConfig
from pfedgpa_app.diffusion.denoiser import ResidualDenoiser
from pfedgpa_app.diffusion.generation import generate
from pfedgpa_app.diffusion.guidance import guide
from pfedgpa_app.diffusion.inversion import invert
from pfedgpa_app.diffusion.mixing import nearness
from pfedgpa_app.diffusion.raw import RawSpace
from pfedgpa_app.diffusion.schedule import NoiseSchedule, sampling_timesteps
from pfedgpa_app.diffusion.subspace import Spectrum, Subspace
from pfedgpa_app.diffusion.training import train_denoiser
from pfedgpa_app.diffusion.unet import UNetDenoiser
from pfedgpa_app.randomness import initialized_by
from pfedgpa_app.state import below, under

Space = Subspace | RawSpace
MakeGenerator = Callable[..., torch.Generator]
"""Called with the name of a purpose and, by keyword, with a device."""


@dataclass(frozen=True)
class ParameterDiffusion:
    """What a denoiser that learned the distribution of a bank makes of its vectors.

    Attributes
    ----------
    space
        Where the denoiser works. It may have no dimensions, where nothing is denoised.
    denoiser
        Predicts noise in coordinates of the space.
    start
        First timestep of inversion and denoising.
    coordinates
        Those of the bank's vectors, ``(num_clients, dim)``.
    changes
        By how much inversion and denoising moved them, ``(num_clients, dim)``.
    """

    config: DiffusionConfig
    space: Space
    denoiser: nn.Module
    start: int
    coordinates: Tensor
    changes: Tensor

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

        Raises
        ------
        FloatingPointError
            If the training diverged.
        """
        rank = rank_of(config, spectrum)
        if config.space == "raw":
            space: Space = RawSpace.fit(vectors, multiple=2**config.num_blocks)
        else:
            space = Subspace.fit(vectors, rank, spectrum)
        start = first_timestep(config, spectrum, rank)
        coordinates = space.project(vectors)
        plain = cls(config, space, nn.Identity(), start, coordinates, torch.zeros_like(coordinates))
        is_denoised = space.dim and config.generator == "diffusion"
        return plain._trained(device, make_generator) if is_denoised else plain

    def _trained(self, device: torch.device, make_generator: MakeGenerator) -> "ParameterDiffusion":
        """Return the model with a denoiser trained on its coordinates, and what that changes."""
        config, coordinates = self.config, self.coordinates.to(device)
        with initialized_by(make_generator("denoiser")):
            denoiser = _new_denoiser(config, self.space.dim).to(device)
        train_denoiser(
            denoiser,
            schedule_of(config),
            coordinates,
            train_steps=config.train_steps,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            generator=make_generator("training", device=device),
        )
        noises = make_generator("inversion", device=device)
        generated = _invert_and_generate(config, denoiser, self.start, coordinates, noises)
        if not bool(torch.isfinite(generated).all()):
            raise FloatingPointError(
                "the diffusion model generates values that are not finite; right would be a "
                "smaller diffusion.learning-rate"
            )
        return replace(self, denoiser=denoiser, changes=generated.cpu() - self.coordinates)

    @property
    def noise_to_signal(self) -> float:
        """Variance of the noise at the first timestep, in units of the signal's."""
        alpha_bar = float(schedule_of(self.config).alphas_cumprod[self.start])
        return (1 - alpha_bar) / alpha_bar

    def guided(self, current: Tensor, previous: Tensor, config: OnboardingConfig) -> Tensor:
        """Return the coordinates ``(1, dim)`` of a newcomer after guided denoising.

        Local training took it from ``previous`` to ``current``, both ``(d,)``. Without a denoiser
        there is no guidance, and they are those of ``current``.
        """
        here = self.space.project([current])
        if not self.space.dim or self.config.generator != "diffusion":
            return here
        before = self.space.project([previous])
        device = next(self.denoiser.parameters()).device
        guided: Tensor = guide(
            self.denoiser,
            schedule_of(self.config),
            here.to(device),
            before.to(device),
            config.guidance,
            sampling_timesteps(config.start, config.num_steps),
        )
        return guided.cpu()

    def nearness(self, coordinates: Tensor) -> Tensor:
        """Return how near coordinates ``(n, dim)`` are to those of the bank's vectors.

        Rows ``(n, num_clients)``, float64, that sum to 1.
        """
        return nearness(coordinates, self.coordinates, self.noise_to_signal)

    def state(self) -> dict[str, Tensor]:
        """Return the model as named tensors."""
        return {
            **under("space", self.space.state()),
            **under("denoiser", self.denoiser.state_dict()),
            "start": torch.tensor(self.start),
            "coordinates": self.coordinates,
            "changes": self.changes,
        }

    @classmethod
    def of(
        cls, config: DiffusionConfig, state: dict[str, Tensor], device: torch.device
    ) -> "ParameterDiffusion":
        """Return the model of what `state` returned.

        Raises
        ------
        KeyError, RuntimeError
            If it was made with other settings.
        """
        space = (RawSpace if config.space == "raw" else Subspace).of(below("space", state))
        denoiser = _new_denoiser(config, space.dim)
        denoiser.load_state_dict(below("denoiser", state))
        start, coordinates = int(state["start"]), state["coordinates"]
        return cls(config, space, denoiser.to(device), start, coordinates, state["changes"])


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
    if not dim or config.generator != "diffusion":
        return nn.Identity()
    if config.space == "raw":
        return UNetDenoiser(config.hidden_size, config.num_blocks)
    return ResidualDenoiser(dim, config.hidden_size, config.num_blocks)


def _invert_and_generate(
    config: DiffusionConfig,
    denoiser: nn.Module,
    start: int,
    coordinates: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Denoise the codes of coordinates ``(n, dim)``, averaged over the draws of the noises."""
    schedule = schedule_of(config)
    draws = coordinates.repeat(config.num_draws, 1)
    timesteps = sampling_timesteps(start, config.num_steps)
    code = invert(denoiser, schedule, draws, timesteps, generator)
    denoised = generate(denoiser, schedule, code, config.fidelity)
    return denoised.view(config.num_draws, *coordinates.shape).mean(dim=0)
