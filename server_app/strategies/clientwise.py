"""FedAvg with a message for each client, which checks what clients reply."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from logging import INFO, WARNING
from operator import attrgetter
from typing import Any, ClassVar, Self

import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    Metadata,
    MetricRecord,
    RecordDict,
)
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result
from torch import nn

from pfedgpa_app import protocol
from pfedgpa_app.config import Config, OnboardingConfig
from pfedgpa_app.files import count_of, quoted
from pfedgpa_app.model_spec import ModelSpec
from pfedgpa_app.parameters import ParameterLayout, StateDict
from pfedgpa_app.randomness import make_generator
from pfedgpa_app.rounds import BELOW_FLOOR, BUDGET_SPENT, NO_REPLY, RoundRecord, Row
from pfedgpa_app.stateful import Kept, Stateful
from pfedgpa_app.vault import MemoryVault, Vault
from server_app.global_model import GlobalModel, average_of
from server_app.outliers import outliers
from server_app.replies import (
    ReplyError,
    Upload,
    check_ranges,
    read_demand,
    read_metrics,
    read_upload,
)
from server_app.roster import Roster, by_addressee

# Clients that a warning lists.
_MAX_SHOWN = 20


class ClientwiseFedAvg(Stateful, FedAvg):
    """Federated Averaging that can send each client its own parameters.

    Implementation based on https://arxiv.org/abs/1602.05629; subclasses personalize. A reply that
    is invalid or missing costs its sender the round, and nobody else.

    Subclasses override the methods up to `trace`, which know clients by number. In a round come
    `training_state` and `extras` of each client that trains, `check` of each upload,
    `detect_outliers`, `counts`, `combine` and `learn`, then `evaluation_state` and `extras` of each
    client that is evaluated, and `trace`. Attributes marked `Kept` go into checkpoints.

    Parameters
    ----------
    generated_layers : Sequence[str] (default: ("*",))
        Patterns of the names of the parameters in an upload's vector.
    seed : int (default: 0)
        Random seed.
    roster : Roster, optional
        Numbers the clients, by default in the order of their node ids.
    onboarding : OnboardingConfig, optional
        Its ``late_clients`` with the highest numbers take no part before ``join_round``.
    momentum : float (default: 0.0)
        Server momentum (FedAvgM, https://arxiv.org/abs/1909.06335).
    join_timeout : float (default: inf)
        Seconds to wait for ``min_available_nodes`` and ``required``.
    include, exclude : Sequence[str] (default: ())
        Names, numbers or patterns of the clients that train, by default all, and of those that do
        not. All are evaluated.
    required : Sequence[str] (default: ())
        Names, numbers or patterns; a round waits until each matches a connected client.
    evaluate_every : int (default: 1)
        Interval of evaluations in rounds; 0 for none but that of the last round, which is always
        evaluated. Clients that train evaluate what they receive in every round.
    model : torch.nn.Module, optional
        The clients' model, from which `start` finds out what trains. By default these are all
        floating point tensors but the statistics of normalization layers.
    spec : ModelSpec, optional
        Structure and initial parameters of the model, if known before `start`.
    vault : Vault, optional
        Storage for what is seldom read, by default memory.
    metric_ranges : dict[str, tuple[float, float]], optional
        Smallest and largest valid value of metrics by name, by default any.
    **kwargs : Any
        The arguments of Flower's `FedAvg`.

    Attributes
    ----------
    arguments : Mapping[str, str]
        The constructor's arguments that are settings of a run, with their names in `Config`.
    clients_keep_parts : bool
        Whether personalized models have parts that only their clients know. The server can then
        neither save them nor resume the run.
    extras_layout : ParameterLayout | None
        Further tensors that clients must upload.
    optional_extras : dict[int, ParameterLayout]
        Further tensors that some clients may upload in this round, by client.
    sites : dict[int, StateDict]
        What each client last reported of its data, as ``Upload.site``.
    outliers : dict[int, str]
        Clients of the round from which others do not learn, with the reason.
    record : RoundRecord
        The rows of the current round.
    sampling_seed : int
        Seed of client sampling: ``seed``, but a secret on a network, where clients that can predict
        in which round they are a majority could wait for it.
    completed_rounds : int
        Rounds of the resumed run; Flower counts from 1 again.
    """

    arguments: ClassVar[Mapping[str, str]] = {}
    clients_keep_parts: ClassVar[bool] = False
    global_model: Kept[GlobalModel]
    sites: Kept[dict[int, StateDict]]

    def __init__(
        self,
        *,
        generated_layers: Sequence[str] = ("*",),
        seed: int = 0,
        roster: Roster | None = None,
        onboarding: OnboardingConfig | None = None,
        momentum: float = 0.0,
        join_timeout: float = math.inf,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        required: Sequence[str] = (),
        evaluate_every: int = 1,
        model: nn.Module | None = None,
        spec: ModelSpec | None = None,
        vault: Vault | None = None,
        metric_ranges: dict[str, tuple[float, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.generated_layers = tuple(generated_layers)
        self.seed = self.sampling_seed = seed
        self.roster = roster or Roster()
        self.onboarding = onboarding or OnboardingConfig()
        self.momentum = momentum
        self.join_timeout = join_timeout
        self.include = tuple(include)
        self.exclude = tuple(exclude)
        self.required = tuple(required)
        self.evaluate_every = evaluate_every
        self.model = model
        self.vault = MemoryVault() if vault is None else vault
        self.metric_ranges = metric_ranges or {}
        self.extras_layout: ParameterLayout | None = None
        self.optional_extras: dict[int, ParameterLayout] = {}
        self.sites = {}
        self.outliers: dict[int, str] = {}
        self.completed_rounds = 0
        self.record = RoundRecord(0)
        self._last_round = 0
        self._sent: dict[int, StateDict] = {}
        self._addressees: list[Metadata] = []
        self._sent_at = 0.0
        if spec is not None:
            self.begin(spec)

    # What subclasses override

    @classmethod
    def of(cls, config: Config, spec: ModelSpec, **kwargs: Any) -> Self:
        """Return the strategy with the settings of a run; ``kwargs`` are those of the class."""
        own = {name: attrgetter(setting)(config) for name, setting in cls.arguments.items()}
        return cls(
            spec=spec,
            seed=config.seed,
            onboarding=config.onboarding,
            momentum=config.server.momentum,
            **(own | kwargs),
        )

    def begin(self, spec: ModelSpec) -> None:
        """Initialize what depends on the clients' model.

        The constructor calls it last, or `start` if the constructor gets no ``spec``. Subclasses
        set what it needs before ``super().__init__``.

        Raises
        ------
        ParameterError
            If a pattern of ``generated_layers`` matches no tensor, or nothing would be generated.
        """
        self.global_model = GlobalModel(spec, self.generated_layers, self.momentum)

    def training_state(self, client: int) -> StateDict:
        """Return the state_dict from which a client starts its local training."""
        return self.average

    def training_states(self, clients: Sequence[int]) -> Iterable[StateDict]:
        """Return the `training_state` of each client of a round."""
        return map(self.training_state, clients)

    def extras(self, client: int) -> StateDict:
        """Return further tensors for a client, for training and for evaluation."""
        return {}

    def check(self, client: int, upload: Upload) -> None:
        """Refuse an upload that fits the model but cannot be right.

        Raises
        ------
        ReplyError
            If its data are another partition than before, as when a run is resumed with more
            clients.
        """
        before = self.sites.get(client, {}).get("partition")
        now = upload.site.get("partition")
        if before is not None and now is not None and not torch.equal(before, now):
            raise ReplyError(
                f"its data are partition {now[0]} of {now[1]}, and were {before[0]} of "
                f"{before[1]}; right would be as many clients as in the rounds before"
            )

    def detect_outliers(self, uploads: dict[int, Upload]) -> dict[int, str]:
        """Return the clients of a round from which others should not learn, with the reason."""
        return {}

    def counts(self, client: int) -> bool:
        """Return whether a client's upload is part of the average."""
        return client not in self.outliers

    def combine(self, uploads: Sequence[Upload]) -> StateDict:
        """Return the new average, by default that of uploads by their numbers of examples."""
        return average_of(uploads)

    def learn(self, server_round: int, uploads: dict[int, Upload]) -> None:
        """Learn from the uploads of a round, after the average has been updated."""

    def evaluation_state(self, client: int) -> StateDict:
        """Return the state_dict of a client's personalized model."""
        return self.average

    def evaluation_states(self, clients: Sequence[int]) -> Iterable[StateDict]:
        """Yield the `evaluation_state` of each client."""
        return map(self.evaluation_state, clients)

    def trace(self) -> Row:
        """Return what was learned in the round, as numbers for method.jsonl."""
        return {}

    # The rounds, as Flower calls them

    @property
    def average(self) -> StateDict:
        """The average of all clients' models."""
        return self.global_model.average

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        *args: Any,
        **kwargs: Any,
    ) -> Result:
        """Run all rounds as Flower's `FedAvg` does; a ``spec`` replaces ``initial_arrays``."""
        if not hasattr(self, "global_model"):
            initial = initial_arrays.to_torch_state_dict()
            if self.model is None:
                self.begin(ModelSpec.of_state(initial))
            else:
                self.begin(ModelSpec.of(self.model, initial))
        self._last_round = self.completed_rounds + num_rounds
        return super().start(grid, initial_arrays, num_rounds, *args, **kwargs)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample clients and send each its `training_state`."""
        self.record = RoundRecord(server_round + self.completed_rounds)
        if self.fraction_train == 0.0:
            return []
        begin = time.monotonic()
        clients = self._sample(grid, "train", self.fraction_train, self.min_train_nodes)
        self.record.seconds_waiting = time.monotonic() - begin
        self._sent = dict(zip(clients, self.training_states(clients), strict=True))
        messages = self.messages(MessageType.TRAIN, clients, self._sent.values(), config)
        self.record.num_nodes = len(self.roster.connected)
        for client in clients:
            node_id = str(self.roster.node_id(client))
            self.record.note(client, node_id=node_id, status=NO_REPLY)
        self._sent_at = time.monotonic()
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the uploads, average them by their numbers of examples and learn from them."""
        self.record.seconds_clients = time.monotonic() - self._sent_at
        uploads = self._read_uploads(replies)
        log(
            INFO,
            "aggregate_train: Received %s results and %s failures",
            len(uploads),
            self.record.num_failures,
        )
        if not uploads:
            log(WARNING, "aggregate_train: No client trained; all parameters stay as they are")
            return None, None
        self.sites |= {client: upload.site for client, upload in uploads.items() if upload.site}
        self.outliers = self.detect_outliers(uploads)
        for client, reason in self.outliers.items():
            called = self.roster.called(client)
            log(INFO, "Others do not learn from %s in this round: %s", called, reason)
            self.record.note(client, unusual=reason)
        if counting := [upload for client, upload in uploads.items() if self.counts(client)]:
            self.global_model.move_to(self.combine(counting))
        begin = time.monotonic()
        self.learn(self.record.server_round, uploads)
        self.record.seconds_diffusion = time.monotonic() - begin
        shared = _shared([upload.metrics for upload in uploads.values()])
        return ArrayRecord(self.average), self.train_metrics_aggr_fn(shared, self.weighted_by_key)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample clients and send each its personalized model."""
        completed = self.record.server_round
        is_due = self.evaluate_every and completed % self.evaluate_every == 0
        if self.fraction_evaluate == 0.0 or not (is_due or completed == self._last_round):
            return []
        clients = self._sample(grid, "evaluate", self.fraction_evaluate, self.min_evaluate_nodes)
        states = self.evaluation_states(clients)
        return self.messages(MessageType.EVALUATE, clients, states, config)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Average the metrics of the valid replies by their numbers of examples."""
        metrics: dict[int, dict[str, float]] = {}
        for client, reply in self.by_client(replies):
            try:
                metrics[client] = self.read_metrics(reply)
            except ReplyError as error:
                log(WARNING, "%s is not evaluated: %s", self.subject(client), error)
                self.record.note(client, not_evaluated=str(error), **error.columns)
            else:
                self.record.evaluated(client, metrics[client])
        if not metrics:
            return None
        return self.evaluate_metrics_aggr_fn(_shared(metrics.values()), self.weighted_by_key)

    def summary(self) -> None:
        """Log the settings."""
        super().summary()
        if self.completed_rounds:
            log(INFO, "\t└──> Going on after round %d", self.completed_rounds)
        layers = ", ".join(self.generated_layers)
        log(INFO, "\t└──> Generated layers: %s, seed: %d", layers, self.seed)

    # Messages and replies

    def messages(
        self, kind: str, clients: Sequence[int], states: Iterable[StateDict], config: ConfigRecord
    ) -> list[Message]:
        """Make a message for each client with its state and `extras`, for `by_client` to match."""
        spec, layout = self.global_model.spec, self.global_model.layout
        config = ConfigRecord({**config, protocol.SERVER_ROUND: self.record.server_round})
        if not spec.sends_fixed:
            config[protocol.FINGERPRINT] = spec.fingerprint
        # One record for each object, kept with it: only ids of living objects are unique.
        made: dict[int, tuple[StateDict, ArrayRecord]] = {}
        messages = []
        for client, state in zip(clients, states, strict=True):
            if id(state) not in made:
                made[id(state)] = (state, ArrayRecord(layout.to_send(state)))
            arrays = made[id(state)][1]
            content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
            if extras := self.extras(client):
                content[protocol.EXTRAS] = ArrayRecord(extras)
            node_id = self.roster.node_id(client)
            messages.append(Message(content, dst_node_id=node_id, message_type=kind))
        self.record.bytes_down += sum(map(_num_bytes, messages))
        # Flower writes the ids of the messages into their metadata when it sends them.
        self._addressees = [message.metadata for message in messages]
        return messages

    def by_client(self, replies: Iterable[Message]) -> list[tuple[int, Message]]:
        """Sort the replies to the last `messages` by client, whatever the order of arrival."""
        found = by_addressee(self._addressees, replies)
        return sorted((self.roster.client(node_id), reply) for node_id, reply in found.items())

    def read_metrics(self, reply: Message) -> dict[str, float]:
        """Return the metrics of a reply without arrays; a `ReplyError` if they are invalid."""
        metrics = read_metrics(reply, self.weighted_by_key)
        check_ranges(metrics, self.metric_ranges)
        return metrics

    def subject(self, client: int) -> str:
        """Return a client's number and name to begin a sentence with."""
        return f"C{self.roster.called(client)[1:]}"

    def _sample(self, grid: Grid, purpose: str, fraction: float, minimum: int) -> list[int]:
        """Draw clients, the same for a seed and a round whatever their node ids, and sort them."""
        at_least = max(self.min_available_nodes, minimum)
        self.roster.assemble(grid, at_least, self.join_timeout, self.required)
        self.record.names = self.roster.client_names()
        clients = sorted(map(self.roster.client, self.roster.connected))
        late = self.onboarding.late_clients
        if late and self.record.server_round < self.onboarding.join_round:
            clients = clients[:-late]
            if not clients:
                raise ValueError(
                    f"onboarding.late-clients = {late}: there are only "
                    f"{count_of(len(self.roster.connected), 'client')}; right would be less "
                    "than that"
                )
        if purpose == "train" and (self.include or self.exclude):
            clients = self._included(clients)
        size = min(len(clients), max(minimum, round(fraction * len(clients))))
        log(INFO, "configure_%s: Sampled %s nodes (out of %s)", purpose, size, len(clients))
        generator = make_generator(self.sampling_seed, "sample", purpose, self.record.server_round)
        drawn = torch.randperm(len(clients), generator=generator)[:size].tolist()
        return sorted(clients[position] for position in drawn)

    def _included(self, clients: list[int]) -> list[int]:
        """Return the clients that may train by ``include`` and ``exclude``."""
        matches = self.roster.matches
        chosen = [
            client
            for client in clients
            if (not self.include or matches(client, self.include))
            and not matches(client, self.exclude, by_shared_name=True)
        ]
        if self.record.server_round > self.completed_rounds + 1:
            return chosen
        here = ", ".join(map(self.roster.called, clients[:_MAX_SHOWN]))
        here += ", ..." * (len(clients) > _MAX_SHOWN)
        for setting in ("include", "exclude"):
            for pattern in self.roster.unmatched(getattr(self, setting)):
                log(
                    WARNING,
                    "server.%s: no client that is connected is called %s; here are %s",
                    setting,
                    quoted(pattern),
                    here,
                )
        if clients and not chosen:
            raise ValueError(
                "server.include and server.exclude let no connected client train; right would be "
                "the number or name of at least one"
            )
        return chosen

    def _read_uploads(self, replies: Iterable[Message]) -> dict[int, Upload]:
        """Return the valid uploads, and record why there are no others."""
        uploads: dict[int, Upload] = {}
        sizes: dict[int, int] = {}
        for client, reply in self.by_client(replies):
            try:
                upload = self._read_upload(client, reply)
            except ReplyError as error:
                self._refuse(client, str(error))
                self.record.note(client, **error.columns)
            else:
                if upload is not None:
                    uploads[client], sizes[client] = upload, _num_bytes(reply)
        names = [entry.name for entry in self.extras_layout.entries] if self.extras_layout else []
        for client, reason in outliers(uploads, self.average, names).items():
            self._refuse(client, reason)
            del uploads[client]
        for client, upload in uploads.items():
            self.record.trained(client, upload.metrics, sizes[client])
        return uploads

    def _read_upload(self, client: int, reply: Message) -> Upload | None:
        """Return a client's valid upload; None if it did not train for privacy's sake."""
        if (demand := read_demand(reply)) is not None:
            log(INFO, "%s does not train: %s: %s", self.subject(client), BELOW_FLOOR, demand)
            self.record.note(client, status=f"{BELOW_FLOOR}: {demand}")
            return None
        flags: set[str] = set()
        if reply.has_content() and not reply.content.array_records:
            flags = {name for each in reply.content.metric_records.values() for name in each}
        if protocol.BUDGET_SPENT in flags:
            epsilon = self.read_metrics(reply).get(protocol.EPSILON, 0.0)
            log(INFO, "%s does not train: its privacy budget is spent", self.subject(client))
            self.record.note(client, status=BUDGET_SPENT, epsilon=epsilon)
            return None
        upload = read_upload(
            reply,
            self.global_model.layout,
            self._sent[client],
            self.weighted_by_key,
            self.optional_extras.get(client, self.extras_layout),
            may_lack_extras=client in self.optional_extras,
        )
        check_ranges(upload.metrics, self.metric_ranges)
        self.check(client, upload)
        return replace(upload, state=self.global_model.spec.refreshed(upload.state))

    def _refuse(self, client: int, reason: str) -> None:
        log(
            WARNING,
            "%s (node %d) is out of the round: %s",
            self.subject(client),
            self.roster.node_id(client),
            reason,
        )
        self.record.note(client, status=reason)


def _num_bytes(message: Message) -> int:
    """Return how many bytes the arrays of a message have."""
    return sum(record.count_bytes() for record in message.content.array_records.values())


def _shared(metrics: Iterable[dict[str, float]]) -> list[RecordDict]:
    """Return the metrics that all replies have, as Flower's functions take them."""
    every = list(metrics)
    shared = sorted(set.intersection(*map(set, every)))
    return [
        RecordDict({protocol.METRICS: MetricRecord({name: each[name] for name in shared})})
        for each in every
    ]
