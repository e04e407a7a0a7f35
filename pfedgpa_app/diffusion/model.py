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
from pfedgpa_app.diffusion.mixture import mix, withheld
from pfedgpa_app.diffusion.raw import RawSpace
from pfedgpa_app.diffusion.schedule import NoiseSchedule, sampling_timesteps
from pfedgpa_app.diffusion.signal import Shrinkage
from pfedgpa_app.diffusion.subspace import Spectrum, Subspace
from pfedgpa_app.diffusion.training import train_denoiser
from pfedgpa_app.diffusion.unet import UNetDenoiser
from pfedgpa_app.randomness import initialized_by
from pfedgpa_app.state import below, under

Space = Subspace | RawSpace
# Of a mixture's weights, the part that is too small to tell anything.
_NEGLIGIBLE = 0.01
MakeGenerator = Callable[..., torch.Generator]
"""Called with the name of a purpose and, by keyword, with a device."""


@dataclass(frozen=True)
class ParameterDiffusion:
    """Generates parameters for the clients of a bank, whose distribution it learned.

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
    generated
        What their inversion and denoising gave, ``(num_clients, dim)``. The other generators have
        no denoiser: ``kin-mean`` takes the mean of the coordinates, weighted by kinship,
        ``shrinkage`` shrinks each axis, ``upload`` leaves the coordinates as they are.
    shrinkage
        What is kept of the clients' deviations from the mean, along the axes of the space (as it is
        in ``generated`` already) and all others; None where nobody told what is signal.
    """

    config: DiffusionConfig
    space: Space
    denoiser: nn.Module
    start: int
    coordinates: Tensor
    generated: Tensor
    shrinkage: Shrinkage | None = None

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
        auto = config.rank == "auto"
        rank = spectrum.signal_rank if auto else min(int(config.rank), spectrum.max_rank)
        if config.space == "raw":
            space: Space = RawSpace.fit(vectors, multiple=2**config.num_blocks)
        else:
            space = Subspace.fit(vectors, rank, spectrum)
        start = first_timestep(config, spectrum, rank)
        coordinates = space.project(vectors)
        plain = cls(config, space, nn.Identity(), start, coordinates, coordinates)
        if not space.dim or config.generator == "upload":
            return plain
        if config.generator == "shrinkage":
            factors = spectrum.shrinkage(space.dim).to(coordinates.dtype)
            return replace(plain, generated=coordinates * factors)
        if config.generator == "kin-mean":
            kinship = plain.kinship(coordinates, coordinates)
            return replace(plain, generated=kinship @ coordinates)
        return plain._trained(device, make_generator)

    def _trained(self, device: torch.device, make_generator: MakeGenerator) -> "ParameterDiffusion":
        """Return the model with a denoiser trained on its coordinates, and what that generates."""
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
        return replace(self, denoiser=denoiser, generated=generated.cpu())

    def shrunk(self, shrinkage: Shrinkage) -> "ParameterDiffusion":
        """Return a model that keeps a part of what sets clients apart, in the space and outside.

        Without it they get the mean of their kin outside of the space.
        """
        dtype = self.generated.dtype
        if isinstance(self.space, RawSpace):  # whose coordinates are no principal axes
            axes = shrinkage.axes
            generated = (axes * shrinkage.kept) @ (axes.T @ self.generated.double())
            return replace(self, generated=generated.to(dtype), shrinkage=shrinkage)
        kept = shrinkage.kept[: self.space.dim].to(dtype)
        return replace(self, generated=self.generated * kept, shrinkage=shrinkage)

    def personalize(self, rows: Sequence[int], vectors: Sequence[Tensor]) -> Tensor:
        """Return the parameters ``(len(rows), d)`` generated for some of the vectors of `fit`."""
        weights, places = self._weights(rows), list(rows)
        if self.shrinkage is None:
            generated = self._realize(self.generated[places], weights, vectors)
        else:
            generated = self._shrunk_mixtures(torch.eye(len(self.generated))[places], vectors)
        uploads = [vectors[row] for row in places]
        return self._without_too_much(generated, weights, vectors, uploads, places)

    def parts(self, row: int) -> Tensor:
        """Return the part of each vector of `fit` in what one is given, ``(num_clients,)``.

        What the denoiser changed is not counted. The parts sum to 1, and may be negative.
        """
        weights = self._weights([row])[0]
        less = withheld(weights, self.config.min_kin, row)
        parts = weights - less
        parts[row] += less.sum()
        return parts

    def alone(self) -> Tensor:
        """Tell who of `fit` is given nothing of others since it was `withheld`, ``(num_clients,)``.

        Nothing is less than a hundredth of all.
        """
        rows = range(len(self.coordinates))
        weights = self._weights(rows)
        less = torch.stack([withheld(weights[row], self.config.min_kin, row) for row in rows])
        left = (weights - less).abs().fill_diagonal_(0).sum(dim=1)
        return less.any(dim=1) & (left < _NEGLIGIBLE)

    def along(self, axes: Tensor, origin: Tensor) -> "ParameterDiffusion":
        """Return a model that is given and generates ``axes @ (vector - origin)``.

        With ``axes`` ``(num_axes, d)`` it tells where what is generated lies, for next to nothing:
        all that `personalize` does with vectors is linear in them.
        """
        return replace(self, space=self.space.along(axes, origin))

    def imitate(self, kin: Tensor, currents: Sequence[Tensor], vectors: Sequence[Tensor]) -> Tensor:
        """Return what others receive who ask for the same as some clients, ``(num_clients, d)``.

        ``kin`` ``(num_clients, num_vectors)`` has how far each of `fit` does, at least one of them
        for each client; ``currents`` are the clients' own parameters ``(d,)``.
        """
        assert self.shrinkage is not None
        of = kin / kin.sum(dim=1, keepdim=True)
        mixtures = self._shrunk_mixtures(of, vectors)
        none = [None] * len(of)
        return self._without_too_much(mixtures, self.shrinkage.mixture(of), vectors, currents, none)

    def onboard(
        self,
        current: Tensor,
        previous: Tensor,
        config: OnboardingConfig,
        vectors: Sequence[Tensor],
        kin: Tensor | None = None,
    ) -> Tensor:
        """Return the parameters ``(d,)`` of a newcomer.

        Where it is known who of the others asks for the same, ``kin`` ``(num_clients,)`` is each
        one's part in what it is given; who has none keeps as much of its own as the others do.
        Otherwise it is guided denoising: local training took the newcomer from ``previous`` to
        ``current``, both ``(d,)``. ``vectors`` are those of `fit`. Without a denoiser there is no
        guidance: it gets what those are given that it is like.
        """
        if self.shrinkage is not None and kin is not None and bool(kin.any()):
            return self.imitate(kin[None], [current], vectors)[0]
        if self.shrinkage is not None and (kin is not None or not self.space.dim):
            share = float(self.shrinkage.share)
            return self.space.mean + share * (current - self.space.mean)
        here, before = self.space.project([current, previous]).split(1)
        if self.space.dim and self.config.generator == "diffusion":
            device = next(self.denoiser.parameters()).device
            here = guide(
                self.denoiser,
                schedule_of(self.config),
                here.to(device),
                before.to(device),
                config.guidance,
                sampling_timesteps(config.start, config.num_steps),
            ).cpu()
        # Guidance may lead beyond all that the denoiser ever saw; the nearest that was is there.
        generated = self.kinship(here, self.coordinates) @ self.generated
        weights = self.kinship(generated, self.coordinates)
        realized = self._realize(generated, weights, vectors)
        return self._without_too_much(realized, weights, vectors, [current], [None])[0]

    def kinship(self, here: Tensor, there: Tensor) -> Tensor:
        """Return how much coordinates ``(n, dim)`` are like others ``(m, dim)``.

        That is the posterior of the optimal denoiser at the first timestep,
        ``softmax(-|c_i - c_j|^2 / 2 noise-to-signal)``, as rows ``(n, m)`` that sum to 1.
        """
        alpha_bar = float(schedule_of(self.config).alphas_cumprod[self.start])
        noise_to_signal = (1 - alpha_bar) / alpha_bar
        left, right = here.double(), there.double()
        # |c_i - c_j|^2 without |c_i|^2, which the softmax does not see.
        distances = right.square().sum(dim=1) - 2 * left @ right.T
        return torch.softmax(-distances / (2 * noise_to_signal), dim=1).to(here.dtype)

    def state(self) -> dict[str, Tensor]:
        """Return the model as named tensors."""
        return {
            **under("space", self.space.state()),
            **under("denoiser", self.denoiser.state_dict()),
            "start": torch.tensor(self.start),
            "coordinates": self.coordinates,
            "generated": self.generated,
            **(under("shrinkage", self.shrinkage._asdict()) if self.shrinkage else {}),
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
        shrinkage = below("shrinkage", state)
        return cls(
            config,
            space,
            denoiser.to(device),
            start,
            coordinates,
            state["generated"],
            Shrinkage(**shrinkage) if shrinkage else None,
        )

    def _weights(self, rows: Sequence[int]) -> Tensor:
        """Return the weights of all vectors in what some receive, before any is withheld.

        A row a client, ``(len(rows), num_vectors)``.
        """
        if self.shrinkage is None:
            return self.kinship(self.coordinates[list(rows)], self.coordinates)
        return self.shrinkage.mixture(torch.eye(len(self.generated))[list(rows)])

    def _shrunk_mixtures(self, of: Tensor, vectors: Sequence[Tensor]) -> Tensor:
        """Return mixtures of what clients receive, ``(num_mixtures, d)``.

        ``of`` ``(num_mixtures, num_clients)`` has each client's part in them.
        """
        assert self.shrinkage is not None
        mixtures = mix(self.shrinkage.weights(of, begin=self.space.dim), vectors)
        # One by one, as below: a product of all is rounded otherwise with their number.
        for mixture, row in zip(mixtures, of.to(self.generated.dtype), strict=True):
            mixture += self.space.reconstruct(row @ self.generated)
        return mixtures

    def _without_too_much(
        self,
        generated: Tensor,
        weights: Tensor,
        vectors: Sequence[Tensor],
        uploads: Sequence[Tensor],
        own: Sequence[int | None],
    ) -> Tensor:
        """Return parameters ``(n, d)`` without what is `withheld` of their weights.

        A client's own upload takes the place, also of that part of what the denoiser changed.
        """
        min_kin = self.config.min_kin
        less = torch.stack(
            [withheld(each, min_kin, place) for each, place in zip(weights, own, strict=True)]
        )
        cut = less.any(dim=1).nonzero()[:, 0].tolist()
        if not cut:
            return generated
        for row in cut:  # one by one: all of them would be as large again as what is generated
            mixture, take = mix(torch.stack([weights[row], less[row]]), vectors)
            place, total = own[row], weights[row].abs().sum()
            others = total - (weights[row, place].abs() if place is not None else 0)
            part = float(less[row].abs().sum() / max(others, _NEGLIGIBLE * total))
            kept = mixture - take + float(less[row].sum()) * uploads[row]
            generated[row] = kept + (1 - part) * (generated[row] - mixture)
        return generated

    def _realize(self, generated: Tensor, weights: Tensor, vectors: Sequence[Tensor]) -> Tensor:
        """Return the parameters ``(n, d)`` of generated coordinates ``(n, dim)``.

        What the vectors have outside of the space is averaged over each client's kin: it is the
        noise of each, and whoever has no kin keeps its own.
        """
        realized = mix(weights, vectors)
        for each, row, coordinates in zip(realized, weights, generated, strict=True):
            each -= self.space.reconstruct(row @ self.coordinates)
            each += self.space.reconstruct(coordinates)
        return realized


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
