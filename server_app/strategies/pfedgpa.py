"""pFedGPA: the server trains a diffusion model on the clients' parameters."""

from collections.abc import Iterable, Iterator, Sequence
from logging import INFO, WARNING
from typing import Any, Self

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.common import log
from flwr.serverapp import Grid
from torch import Tensor

from pfedgpa_app.aggregation import GenerativeAggregator
from pfedgpa_app.bank import ClientRecord
from pfedgpa_app.config import Config, DiffusionConfig, OnboardingConfig
from pfedgpa_app.diffusion.signal import SKETCH, sketched
from pfedgpa_app.guard import MIN_CLIENTS, Guard, Move, misfits
from pfedgpa_app.model_spec import ModelSpec
from pfedgpa_app.parameters import ParameterLayout, StateDict
from pfedgpa_app.protocol import COMMON, HALVES
from pfedgpa_app.rounds import Row
from pfedgpa_app.sharing import alone_now, too_few
from pfedgpa_app.stateful import Kept
from pfedgpa_app.trace import trace_of
from server_app.momentum import ClientMomentum
from server_app.replies import Upload
from server_app.strategies.clientwise import ClientwiseFedAvg

HALVES_LAYOUT = ParameterLayout.of({HALVES: torch.empty(2, SKETCH)})
"""Both sketches."""
SECOND_AFTER = 4
"""Rounds from a client's first measurement to its second. In the first round models mean little."""
MISFITS_AFTER = 2
"""Rounds from one in which a client's halves did not fit to the next in which it is measured."""
MEASURED_TOGETHER = 10
"""So many clients are measured in a round, if as many train: what all did is their mean."""

_EARLIER = "its halves of an earlier round do not fit, and there are no others"


