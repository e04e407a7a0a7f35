"""Generative aggregation: the server's side of pFedGPA (Algorithm 1 of arXiv 2409.05701)."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Annotated

import torch
from torch import Tensor

from pfedgpa_app.bank import Bank, Standing
from pfedgpa_app.config import DiffusionConfig, OnboardingConfig
from pfedgpa_app.diffusion.mixing import are_alone, capped, mixing_from_halves, share_of
from pfedgpa_app.diffusion.mixture import mix
from pfedgpa_app.diffusion.model import ParameterDiffusion, rank_of
from pfedgpa_app.diffusion.signal import SKETCH, agreement, normalized
from pfedgpa_app.diffusion.subspace import Spectrum, dispersion_ratio
from pfedgpa_app.files import count_of
from pfedgpa_app.randomness import make_generator, repeatable, resolve_device
from pfedgpa_app.stateful import Kept, Stateful, Vector
from pfedgpa_app.vault import Vault

# Least mixing weight of the clients of a round, in all, for an absent client to move with them.
MIN_CO_MOVEMENT = 0.01
# Largest `dispersion_ratio` at which clients without principal axes of signal count as alike.
MAX_DISPERSION = 0.5
# Least `agreement` of clients of one distribution: 1 within a group, below 0.4 between groups.
MIN_AGREEMENT = 0.5
# Models made in one pass over the bank: more take more memory, and are little faster.
MODELS_PER_PASS = 32


class GenerativeAggregator(Stateful):
    """Learn the distribution of the clients' parameters and generate each client's own.

    `observe` every member's upload of a round, `fit` once and `onboard` newcomers, then
    `personalize` any of them. A client is a number, and the order of the uploads does not matter.

    That is the server's part of a round of Algorithm 1: the uploads go into the bank, the denoiser
    learns the bank (`train_denoiser`), every upload is inverted to its latent code (`invert`) and
    denoised (`generate`). Each member's generated model is a row of the `mixing` matrix times the
    denoised uploads of all. The algorithm's second branch is `onboard`, with guided denoising
    (`guide`).

    Parameters
    ----------
    initial
        The parameters with which all clients begin, ``(d,)``.
    config
        The settings of the diffusion model.
    onboarding
        The settings of guided denoising, and of how long a client is a newcomer.
    seed
        Fixes, with the round, all that is drawn at random.
    archived
        Storage of the models that are not kept in memory; in memory by default.

    Attributes
    ----------
    bank
        The records and models of all clients.
    average
        The average of the uploads that the last `fit` was given, ``(d,)``.
    mixing
        Row i has the weights of the members' uploads in the model of member i, before `capped`:
        ``(num_members, num_members)``, float64.
    model
        The diffusion model of the members' parameters; None where nothing is shared.
    spectrum
        The principal components of the bank in the last `fit`; None with one client, and after
        `restore`.
    alike
        Whether no round found all clients different so far.
    """

    initial: Kept[Vector]
    average: Kept[Vector]
    bank: Kept[Bank]
    mixing: Kept[Annotated[Tensor, "num_members num_members"]]
    share: Kept[float]
    model: Kept[ParameterDiffusion | None]
    alike: Kept[bool]

    def __init__(
        self,
        initial: Tensor,
        config: DiffusionConfig,
        onboarding: OnboardingConfig | None = None,
        *,
        seed: int = 0,
        archived: Vault | None = None,
    ) -> None:
        self.initial = self.average = initial
        self.config = config
        self.onboarding = onboarding or OnboardingConfig()
        self.seed = seed
        self.device = resolve_device(config.device)
        self.bank = Bank(config.max_members, archived)
        self.mixing = torch.eye(0, dtype=torch.float64)
        self.share = 1.0
        self.model = None
        self.alike = True
        self._round = 0
        self.spectrum: Spectrum | None = None

    def complete_restored(self) -> None:
        """Check that the model is one of these settings."""
        if self.model is not None:
            self.model.denoiser(self.config, self.device)

    def observe(self, client: int, vector: Tensor, *, is_outlier: bool = False) -> None:
        """Take in the parameters ``(d,)`` that a client uploaded in this round.

        An outlier keeps its upload as its model, and nobody learns from it.
        """
        standing = Standing.QUARANTINED if is_outlier else Standing.MEMBER
        self.bank.uploads[client] = vector.detach().cpu(), standing

    def is_member(self, client: int) -> bool:
        """Return whether what a client uploads in this round is a member's, not a newcomer's.

        All of the first round are members; later, a client is a newcomer for as many rounds as
        `OnboardingConfig` says.
        """
        record = self.bank.of(client)
        was_onboarded = record.rounds_onboarded >= self.onboarding.rounds
        is_newcomer = record.standing is Standing.NEWCOMER and not was_onboarded
        return not is_newcomer or not self.bank.has_members

    def compare(self, client: int, halves: Tensor) -> None:
        """Take in the updates of the common parameters on each half of a client's examples.

        ``halves`` are `sketched` updates, ``(2, SKETCH)``, of all clients of a round from the same
        parameters. With ``sharing = "measured"``, once most members reported theirs, they decide
        how much of a client's deviation from the mean is signal, and kept.
        """
        with repeatable(num_threads=1):
            self.bank.reports[client] = normalized(halves.detach().cpu())

    def fit(self, server_round: int, average: Tensor | None = None) -> None:
        """Train the diffusion model on the bank and denoise the code of every client in it.

        ``average`` is that of the round's uploads, ``(d,)``; by default that of the last call.

        Raises
        ------
        FloatingPointError
            If the training diverged; everyone then keeps its upload.
        """
        self._round = server_round
        self.average = self.average if average is None else average
        with repeatable(num_threads=1):
            self._bring_up_to_date()
            self.bank.take_in(server_round)
            self.model = self.spectrum = None
            self.mixing, self.share = torch.eye(len(self.bank.members), dtype=torch.float64), 1.0
            self._learn(server_round)

    def personalize(self, client: int) -> Tensor:
        """Return the parameters ``(d,)`` generated for a client by the last `fit` or `onboard`.

        Raises
        ------
        KeyError
            If it was neither in the bank then nor onboarded.
        """
        return next(self.personalize_each([client]))

    def personalize_each(self, clients: Sequence[int]) -> Iterator[Tensor]:
        """Yield what `personalize` returns of each client, by few passes over the bank.

        A round calls it twice, for training and for evaluation. For 100 clients and 117,000
        parameters that takes 0.25 s; keeping the models would take another 47 MB.

        Raises
        ------
        KeyError
            As `personalize`, before the first of those that are made in the same pass.
        """
        for begin in range(0, len(clients), MODELS_PER_PASS):
            with repeatable(num_threads=1):
                together = self._personalized(clients[begin : begin + MODELS_PER_PASS])
            yield from together

    def supplied_by_others(self, client: int) -> float:
        """Return how much of what sets a member apart others supply to its model, 0 .. 1.

        Of its deviation from the mean, `share` is kept, and ``W_ii`` of that is from its own
        upload. In a group others supply nearly all of it; where each client is different, or all
        are alike, nothing.
        """
        row = list(self.bank.members).index(client)
        own = float(self.mixing[row, row])
        return min(max(self.share - own, 0.0), 1.0)

    def default_model(self) -> Tensor:
        """Return the model for clients of which nothing is known, ``(d,)``.

        It is the mean of the members' parameters. Where no distribution was learned it is the
        average that the last `fit` was given; with so few members that the mean would reveal too
        much of each (``min_contributors``), the initial model.
        """
        if len(self.bank.members) < self.config.min_contributors - 1:
            return self.initial
        return self.average if self.model is None else self.model.space.mean

    def onboard(self, client: int, current: Tensor, previous: Tensor) -> None:
        """Generate the parameters of a newcomer.

        With measured sharing it is the mean of the models of those members whose halves agree with
        its own; without any, it keeps as much of its own as the members do. Otherwise guided
        denoising finds which members are near; without sharing its result is the model. Local
        training went from ``previous`` to ``current``, both ``(d,)``, which do not get into the
        bank.
        """
        with repeatable(num_threads=1):
            generated = self._onboarded(client, current, previous)
        self.bank.put(client, generated, self._round)

    def alone(self, clients: Iterable[int]) -> list[int]:
        """Return which clients receive nothing of others, for the others' privacy.

        These are members where there are fewer than ``min_contributors``, or of a group that is as
        small, and newcomers where there are too few members for a mean of them.
        """
        members, min_contributors = self.bank.members, self.config.min_contributors
        if len(members) < min_contributors:
            alone = set(members)
        else:
            reported = are_alone(self.mixing, min_contributors).tolist()
            alone = {client for client, is_alone in zip(members, reported, strict=True) if is_alone}
        has_mean = len(members) >= min_contributors - 1
        return [each for each in clients if each in alone or not (each in members or has_mean)]

    def describe(self) -> str:
        """Say what the last `fit` found."""
        found = "not denoised"
        if self.model is not None:
            dim = self.model.space.dim
            axes = "1 principal axis" if dim == 1 else f"{dim} principal axes"
            found = (
                f"denoised on {axes} from timestep {self.model.start}; "
                f"{self.share:.0%} of a client's difference from the mean is kept"
            )
        if self.config.sharing == "measured" and self._reported() is None:
            num_reports = sum(each is not None for each in self.bank.halves)
            halves = f"halves of {count_of(num_reports, 'client')} are too few"
            return f"{found}; agreement is not measured: {halves}"
        return found

    def _learn(self, server_round: int) -> None:
        """Make the mixing matrix and the diffusion model of the bank.

        With one client there is nothing to learn. Without halves, clients without a principal axis
        of signal are all alike or all different, by their `dispersion_ratio`. Once different, they
        stay so: absent clients move with the others, which makes the ratio smaller.
        """
        vectors, config = list(self.bank.members.values()), self.config
        if len(vectors) < 2:
            return
        self.spectrum = spectrum = Spectrum.of(vectors)
        reported = self._reported()
        by_uploads = reported is None and config.sharing != "none"
        if by_uploads and config.space == "subspace" and not rank_of(config, spectrum):
            self.alike = self.alike and dispersion_ratio(vectors, self.initial) <= MAX_DISPERSION
            if not self.alike:
                return
        streams = partial(make_generator, self.seed, server_round, 0)
        model = ParameterDiffusion.fit(config, vectors, spectrum, self.device, streams)
        if reported is not None:
            self.mixing = mixing_from_halves(spectrum, reported)
        elif by_uploads:
            self.mixing = model.affinities(model.coordinates)
        self.share, self.model = share_of(self.mixing, spectrum), model

    def _onboarded(self, client: int, current: Tensor, previous: Tensor) -> Tensor:
        model, config = self.model, self.config
        if model is None:
            return current
        affinity = self._affinity(client, self._reported())
        if affinity is None and model.space.dim:
            guided = model.guided(current, previous, config, self.onboarding, self.device)
            if config.sharing == "none":
                change = guided - model.space.project([current])
                return current + model.space.displacement(change)[0]
            affinity = model.affinities(guided)[0]
        row = self._row(affinity)
        if row is None:
            return model.space.mean + self.share * (current - model.space.mean)
        return self._mixed({0: row}, [current], {})[0]

    def _reported(self) -> Tensor | None:
        """Return both halves of the members, ``(num_members, 2, SKETCH)``; 0 without a report.

        None unless most members reported.
        """
        halves = self.bank.halves
        num_reports = sum(each is not None for each in halves)
        if self.config.sharing != "measured" or 2 * num_reports <= len(halves):
            return None
        return torch.stack([torch.zeros(2, SKETCH) if each is None else each for each in halves])

    def _affinity(self, client: int, reported: Tensor | None) -> Tensor | None:
        """Return how far the members' halves agree with a client's, ``(num_members,)``, if known.

        ``reported`` is what `_reported` returns.
        """
        halves = self.bank.of(client).halves
        if halves is None or reported is None:
            return None
        return (agreement(halves, reported) - MIN_AGREEMENT).clamp(min=0)

    def _personalized(self, clients: Sequence[int]) -> list[Tensor]:
        """Return the models of clients, ``(d,)``: mixtures, or their own where there are none.

        An archived model is old: its client is given a mixture of the members whose halves agree
        with its own. Without any it keeps its own.
        """
        given = [self._own(client) for client in clients]
        if self.model is None:
            return given
        members = {client: row for row, client in enumerate(self.bank.members)}
        places = {n: members[client] for n, client in enumerate(clients) if client in members}
        rows = {number: self.mixing[place] for number, place in places.items()}
        archived = {n: client for n, client in enumerate(clients) if client in self.bank.archived}
        reported = self._reported() if archived else None
        for number, client in archived.items():
            row = self._row(self._affinity(client, reported))
            if row is not None and self.bank.of(client).standing is not Standing.QUARANTINED:
                rows[number] = row
        return self._mixed(rows, given, places)

    def _own(self, client: int) -> Tensor:
        """Return a client's model ``(d,)``; if its file is damaged, that of an unknown client."""
        if client in self.bank.archived:
            try:
                return self.bank.archived[client]
            except ValueError:
                return self.default_model()
        model = self.bank.clients[client].model
        if model is None:
            raise KeyError(client)
        return model

    def _row(self, affinity: Tensor | None) -> Tensor | None:
        """Return the row of `mixing` of members weighted by ``affinity``, ``(num_members,)``."""
        return (
            (affinity / affinity.sum()) @ self.mixing
            if affinity is not None and bool(affinity.any())
            else None
        )

    def _mixed(
        self, rows: dict[int, Tensor], own: Sequence[Tensor], places: dict[int, int]
    ) -> list[Tensor]:
        """Return mixtures of the denoised vectors of the bank in place of some of ``own`` ``(d,)``.

        ``rows`` has the members' weights in them, ``(num_members,)``. What `capped` takes from a
        weight goes to the receiver's own parameters; ``places`` are the receivers' in the bank.
        """
        assert self.model is not None
        given = list(own)
        if not rows:
            return given
        parts = torch.stack(list(rows.values()))
        weights, own_parts, left = capped(
            parts, self.config.min_contributors, [places.get(n) for n in rows]
        )
        mixtures = mix(weights, list(self.bank.members.values()))
        changes = self.model.changes.double()
        # One by one: a product of all is rounded otherwise with their number.
        for row, (number, mixture) in enumerate(zip(rows, mixtures, strict=True)):
            if own_parts[row]:
                mixture += float(own_parts[row]) * own[number]
            change = left[row] * (parts[row] @ changes)
            if bool(change.any()):
                mixture += self.model.space.displacement(change.to(mixture.dtype))
            given[number] = mixture
        return given

    def _bring_up_to_date(self) -> None:
        """Move the models of absent clients as the clients of the round moved.

        Each moves by the mean update of those that its mixing weights name, or of all if these
        were absent too.
        """
        records, members = self.bank.clients, self.bank.members
        away = {
            client: vector
            for client, vector in sorted((members | self.bank.non_members).items())
            if client not in self.bank.uploads
            and records[client].standing is not Standing.QUARANTINED
        }
        moves = {
            row: self.bank.uploads[client][0] - vector
            for row, (client, vector) in enumerate(members.items())
            if client in self.bank.uploads and self.bank.uploads[client][1] is Standing.MEMBER
        }
        if not away or not moves:
            return
        # Negative weights name clients that move otherwise.
        mixing_weights = torch.zeros(len(away), len(members))
        if self.model is not None:
            mixing_weights = self.model.affinities(self.model.space.project(list(away.values())))
            places = {client: row for row, client in enumerate(members)}
            for row, client in enumerate(away):
                if client in places:
                    mixing_weights[row] = self.mixing[places[client]].clamp(min=0)
        mixing_weights = mixing_weights[:, list(moves)]
        shares = mixing_weights.sum(dim=1, keepdim=True)
        weights = torch.where(shares < MIN_CO_MOVEMENT, 1 / len(moves), mixing_weights / shares)
        clients = list(away)
        for begin in range(0, len(clients), MODELS_PER_PASS):
            group = slice(begin, begin + MODELS_PER_PASS)
            mixtures = mix(weights[group], list(moves.values()))
            for client, move in zip(clients[group], mixtures, strict=True):
                records[client].model = away[client] + move
