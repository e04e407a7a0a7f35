"""Generative aggregation: the server's side of pFedGPA (Algorithm 1 of arXiv 2409.05701)."""

from pathlib import Path

import torch
from torch import Tensor

from pfedgpa_app.config import DiffusionConfig
from pfedgpa_app.diffusion import (
    NoiseSchedule,
    ResidualDenoiser,
    Subspace,
    generate,
    invert,
    sampling_timesteps,
    signal_rank,
    train_denoiser,
)
from pfedgpa_app.randomness import (
    initialized_by,
    make_generator,
    resolve_device,
    single_thread,
)
from pfedgpa_app.state import below, load_state, save_state, under

STATE_KIND = "pfedgpa-aggregator-1"


class GenerativeAggregator:
    """Learn the distribution of the clients' parameters and generate each client's own.

    `observe` every upload of a round, `fit` once, then `personalize` any client that was ever
    observed. A client is a number, and the order of the uploads does not matter.

    Parameters
    ----------
    config
        The settings of the diffusion model.
    seed
        Fixes, with the round, all that is drawn at random.
    """

    def __init__(self, config: DiffusionConfig, seed: int = 0) -> None:
        self.config = config
        self.seed = seed
        self.device = resolve_device(config.device)
        self.bank: dict[int, Tensor] = {}
        self.average: Tensor | None = None
        self.subspace: Subspace | None = None
        self.denoiser: ResidualDenoiser | None = None
        self.coordinates: dict[int, Tensor] = {}
        self._fresh: set[int] = set()

    def observe(self, client: int, vector: Tensor) -> None:
        """Put a client's parameters ``(d,)`` into the bank, in place of its last ones."""
        self.bank[client] = vector.detach().cpu()
        self._fresh.add(client)

    def fit(self, server_round: int, average: Tensor | None = None) -> None:
        """Train the diffusion model on the bank and denoise the code of every client in it.

        ``average`` ``(d,)`` is that of the round's uploads. Clients that were not in the round move
        along with it, unless ``old-uploads`` says otherwise: what counts of an old upload is its
        deviation from its own round's average.

        With one client, or clients that are all the same, there is nothing to learn: everyone
        keeps its upload.

        Raises
        ------
        FloatingPointError
            If the training diverged; everyone then keeps its upload.
        """
        self._bring_up_to_date(average)
        clients = sorted(self.bank)
        vectors = torch.stack([self.bank[client] for client in clients])
        self.coordinates = {}
        with single_thread():
            try:
                self.subspace = self._fit_subspace(vectors)
            except ValueError:
                self.subspace = self.denoiser = None
                return
            projected = self.subspace.project(vectors).to(self.device)
            self.denoiser = self._train(projected, server_round)
            generated = self._generate(projected, server_round).cpu()
        if not bool(torch.isfinite(generated).all()):
            raise FloatingPointError(
                "the diffusion model generates values that are not finite; right would be a "
                "smaller diffusion.learning-rate"
            )
        self.coordinates = dict(zip(clients, generated, strict=True))

    def personalize(self, client: int) -> Tensor:
        """Return the parameters ``(d,)`` generated for a client by the last `fit`.

        Raises
        ------
        KeyError
            If the client was never observed.
        """
        if self.subspace is None or client not in self.coordinates:
            return self.bank[client]
        with single_thread():
            return self.subspace.reconstruct(self.coordinates[client])

    def state(self) -> dict[str, Tensor]:
        """Return all that the next round needs, as named tensors."""
        tensors = under("bank", self.bank) | under("coordinates", self.coordinates)
        if self.average is not None:
            tensors["average"] = self.average
        if self.subspace is not None and self.denoiser is not None:
            tensors |= under("subspace", self.subspace.state())
            tensors |= under("denoiser", self.denoiser.state_dict())
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state` returned.

        Raises
        ------
        ValueError
            If it does not fit the settings; the state is then as it was.
        """
        subspace, denoiser = None, None
        try:
            bank = {int(client): t for client, t in below("bank", tensors).items()}
            coordinates = {int(client): t for client, t in below("coordinates", tensors).items()}
            if parts := below("subspace", tensors):
                subspace = Subspace.of(parts)
                denoiser = self._new_denoiser(subspace.dim).to(self.device)
                denoiser.load_state_dict(below("denoiser", tensors))
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"not the state of these settings: {error}") from error
        self.bank, self.coordinates = bank, coordinates
        self.average = tensors.get("average")
        self._fresh = set()
        self.subspace, self.denoiser = subspace, denoiser

    def save(self, file: Path) -> None:
        """Write the state to a safetensors file, in place of an older one in one step."""
        save_state(file, STATE_KIND, self.state())

    def load(self, file: Path) -> None:
        """Take over what `save` wrote.

        Raises
        ------
        ValueError
            If the file is missing, damaged or none of `save`; the state is then as it was.
        """
        self.restore(load_state(file, STATE_KIND)[0])

    @property
    def schedule(self) -> NoiseSchedule:
        """The forward process."""
        config = self.config
        return NoiseSchedule.linear(config.num_timesteps, config.beta_start, config.beta_end)

    def _bring_up_to_date(self, average: Tensor | None) -> None:
        """Shift old uploads by how far the average moved since the last fit."""
        if average is not None and self.average is not None:
            old = self.bank.keys() - self._fresh if self.config.old_uploads == "deviation" else ()
            for client in old:
                self.bank[client] = self.bank[client] + (average - self.average)
        self.average = average
        self._fresh = set()

    def _fit_subspace(self, vectors: Tensor) -> Subspace:
        if self.config.rank != "auto":
            return Subspace.fit(vectors, self.config.rank)
        return Subspace.fit(vectors, signal_rank)

    def _train(self, projected: Tensor, server_round: int) -> ResidualDenoiser:
        config = self.config
        with initialized_by(make_generator(self.seed, "denoiser", server_round)):
            denoiser = self._new_denoiser(projected.shape[1])
        train_denoiser(
            denoiser.to(self.device),
            self.schedule,
            projected,
            train_steps=config.train_steps,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            generator=make_generator(self.seed, "training", server_round, device=self.device),
        )
        return denoiser

    def _new_denoiser(self, dim: int) -> ResidualDenoiser:
        return ResidualDenoiser(dim, self.config.hidden_size, self.config.num_blocks)

    def _generate(self, projected: Tensor, server_round: int) -> Tensor:
        """Invert and denoise coordinates ``(num_clients, dim)``, averaged over the draws."""
        assert self.denoiser is not None
        generator = make_generator(self.seed, "inversion", server_round, device=self.device)
        timesteps = sampling_timesteps(self.config.start, self.config.num_steps)
        draws = projected.repeat(self.config.num_draws, 1)
        code = invert(self.denoiser, self.schedule, draws, timesteps, generator)
        denoised = generate(self.denoiser, self.schedule, code, self.config.fidelity)
        return denoised.view(self.config.num_draws, *projected.shape).mean(dim=0)