class PFedGPA(ClientwiseFedAvg):
    """Generative parameter aggregation for personalized federated learning.

    Implementation based on https://arxiv.org/abs/2409.05701. Every upload is inverted to a latent
    code and denoised by a diffusion model of all clients' parameters; what comes back is the
    client's own model, improved by what the others learned. It is sent to that client alone, for
    training and for evaluation.

    Whoever trains in the first round is a member. A client that comes later starts from the mean
    of the members' parameters, and for some rounds is given what members are given that ask for
    the same, or what guided denoising makes of its upload where that is not measured. Then it
    becomes a member, and its uploads part of the bank and the average.

    Parameters
    ----------
    seed : int (default: 0)
        Fixes sampling, the denoiser's training and the noises.
    diffusion : DiffusionConfig, optional
        Settings of the diffusion model, among them which layers it generates.
    onboarding : OnboardingConfig, optional
        Settings of newcomers' rounds.
    momentum : float (default: 0.0)
        Part of its last step by which each client's model goes on.
    noised : bool (default: False)
        Whether clients add noise to their uploads for their privacy. They then tell nothing of
        halves, so that uploads alone decide what is shared, and hold the generated model: their
        uploads have more noise.
    **kwargs : Any
        The arguments of `ClientwiseFedAvg` and Flower's `FedAvg`, such as ``fraction_train``.

    Attributes
    ----------
    aggregator : GenerativeAggregator
        The method.

    Examples
    --------
    >>> strategy = PFedGPA(fraction_train=0.5, diffusion=DiffusionConfig(fidelity=0.5))
    >>> strategy.start(grid, initial_arrays=ArrayRecord(model.state_dict()), num_rounds=20)
    """

    aggregator: Kept[GenerativeAggregator]
    client_momentum: Kept[ClientMomentum]
    guard: Kept[Guard]

    def __init__(
        self,
        *,
        seed: int = 0,
        diffusion: DiffusionConfig | None = None,
        onboarding: OnboardingConfig | None = None,
        momentum: float = 0.0,
        noised: bool = False,
        **kwargs: Any,
    ) -> None:
        diffusion = diffusion or DiffusionConfig()
        if noised:
            sharing = "none" if diffusion.sharing == "none" else "affinity"
            diffusion = diffusion.model_copy(update={"sharing": sharing, "own_weight": 0.0})
        onboarding = onboarding or OnboardingConfig()
        self.diffusion = diffusion
        self.onboarding = onboarding
        self.noised = noised
        self.client_momentum = ClientMomentum(momentum)
        self.guard = Guard()
        super().__init__(
            generated_layers=diffusion.patterns,
            seed=seed,
            late_clients=onboarding.late_clients,
            join_round=onboarding.join_round,
            **kwargs,
        )

    @classmethod
    def of(cls, config: Config, spec: ModelSpec, **kwargs: Any) -> Self:
        """Return the strategy with the settings of a run; ``kwargs`` are those of the class."""
        return cls(
            spec=spec,
            seed=config.seed,
            diffusion=config.diffusion,
            onboarding=config.onboarding,
            momentum=config.server.momentum,
            noised=config.privacy.is_on,
            **kwargs,
        )

    def begin(self, spec: ModelSpec) -> None:
        """Make the aggregator for the initial model."""
        super().begin(spec)
        self.aggregator = GenerativeAggregator(
            self.global_model.vector(spec.initial),
            self.diffusion,
            self.onboarding,
            seed=self.seed,
            is_noised=self.noised,
            archived=self.vault,
        )

    def _choose_measured(self, clients: Sequence[int]) -> None:
        """Choose who is measured of the clients that will train.

        Those are due that were never measured, or once and some rounds ago, when models meant
        little yet, or long ago. With them go as many others, those measured longest ago, as it
        takes to tell what a client did from what all did. Who does not tell, or nothing that can
        be used, is not asked sooner again than others.
        """
        bank, server_round = self.aggregator.bank, self.record.server_round
        num_known = len({*bank.members, *clients})
        is_first = server_round == self.completed_rounds + 1
        if is_first and (warning := too_few(num_known, self.diffusion)):
            log(WARNING, "pFedGPA: %s", warning)
        # Members are sent the mean for it, which would tell two of them too much of each other.
        may_tell = not bank.has_members or len(bank.members) >= self.diffusion.min_contributors
        self.optional_extras = {}
        if self.diffusion.sharing != "measured" or not may_tell:
            return
        records = {client: bank.of(client) for client in clients}
        may_compare = len(clients) >= MIN_CLIENTS
        due = [each for each in clients if self._is_due(records[each], server_round, may_compare)]
        others = sorted(
            (each for each in clients if each not in due),
            key=lambda each: records[each].last_measured_round or 0,
        )
        if due:
            measured = {*due, *others[: max(0, MEASURED_TOGETHER - len(due))]}
            self.optional_extras = dict.fromkeys(measured, HALVES_LAYOUT)
        for client in self.optional_extras:
            records[client].last_measured_round, records[client].was_measured_again = (
                server_round,
                records[client].last_measured_round is not None,
            )

    def _is_due(self, record: ClientRecord, server_round: int, may_compare: bool) -> bool:
        if record.last_measured_round is None:
            return True
        every = self.diffusion.measure_every
        wait = every if record.was_measured_again else min(SECOND_AFTER, every)
        if record.has_misfits and may_compare:
            wait = MISFITS_AFTER
        return server_round - record.last_measured_round >= wait

    def extras(self, client: int) -> StateDict:
        """Return the members' mean, ``(d,)``, where it is measured what moves clients from it.

        Those to whom it is sent as the parameters are asked with no entries.
        """
        if client not in self.optional_extras:
            return {}
        is_known = self.aggregator.bank.knows(client)
        return {COMMON: self.aggregator.default_model() if is_known else torch.empty(0)}

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send each client its model, and ask nobody for its halves."""
        self.optional_extras = {}
        return super().configure_evaluate(server_round, arrays, config, grid)

    def counts(self, client: int) -> bool:
        """Tell whether a client is a member, as all of the first round are, and is not unusual."""
        return self.aggregator.is_member(client) and super().counts(client)

    def detect_outliers(self, uploads: dict[int, Upload]) -> dict[int, str]:
        """Return which clients moved, or told of halves, unlike the others.

        Of newcomers, from whom nobody learns, only what they told counts. Whose halves did not fit
        is unusual until they do, as long as enough train in a round to compare them.
        """
        if not self.diffusion.guard:
            return {}
        bank, layout = self.aggregator.bank, self.global_model.layout
        members = {c: uploads[c] for c in sorted(uploads) if self.aggregator.is_member(c)}
        moves = {c: Move.of(layout, each.sent, each.state) for c, each in members.items()}
        known = bank.members | bank.non_members
        positions = known | {c: each.vector for c, each in members.items()}
        initial, num_connected = self.aggregator.initial, len(self.roster.connected)
        found = self.guard.find_outliers(moves, positions, initial, num_connected)
        if (num := self.guard.num_compared) < MIN_CLIENTS:
            log(INFO, "pFedGPA: %d clients are too few to tell who is unusual", num)
        told = {c: each for c, each in sorted(uploads.items()) if HALVES in each.extras}
        sketches = [sketched(each.vector - each.start) for each in told.values()]
        odd = misfits([each.extras[HALVES] for each in told.values()], sketches)
        if len(told) >= MIN_CLIENTS:
            for row, client in enumerate(told):
                said = bool(told[client].extras[HALVES].any())  # zeros fit everything
                record = bank.of(client)
                record.has_misfits = row in odd or (record.has_misfits and not said)
        reasons = {client: odd[row] for row, client in enumerate(told) if row in odd}
        may_compare = len(self._sent) >= MIN_CLIENTS
        earlier = {c: _EARLIER for c in uploads if bank.of(c).has_misfits and may_compare}
        return earlier | reasons | found

    def learn(self, server_round: int, uploads: dict[int, Upload]) -> None:
        """Put the uploads into the bank, train the diffusion model and denoise every client."""
        newcomers = [client for client in uploads if not self.aggregator.is_member(client)]
        for client, upload in uploads.items():
            if HALVES in upload.extras and client not in self.outliers:
                self.aggregator.compare(client, upload.extras[HALVES])
            if client not in newcomers:
                is_outlier = client in self.outliers
                self.aggregator.observe(client, upload.vector, is_outlier=is_outlier)
        try:
            self.aggregator.fit(server_round, self.global_model.vector(self.average))
        except FloatingPointError as error:
            log(WARNING, "pFedGPA: everyone keeps its upload in this round: %s", error)
        for client, upload in uploads.items():
            self.client_momentum.trained(client, upload.start, server_round)
        for client in newcomers:
            self.aggregator.onboard(client, uploads[client].vector, uploads[client].start)
        log(
            INFO,
            "pFedGPA: %d members, %s; %d newcomers in this round",
            len(self.aggregator.bank.members),
            self.aggregator.describe(),
            len(newcomers),
        )
        alone = self.aggregator.alone(uploads)
        for client in alone:
            self.record.alone(client)
        if alone:
            told = alone_now(len(alone), len(uploads), self.diffusion)
            # Where some share, who does not is for the page; each round of a bench would say it.
            log(WARNING if len(alone) == len(uploads) else INFO, "pFedGPA: %s", told)

    def trace(self) -> Row:
        """Return what the diffusion model found in the round; nothing if nobody trained."""
        return trace_of(self.aggregator) if self.record.num_trained else {}

    def training_state(self, client: int) -> StateDict:
        """Return the model generated for a client, or the mean if nothing is known of it."""
        return self.global_model.with_vector(next(self._vectors([client])))

    def evaluation_state(self, client: int) -> StateDict:
        """Return the model that a client holds, or the mean if nothing is known of it."""
        return next(self.evaluation_states([client]))

    def training_states(self, clients: Sequence[int]) -> Iterator[StateDict]:
        """Return the `training_state` of each client of a round, and choose who is measured."""
        self._choose_measured(clients)
        return map(self.global_model.with_vector, self._vectors(clients))

    def evaluation_states(self, clients: Sequence[int]) -> Iterator[StateDict]:
        """Yield the `evaluation_state` of each client.

        A member's is on the way from the generated model to its own upload. Fine-tuned weights and
        those that they were tuned from have, halfway between, often the best of both (WiSE-FT,
        arXiv 2109.01903). The way is ``own_weight``, less the part of it that others supply
        already: the upload of one of a group adds noise to the mean of the group. Who was not in
        the round holds the generated model: what it made of an older one is worth less than what
        others know by now.
        """
        bank = self.aggregator.bank
        members = bank.members
        latest = max((bank.of(client).seen for client in members), default=0)
        for client, vector in zip(clients, self._vectors(clients), strict=True):
            if client in members and bank.of(client).seen == latest:
                own = 1 - self.aggregator.supplied_by_others(client)
                vector = torch.lerp(vector, members[client], self.diffusion.own_weight * own)
            yield self.global_model.with_vector(vector)

    def _vectors(self, clients: Sequence[int]) -> Iterator[Tensor]:
        """Yield the generated parameters ``(d,)`` of each client, or the mean."""
        bank = self.aggregator.bank
        generated = self.aggregator.personalize_each([each for each in clients if bank.knows(each)])
        for client in clients:
            if bank.knows(client):
                yield self.client_momentum.ahead(client, next(generated))
            else:
                yield self.aggregator.default_model()

    def summary(self) -> None:
        """Log the settings."""
        super().summary()
        log(INFO, "\t└──> Diffusion: %s", self.diffusion)
        log(INFO, "\t└──> Onboarding: %s", self.onboarding)
