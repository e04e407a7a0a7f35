"""Generative aggregation: the server's side of pFedGPA (Algorithm 1 of arXiv 2409.05701)."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
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

STATE_FORMAT = "pfedgpa-aggregator-1"
_SUBSPACE = ("mean", "basis", "eigenvalues")


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
        self.subspace: Subspace | None = None
        self.denoiser: ResidualDenoiser | None = None
        self.coordinates: dict[int, Tensor] = {}

    def observe(self, client: int, vector: Tensor) -> None:
        """Put a client's parameters ``(d,)`` into the bank, in place of its last ones."""
        self.bank[client] = vector.detach().cpu()

    def fit(self, server_round: int) -> None:
        """Train the diffusion model on the bank and denoise the code of every client in it.

        With one client, or clients that are all the same, there is nothing to learn: everyone
        keeps its upload.
        """
        clients = sorted(self.bank)
        vectors = torch.stack([self.bank[client] for client in clients])
        self.coordinates = {}
        try:
            self.subspace = self._fit_subspace(vectors)
        except ValueError:
            self.subspace = self.denoiser = None
            return
        projected = self.subspace.project(vectors).to(self.device)
        with single_thread():
            self.denoiser = self._train(projected, server_round)
            generated = self._generate(projected, server_round)
        self.coordinates = dict(zip(clients, generated.cpu(), strict=True))

    def personalize(self, client: int) -> Tensor:
        """Return the parameters ``(d,)`` generated for a client by the last `fit`.

        Raises
        ------
        KeyError
            If the client was never observed.
        """
        if self.subspace is None or client not in self.coordinates:
            return self.bank[client]
        return self.subspace.reconstruct(self.coordinates[client])

    def save(self, file: Path) -> None:
        """Write all that the next round needs as safetensors, in place of an older file at once."""
        tensors = {f"bank.{client}": vector for client, vector in self.bank.items()}
        tensors |= {f"coordinates.{client}": row for client, row in self.coordinates.items()}
        metadata = {"format": STATE_FORMAT}
        if self.subspace is not None and self.denoiser is not None:
            tensors |= {f"subspace.{name}": getattr(self.subspace, name) for name in _SUBSPACE}
            tensors |= {f"denoiser.{name}": t for name, t in self.denoiser.state_dict().items()}
            metadata["scale"] = self.subspace.scale.hex()
        unfinished = file.with_name(file.name + ".unfinished")
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, metadata
        )
        unfinished.replace(file)

    def load(self, file: Path) -> None:
        """Take over what `save` wrote.

        Raises
        ------
        ValueError
            If the file is damaged or is none of `save`; the state is then as it was.
        """
        try:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        if metadata.get("format") != STATE_FORMAT:
            raise ValueError(f"{file} holds no state of an aggregator ({STATE_FORMAT})")
        self.bank = {int(name): t for name, t in _below(tensors, "bank.").items()}
        self.coordinates = {int(name): t for name, t in _below(tensors, "coordinates.").items()}
        self.subspace = self.denoiser = None
        if "scale" in metadata:
            parts = _below(tensors, "subspace.")
            self.subspace = Subspace(scale=float.fromhex(metadata["scale"]), **parts)
            self.denoiser = self._new_denoiser(self.subspace.dim).to(self.device)
            self.denoiser.load_state_dict(_below(tensors, "denoiser."))

    @property
    def schedule(self) -> NoiseSchedule:
        """The forward process."""
        config = self.config
        return NoiseSchedule.linear(config.num_timesteps, config.beta_start, config.beta_end)

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


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
