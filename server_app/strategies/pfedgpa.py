"""pFedGPA: the server trains a diffusion model on the clients' parameters."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from logging import INFO, WARNING
from typing import Any, ClassVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.common import log
from flwr.serverapp import Grid
from torch import Tensor

from pfedgpa_app.aggregation import GenerativeAggregator
from pfedgpa_app.bank import ClientRecord
from pfedgpa_app.config import DiffusionConfig
from pfedgpa_app.diffusion.signal import SKETCH, sketched
from pfedgpa_app.files import count_of
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
"""Rounds from a client's first measurement to its second: in the first round models mean little."""
MISFITS_AFTER = 2
"""Rounds from one in which a client's halves did not fit to the next in which it is measured."""
MEASURED_TOGETHER = 10
"""Clients that are measured in a round, if as many train: the common update is their mean."""

_EARLIER = "its halves of an earlier round do not fit, and there are no others"


class PFedGPA(ClientwiseFedAvg):
    """Generative parameter aggregation for personalized federated learning.

    Implementation based on https://arxiv.org/abs/2409.05701. Each upload is inverted to its latent
    code and denoised by a diffusion model of all clients' parameters, which gives the client's own
    model, moved towards what it has in common with others. Only that client receives it.

    Clients of the first round are members. A later client, a newcomer, starts from the mean of the
    members' parameters. For some rounds it receives what members with the same data receive or,
    where sharing is not measured, the result of guided denoising. Then it becomes a member: its
    uploads enter the bank and the average.

    Parameters
    ----------
    diffusion : DiffusionConfig, optional
        Settings of the diffusion model.
    momentum : float (default: 0.0)
        Momentum of each client's own model.
    noised : bool (default: False)
        Whether clients add noise to their uploads for privacy. They then upload no halves, so that
        sharing depends on uploads alone, and are evaluated with the generated model.
    **kwargs : Any
        The arguments of `ClientwiseFedAvg`, such as ``seed``, and of Flower's `FedAvg`, such as
        ``fraction_train``.

    Examples
    --------
    >>> strategy = PFedGPA(fraction_train=0.5, diffusion=DiffusionConfig(fidelity=0.5))
    >>> strategy.start(grid, initial_arrays=ArrayRecord(model.state_dict()), num_rounds=20)
    """

    arguments: ClassVar[Mapping[str, str]] = {"diffusion": "diffusion", "noised": "privacy.is_on"}
    aggregator: Kept[GenerativeAggregator]
    client_momentum: Kept[ClientMomentum]
    guard: Kept[Guard]

    def __init__(
        self,
        *,
        diffusion: DiffusionConfig | None = None,
        momentum: float = 0.0,
        noised: bool = False,
        **kwargs: Any,
    ) -> None:
        diffusion = diffusion or DiffusionConfig()
        if noised:
            sharing = "none" if diffusion.sharing == "none" else "affinity"
            diffusion = diffusion.model_copy(update={"sharing": sharing, "own_weight": 0.0})
        self.diffusion = diffusion
        self.client_momentum = ClientMomentum(momentum)
        self.guard = Guard()
        super().__init__(generated_layers=diffusion.patterns, **kwargs)

    def begin(self, spec: ModelSpec) -> None:
        """Initialize the aggregator."""
        super().begin(spec)
        self.aggregator = GenerativeAggregator(
            self.global_model.vector(spec.initial),
            self.diffusion,
            self.onboarding,
            seed=self.seed,
            archived=self.vault,
        )

    def _choose_measured(self, clients: Sequence[int]) -> None:
        """Choose which of the clients that will train are measured.

        Due are those never measured, those measured in their first round alone some rounds ago, and
        those measured long ago. The others measured longest ago are added, since it takes several
        to separate a client's update from the common one.
        """
        bank, server_round = self.aggregator.bank, self.record.server_round
        num_known = len({*bank.members, *clients})
        is_first = server_round == self.completed_rounds + 1
        if is_first and (warning := too_few(num_known, self.diffusion)):
            log(WARNING, "pFedGPA: %s", warning)
        # Members receive the mean for it, from which two of them could infer each other's model.
        are_enough = not bank.has_members or len(bank.members) >= self.diffusion.min_contributors
        self.optional_extras = {}
        if self.diffusion.sharing != "measured" or not are_enough:
            return
        records = {client: bank.of(client) for client in clients}
        may_compare = len(clients) >= MIN_CLIENTS
        due = [each for each in clients if self._is_due(records[each], server_round, may_compare)]
        if not due:
            return
        others = sorted(
            (client for client in clients if client not in due),
            key=lambda client: records[client].last_measured_round or 0,
        )
        measured = {*due, *others[: max(0, MEASURED_TOGETHER - len(due))]}
        self.optional_extras = dict.fromkeys(measured, HALVES_LAYOUT)
        for client in measured:
            record = records[client]
            record.was_measured_again = record.last_measured_round is not None
            record.last_measured_round = server_round

    def _is_due(self, record: ClientRecord, server_round: int, may_compare: bool) -> bool:
        if record.last_measured_round is None:
            return True
        every = self.diffusion.measure_every
        wait = every if record.was_measured_again else min(SECOND_AFTER, every)
        if record.has_misfits and may_compare:
            wait = MISFITS_AFTER
        return server_round - record.last_measured_round >= wait

    def extras(self, client: int) -> StateDict:
        """Return the members' mean ``(d,)`` for clients that are measured.

        For those that receive it as their parameters it is empty.
        """
        if client not in self.optional_extras:
            return {}
        is_known = self.aggregator.bank.knows(client)
        return {COMMON: self.aggregator.default_model() if is_known else torch.empty(0)}

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send each client its personalized model, without a request for halves."""
        self.optional_extras = {}
        return super().configure_evaluate(server_round, arrays, config, grid)

    def counts(self, client: int) -> bool:
        """Return whether a client is a member and no outlier."""
        return self.aggregator.is_member(client) and super().counts(client)

    def detect_outliers(self, uploads: dict[int, Upload]) -> dict[int, str]:
        """Return the clients whose updates or halves are unlike those of others, with the reason.

        Of newcomers, from whom nobody learns, only halves count. Clients whose halves do not fit
        are outliers until they fit, as long as enough train in a round to compare them.
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
            text = "pFedGPA: no outlier detection, with uploads of %s; right would be %d or more"
            log(INFO, text, count_of(num, "client"), MIN_CLIENTS)
        reported = {c: each for c, each in sorted(uploads.items()) if HALVES in each.extras}
        sketches = [sketched(each.vector - each.start) for each in reported.values()]
        odd = misfits([each.extras[HALVES] for each in reported.values()], sketches)
        if len(reported) >= MIN_CLIENTS:
            for row, client in enumerate(reported):
                has_entries = bool(reported[client].extras[HALVES].any())  # zeros fit everything
                record = bank.of(client)
                record.has_misfits = row in odd or (record.has_misfits and not has_entries)
        reasons = {client: odd[row] for row, client in enumerate(reported) if row in odd}
        may_compare = len(self._sent) >= MIN_CLIENTS
        earlier = {c: _EARLIER for c in uploads if bank.of(c).has_misfits and may_compare}
        return earlier | reasons | found

    def learn(self, server_round: int, uploads: dict[int, Upload]) -> None:
        """Add the uploads to the bank, train the diffusion model and denoise all clients."""
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
            "pFedGPA: %s in the bank, %s; %s in this round",
            count_of(len(self.aggregator.bank.members), "client"),
            self.aggregator.describe(),
            count_of(len(newcomers), "newcomer"),
        )
        alone = self.aggregator.alone(uploads)
        for client in alone:
            self.record.note(client, alone=True)
        if alone:
            text = alone_now(len(alone), len(uploads), self.diffusion)
            # Some that share nothing are for the run's page: a bench would warn in each round.
            log(WARNING if len(alone) == len(uploads) else INFO, "pFedGPA: %s", text)

    def trace(self) -> Row:
        """Return the state of the method after the round; nothing if nobody trained."""
        return trace_of(self.aggregator) if self.record.num_trained else {}

    def training_state(self, client: int) -> StateDict:
        """Return the model generated for a client, or the mean for an unknown one."""
        return self.global_model.with_vector(next(self._vectors([client])))

    def evaluation_state(self, client: int) -> StateDict:
        """Return a client's personalized model, or the mean for an unknown one."""
        return next(self.evaluation_states([client]))

    def training_states(self, clients: Sequence[int]) -> Iterator[StateDict]:
        """Return the `training_state` of each client of a round, and choose who is measured."""
        self._choose_measured(clients)
        return map(self.global_model.with_vector, self._vectors(clients))

    def evaluation_states(self, clients: Sequence[int]) -> Iterator[StateDict]:
        """Yield the `evaluation_state` of each client.

        A member's is interpolated between the generated model and its upload, since interpolated
        weights are often better than both (WiSE-FT, arXiv 2109.01903). The upload's weight is
        ``own_weight``, less the part that others supply: one upload of a group adds noise to the
        group's mean. Members that were not in the last round have the generated model, as their
        uploads are older than what others know.
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
