"""Generative aggregation: the server's side of pFedGPA (Algorithm 1 of arXiv 2409.05701)."""

import contextlib
import statistics
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pfedgpa_app.config import DiffusionConfig, OnboardingConfig
from pfedgpa_app.diffusion import (
    ParameterDiffusion,
    Shrinkage,
    Spectrum,
    agreement,
    divergence,
    mix,
    normalized,
)
from pfedgpa_app.randomness import make_generator, resolve_device, single_thread
from pfedgpa_app.state import WriteError, below, load_state, save_state, under
from pfedgpa_app.vault import MemoryVault, Vault

STATE_KIND = "pfedgpa-aggregator-7"

# Of all that a client is like, the part that must have been in the round to speak for it.
MIN_KINSHIP = 0.01
# Divergence from the initial model up to which clients are alike: docs/choosing.md has the runs.
MAX_DIVERGENCE = 0.5
# Agreement of those who ask for the same: members of one group have 1, of others less than 0.4.
MIN_AGREEMENT = 0.5
# Rounds after which others do not learn from a client's last upload any more. Where clients take
# part seldom it is as many times the median member's rounds between its last two uploads.
MAX_AGE = 20
_MAX_INTERVALS = 5


class GenerativeAggregator:
    """Learn the distribution of the clients' parameters and generate each client's own.

    `observe` every member's upload of a round or `seclude` it, `fit` once and `onboard` newcomers,
    then `personalize` any of them. A client is a number, and the order of the uploads does not
    matter.

    Parameters
    ----------
    config
        The settings of the diffusion model.
    onboarding
        The settings of guided denoising.
    seed
        Fixes, with the round, all that is drawn at random.
    is_noised
        Whether clients add independent noise to all that they upload, as for their privacy.

    Attributes
    ----------
    bank
        The last upload of each member, ``(d,)``, brought up to date. A member of which nothing was
        heard for more than `MAX_AGE` rounds, or that is secluded, is not in it.
    guests
        The model of others of whom something is known, ``(d,)``, brought up to date: what was
        generated for a newcomer, the last upload of a member.
    retired
        What would be in the bank or among the guests, ``(d,)``, if there were not ``max_members``
        of whom was heard later. Nothing is done with it until it is asked for.
    seen
        The round in which something came from each client last.
    rounds
        The round of each member's last upload.
    intervals
        The rounds between the last two uploads of each member that made two.
    secluded
        Whose upload is its model as it is, until it is observed again.
    halves
        How two halves of each client's images moved what all have in common apart, `normalized`
        sketches ``(2, size)``.
    model
        The diffusion model of the parameters; None where nobody is like anybody else.
    alike
        Whether clients went together so far.
    """

    def __init__(
        self,
        config: DiffusionConfig,
        onboarding: OnboardingConfig | None = None,
        *,
        seed: int = 0,
        is_noised: bool = False,
    ) -> None:
        self.config = config
        self.onboarding = onboarding or OnboardingConfig()
        self.seed = seed
        self.is_noised = is_noised
        self.device = resolve_device(config.device)
        self.bank: dict[int, Tensor] = {}
        self.guests: dict[int, Tensor] = {}
        self.retired: Vault = MemoryVault()
        self.seen: dict[int, int] = {}
        self.rounds: dict[int, int] = {}
        self.intervals: dict[int, int] = {}
        self.secluded: set[int] = set()
        self.halves: dict[int, Tensor] = {}
        self.average: Tensor | None = None
        self._fresh: dict[int, Tensor] = {}
        self._round = 0
        self.begin(None)

    def begin(self, initial: Tensor | None) -> None:
        """Set what all clients started from, ``(d,)``."""
        self.initial = initial
        self.model: ParameterDiffusion | None = None
        self.alike = True

    def observe(self, client: int, vector: Tensor) -> None:
        """Take in the parameters ``(d,)`` that a client uploaded in this round."""
        self._fresh[client] = vector.detach().cpu()
        self.secluded.discard(client)

    def seclude(self, client: int, vector: Tensor) -> None:
        """Take in parameters ``(d,)`` that nobody else is to learn from; they are its model."""
        self._fresh[client] = vector.detach().cpu()
        self.secluded.add(client)

    def compare(self, client: int, halves: Tensor) -> None:
        """Take in how training on each half of a client's images moved what all have in common.

        ``halves`` are `sketched` moves, ``(2, size)``. With ``sharing = "measured"``, once most
        members told, everyone keeps of its deviations from the mean what is signal.
        """
        with single_thread():
            self.halves[client] = normalized(halves.detach().cpu())

    def fit(self, server_round: int, average: Tensor | None = None) -> None:
        """Train the diffusion model on the bank and denoise the code of every client in it.

        ``average`` ``(d,)`` is that of the round's uploads.

        Raises
        ------
        FloatingPointError
            If the training diverged; everyone then keeps its upload.
        """
        self._round = server_round
        with single_thread():
            self._bring_up_to_date()
            self.average = average
            self._take_in(server_round)
            self.model = None
            self.model = self._learn(server_round)

    def personalize(self, client: int) -> Tensor:
        """Return the parameters ``(d,)`` generated for a client by the last `fit` or `onboard`.

        Raises
        ------
        KeyError
            If it was neither in the bank then nor onboarded.
        """
        if client in self.guests:
            return self.guests[client]
        if client in self.retired:
            with single_thread():
                return self._brought_back(client)
        upload = self.bank[client]
        row = sorted(self.bank).index(client)
        if self.model is None:
            return upload
        with single_thread():
            return self.model.personalize(row, self._vectors())

    def expect(self, default: Tensor) -> Tensor:
        """Return what a client may expect of which nothing is known, ``(d,)``.

        That is the mean of the members' parameters. Where no distribution was learned it is the
        average that the last `fit` was given, or ``default`` ``(d,)``, as it is where so few are
        members that the mean would tell too much of each (``min_kin``).
        """
        if len(self.bank) < self.config.min_kin - 1:
            return default
        if self.model is not None:
            return self.model.space.mean
        return default if self.average is None else self.average

    def onboard(self, client: int, current: Tensor, previous: Tensor) -> None:
        """Generate the parameters of a newcomer.

        With measured sharing it is given what those members are given that ask for the same;
        otherwise it goes through guided denoising. Its local training took it from ``previous`` to
        ``current``, both ``(d,)``; they do not get into the bank.
        """
        self._unretire(client)
        with single_thread():
            self.guests[client] = self._welcomed(current, previous, self._kin(client))
        self.seen[client] = self._round

    def describe(self) -> str:
        """Say what the last `fit` found."""
        found = _described(self.model) if self.model else "as uploaded"
        if self.config.sharing == "measured" and not self._is_measured():
            told = len(self.bank.keys() & self.halves.keys())
            return f"{found}; sharing is not measured: only {told} members told of their halves"
        return found

    def state(self) -> dict[str, Tensor]:
        """Return all that the next round needs, as named tensors."""
        tensors = {
            **under("bank", self.bank),
            **under("guests", self.guests),
            **under("retired", self.retired.state()),
            **under("halves", self.halves),
            **under("rounds", {client: torch.tensor(n) for client, n in self.rounds.items()}),
            **under("intervals", {c: torch.tensor(n) for c, n in self.intervals.items()}),
            **under("seen", {client: torch.tensor(n) for client, n in self.seen.items()}),
            "secluded": torch.tensor(sorted(self.secluded)),
        }
        if self.average is not None:
            tensors["average"] = self.average
        if self.initial is not None:
            tensors["initial"] = self.initial
        tensors["alike"] = torch.tensor(self.alike)
        return tensors | under("model", self.model.state() if self.model else {})

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state` returned.

        Raises
        ------
        ValueError
            If it does not fit the settings; the state is then as it was.
        """
        try:
            bank, guests, halves = (
                {int(client): vector for client, vector in below(name, tensors).items()}
                for name in ("bank", "guests", "halves")
            )
            parts = below("model", tensors)
            model = ParameterDiffusion.of(self.config, parts, self.device) if parts else None
            rounds, intervals, seen = (
                {int(client): int(n) for client, n in below(name, tensors).items()}
                for name in ("rounds", "intervals", "seen")
            )
            secluded = {int(client) for client in tensors["secluded"]}
            alike = bool(tensors["alike"])
            self.retired.restore(below("retired", tensors))
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"not the state of these settings: {error}") from error
        self.bank, self.guests, self.halves = bank, guests, halves
        self.rounds, self.intervals, self.seen = rounds, intervals, seen
        self.secluded = secluded
        self.model, self.alike = model, alike
        self.average, self.initial = tensors.get("average"), tensors.get("initial")
        self._fresh = {}

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

    def _welcomed(self, current: Tensor, previous: Tensor, kin: Tensor | None) -> Tensor:
        if self.model is None:
            return current
        return self.model.onboard(current, previous, self.onboarding, self._vectors(), kin)

    def _kin(self, client: int) -> Tensor | None:
        """Return how far the members ask for the same as a client, ``(num_members,)``, if known."""
        if not self._is_measured() or client not in self.halves:
            return None
        members = torch.stack([self._told(member) for member in sorted(self.bank)])
        return (agreement(self.halves[client], members) - MIN_AGREEMENT).clamp(min=0)

    def _unretire(self, client: int) -> None:
        if client in self.retired:  # pop would read it
            del self.retired[client]

    def _brought_back(self, client: int) -> Tensor:
        """Return what is given to a client that is retired, ``(d,)``.

        Its own model is of long ago: it is given what those members are given that ask for the
        same. Where nobody does, or it is not known, it is its own. Whose file was damaged is given
        what one may expect of whom nothing is known.
        """
        kin = self._kin(client)
        try:
            last = self.retired[client]
        except ValueError:
            if self.initial is None:
                raise
            last = self.expect(self.initial)
        if client in self.secluded or kin is None or not bool(kin.any()):
            return last
        return self._welcomed(last, last, kin)

    def _is_measured(self) -> bool:
        """Tell whether most members told how their halves move them."""
        told = len(self.bank.keys() & self.halves.keys())
        return self.config.sharing == "measured" and 2 * told > len(self.bank)

    def _told(self, client: int) -> Tensor:
        """Return both halves of a client, ``(2, size)``; of a silent one they are 0."""
        halves = self.halves.get(client)
        return halves if halves is not None else torch.zeros_like(next(iter(self.halves.values())))

    def _vectors(self) -> list[Tensor]:
        """Return the bank's vectors, by client."""
        return [self.bank[client] for client in sorted(self.bank)]

    def _learn(self, server_round: int) -> ParameterDiffusion | None:
        """Return the diffusion model of the bank.

        With one client there is nothing to learn. Where it is not known what is signal, clients
        without any principal axis that stands out are alike, or each is different from all others.
        Once different, they stay so: whoever is not in a round goes the way of the others, and what
        all have in common grows.
        """
        vectors = self._vectors()
        if len(vectors) < 2:
            return None
        spectrum = Spectrum.of(vectors, is_noised=self.is_noised)
        is_measured = self._is_measured()
        is_flat = (
            not is_measured
            and self.config.space == "subspace"
            and self.config.rank == "auto"
            and not spectrum.signal_rank
        )
        if is_flat and self.alike and self.initial is not None:
            self.alike = divergence(vectors, self.initial) <= MAX_DIVERGENCE
        if is_flat and not self.alike:
            return None
        # The 0 has no meaning any more, and gives a seed the digits that it always gave.
        streams = partial(make_generator, self.seed, server_round, 0)
        model = ParameterDiffusion.fit(self.config, vectors, spectrum, self.device, streams)
        if not is_measured:
            return model
        halves = torch.stack([self._told(client) for client in sorted(self.bank)])
        return model.shrunk(Shrinkage.of(spectrum, halves))

    def _take_in(self, server_round: int) -> None:
        """Sort the uploads of a round, and the members that were not heard of for long."""
        known = self.bank | self.guests | self._fresh
        again = self._fresh.keys() & self.rounds.keys()
        self.intervals |= {client: server_round - self.rounds[client] for client in again}
        self.rounds |= dict.fromkeys(self._fresh, server_round)
        self.seen |= dict.fromkeys(self._fresh, server_round)
        for client in self._fresh:
            self._unretire(client)
        ages = {client: server_round - last for client, last in self.rounds.items()}
        # Ages would let nobody go where most are gone; they are all there is at first.
        intervals = self.intervals or ages
        usual = statistics.median(intervals.values()) if intervals else 0
        max_age = max(MAX_AGE, _MAX_INTERVALS * usual)
        members = {client for client, age in ages.items() if age <= max_age} - self.secluded
        self.bank = {client: known[client] for client in known if client in members}
        self.guests = {client: known[client] for client in known if client not in members}
        most = max(self.config.max_members, len(self._fresh))
        self._fresh = {}
        for some in (self.bank, self.guests):
            latest = sorted(some, key=lambda client: (-self.seen[client], client))
            for client in latest[most:]:
                with contextlib.suppress(WriteError):  # it stays then, until there is room
                    self.retired[client] = some[client]
                    del some[client]

    def _bring_up_to_date(self) -> None:
        """Move who was not in the round by how far others have come since it was.

        That is as far as those members of the round came that the diffusion model takes for its
        like, or as all of them on average if none is.
        """
        old = {
            client: vector
            for client, vector in sorted((self.bank | self.guests).items())
            if client not in self._fresh and client not in self.secluded
        }
        clients = sorted(self.bank)
        again = [
            row
            for row, client in enumerate(clients)
            if client in self._fresh and client not in self.secluded
        ]
        if not old or not again:
            return
        moves = [self._fresh[clients[row]] - self.bank[clients[row]] for row in again]
        together = mix(torch.full((len(again),), 1 / len(again)), moves)
        kinship = self._company(old)[:, again]
        shares = kinship.sum(dim=1, keepdim=True)
        for (client, vector), kin, share in zip(old.items(), kinship, shares, strict=True):
            move = together if share < MIN_KINSHIP else mix(kin / share, moves)
            (self.guests if client in self.guests else self.bank)[client] = vector + move

    def _company(self, away: dict[int, Tensor]) -> Tensor:
        """Return how much clients that are away go the way of each member, ``(n, num_members)``."""
        clients = sorted(self.bank)
        if self.model is None:
            return torch.zeros(len(away), len(clients))
        here = self.model.space.project(list(away.values()))
        kinship = self.model.kinship(here, self.model.coordinates)
        if self.model.shrinkage is not None:
            for row, client in enumerate(away):
                if client in self.bank:
                    kinship[row] = self.model.shrinkage.company(clients.index(client))
        return kinship


def _described(model: ParameterDiffusion) -> str:
    found = f"{model.space.dim} dimensions from timestep {model.start}"
    if model.shrinkage is None:
        return found
    return f"{found}, {float(model.shrinkage.share):.0%} of the deviations kept"
