"""FedAvg that sends every client its own message and survives what a client may send."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from logging import INFO, WARNING
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

from pfedgpa_app.config import Config
from pfedgpa_app.files import quoted
from pfedgpa_app.model_spec import ModelSpec
from pfedgpa_app.parameters import ParameterLayout, StateDict
from pfedgpa_app.protocol import (
    ACCURACY,
    CONFIG,
    CROSS_SITE,
    EPSILON,
    EXTRAS,
    FINGERPRINT,
    SERVER_ROUND,
)
from pfedgpa_app.randomness import make_generator
from pfedgpa_app.rounds import BELOW_FLOOR, RoundRecord, Row
from pfedgpa_app.stateful import Kept, Stateful
from pfedgpa_app.vault import MemoryVault, Vault
from server_app.global_model import GlobalModel, average_of
from server_app.messages import draw, num_bytes, shared_metrics
from server_app.outliers import outliers
from server_app.replies import (
    NotFiniteError,
    ReplyError,
    Upload,
    check_ranges,
    read_demand,
    read_metrics,
    read_spent,
    read_upload,
)
from server_app.roster import Roster, by_addressee

# Of the clients that are connected, a message names so many.
_MAX_SHOWN = 20


def _consents(answer: Message) -> bool:
    """Tell whether a node says that it takes part in the cross-site matrix."""
    return answer.has_content() and any(
        record.get(CROSS_SITE) == 1 for record in answer.content.metric_records.values()
    )


class ClientwiseFedAvg(Stateful, FedAvg):
    """Federated Averaging in which a client may be sent parameters of its own.

    Implementation based on https://arxiv.org/abs/1602.05629. As it stands it gives everyone the
    average. A reply that is an error, does not fit the model, is not finite or never comes costs
    its sender the round and nobody else. Who takes part is drawn from
    ``sampling_seed`` and the round.

    Subclasses override these methods, which know clients by number and nothing of messages. `of`
    takes their settings from those of a run and `begin` makes what depends on the clients' model.
    In a round come `training_state` and `extras` of each client that trains, `check` of each
    upload, `detect_outliers`, `counts`, `combine` and `learn`, then `evaluation_state` and `extras`
    of each client that evaluates, and `trace`. What is marked `Kept` goes into checkpoints.

    Parameters
    ----------
    generated_layers : Sequence[str] (default: ("*",))
        Patterns of the names of the parameters that `learn` gets as a vector.
    seed : int (default: 0)
        Fixes all that the strategy draws at random.
    roster : Roster, optional
        Numbers the clients. By default in the order of their node ids.
    late_clients, join_round : int (default: 0)
        Keep the clients with the highest numbers out of the rounds before ``join_round``.
    momentum : float (default: 0.0)
        Part of its last step by which the average goes on (FedAvgM, https://arxiv.org/abs/1909.06335).
    join_timeout : float (default: inf)
        Seconds to wait for ``min_available_nodes``.
    include, exclude : Sequence[str] (default: ())
        Names, numbers or patterns of the clients that train, all by default, and of those that do
        not. Who is left out is evaluated all the same.
    required : Sequence[str] (default: ())
        Names, numbers or patterns, for each of which a round waits until such a client is there.
    evaluate_every : int (default: 1)
        Rounds from one in which models are evaluated to the next. The last round is always one; 0:
        it alone. Who trains judges what it is sent in every round.
    model : torch.nn.Module, optional
        The clients' model, if `start` shall know what of it trains. Without it everything of
        floating point does, but the statistics of normalization layers.
    spec : ModelSpec, optional
        What there is to know of it, with the initial parameters, if that is known before `start`.
    vault : Vault, optional
        Where what is seldom needed is kept. By default in memory.
    metric_ranges : dict[str, tuple[float, float]], optional
        The smallest and the largest value of a client's metric, by name. None by default: other
        clients than those of this app may mean something else by a name.
    **kwargs : Any
        The arguments of Flower's `FedAvg`.

    Attributes
    ----------
    clients_keep_parts : bool
        Whether a personalized model is known to its client alone, so that the server can neither
        write it down nor go on with another run's clients.
    global_model : GlobalModel
        The average of all, from ``spec`` or from the arrays that `start` is given.
    extras_layout : ParameterLayout | None
        What clients must upload beside the parameters, as `extras` is what they are sent.
    optional_extras : dict[int, ParameterLayout]
        What some clients may upload beside the parameters in this round, by client.
    sites : dict[int, StateDict]
        What each client last told of its data, by client, as `Upload.site` has it.
    outliers : dict[int, str]
        From which clients of the current round the others do not learn, and why.
    record : RoundRecord
        What happened in the current round, client by client.
    sampling_seed : int
        Who takes part is drawn from it: the seed, but a secret on a network, where clients that
        know when they are most of a round could wait for it.
    completed_rounds : int
        Rounds of an earlier run that this one goes on from; Flower counts its rounds from 1 again.
    """

    clients_keep_parts: ClassVar[bool] = False
    global_model: Kept[GlobalModel]
    sites: Kept[dict[int, StateDict]]

    def __init__(
        self,
        *,
        generated_layers: Sequence[str] = ("*",),
        seed: int = 0,
        roster: Roster | None = None,
        late_clients: int = 0,
        join_round: int = 0,
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
        self.seed = seed
        self.roster = roster or Roster()
        self.late_clients = late_clients
        self.join_round = join_round
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
        self.sampling_seed = seed
        self.completed_rounds = 0
        self.record = RoundRecord(0)
        self._last_round = 0
        self._sent: dict[int, StateDict] = {}
        self._addressees: list[Metadata] = []
        self._sent_at = 0.0
        self._has_begun = False
        if spec is not None:
            self.begin(spec)

    # What subclasses override

    @classmethod
    def of(cls, config: Config, spec: ModelSpec, **kwargs: Any) -> Self:
        """Return the strategy with the settings of a run; ``kwargs`` are those of the class."""
        late = config.onboarding
        return cls(
            spec=spec,
            seed=config.seed,
            late_clients=late.late_clients,
            join_round=late.join_round,
            momentum=config.server.momentum,
            **kwargs,
        )

    def begin(self, spec: ModelSpec) -> None:
        """Make all that depends on the clients' model, whose tensors are in the vectors' order.

        The constructor calls it last, so subclasses have what it needs before they call
        ``super().__init__``; without a ``spec`` it is `start` that calls it.

        Raises
        ------
        ParameterError
            If a pattern takes no tensor of it, or nothing would be generated.
        """
        self.global_model = GlobalModel(spec, self.generated_layers, self.momentum)
        self._has_begun = True

    def training_state(self, client: int) -> StateDict:
        """Return the state_dict that a client starts its local training from."""
        return self.average

    def training_states(self, clients: Sequence[int]) -> Iterable[StateDict]:
        """Return the `training_state` of each client of a round, of many at once if cheaper."""
        return map(self.training_state, clients)

    def extras(self, client: int) -> StateDict:
        """Return what a client is sent beside its parameters, for training and for evaluation."""
        return {}

    def check(self, client: int, upload: Upload) -> None:
        """Refuse an upload that fits the model and cannot be used all the same.

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
        """Return from which clients of a round the others should not learn, and why."""
        return {}

    def counts(self, client: int) -> bool:
        """Tell whether a client's upload has its part in the average."""
        return client not in self.outliers

    def combine(self, uploads: Sequence[Upload]) -> StateDict:
        """Return what the average becomes, by default that of uploads by their examples."""
        return average_of(uploads)

    def learn(self, server_round: int, uploads: dict[int, Upload]) -> None:
        """Take in the uploads of a round by client; the average is up to date already."""

    def evaluation_state(self, client: int) -> StateDict:
        """Return the state_dict of a client's personalized model."""
        return self.average

    def evaluation_states(self, clients: Sequence[int]) -> Iterable[StateDict]:
        """Return the `evaluation_state` of each client, one by one as they are asked for."""
        return map(self.evaluation_state, clients)

    def trace(self) -> Row:
        """Return what was learned in the round, as numbers for method.jsonl; by default nothing."""
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
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run all rounds, as Flower's `FedAvg` does, from what `begin` made if there was a spec."""
        if not self._has_begun:
            initial = initial_arrays.to_torch_state_dict()
            if self.model is None:
                self.begin(ModelSpec.of_state(initial))
            else:
                self.begin(ModelSpec.of(self.model, initial))
        self._last_round = self.completed_rounds + num_rounds
        return super().start(
            grid,
            initial_arrays,
            num_rounds,
            timeout,
            train_config,
            evaluate_config,
            evaluate_fn,
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample clients and send each what it starts from."""
        server_round += self.completed_rounds
        self.record = RoundRecord(server_round)
        if self.fraction_train == 0.0:
            return []
        begin = time.monotonic()
        clients = self._sample(
            grid, "train", server_round, self.fraction_train, self.min_train_nodes
        )
        self.record.seconds_waiting = time.monotonic() - begin
        self._sent = dict(zip(clients, self.training_states(clients), strict=True))
        messages = self._messages(MessageType.TRAIN, clients, self._sent.values(), config)
        self.record.num_nodes = len(self.roster.connected)
        self.record.default_model(clients, map(self.roster.node_id, clients))
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
            self.record.mark_outlier(client, reason)
        if counting := [upload for client, upload in uploads.items() if self.counts(client)]:
            self.global_model.move_to(self.combine(counting))
        begin = time.monotonic()
        self.learn(self.record.server_round, uploads)
        self.record.seconds_diffusion = time.monotonic() - begin
        records = shared_metrics([upload.metrics for upload in uploads.values()])
        return ArrayRecord(self.average), self.train_metrics_aggr_fn(records, self.weighted_by_key)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample clients and send each its personalized model."""
        completed = self.record.server_round
        is_due = self.evaluate_every and completed % self.evaluate_every == 0
        if self.fraction_evaluate == 0.0 or not (is_due or completed == self._last_round):
            return []
        clients = self._sample(
            grid,
            "evaluate",
            self.record.server_round,
            self.fraction_evaluate,
            self.min_evaluate_nodes,
        )
        states = self.evaluation_states(clients)
        return self._messages(MessageType.EVALUATE, clients, states, config)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Average the metrics of the replies that can be used, by their numbers of examples."""
        metrics: dict[int, dict[str, float]] = {}
        for client, reply in self._by_client(replies):
            try:
                read = read_metrics(reply, self.weighted_by_key)
                check_ranges(read, self.metric_ranges)
            except ReplyError as error:
                log(WARNING, "%s is not evaluated: %s", self._called(client), error)
                self.record.not_evaluated(client, str(error))
                if isinstance(error, NotFiniteError):
                    self.record.not_finite(client)
                continue
            metrics[client] = read
            self.record.evaluated(client, read)
        if not metrics:
            return None
        records = shared_metrics(list(metrics.values()))
        return self.evaluate_metrics_aggr_fn(records, self.weighted_by_key)

    def evaluate_across(self, grid: Grid, timeout: float) -> list[Row]:
        """Evaluate the personalized model of each client that consents at all of these.

        ``timeout`` is for each model, in seconds. What cannot be used is logged and left out.

        Returns
        -------
        list[Row]
            For each pair the numbers of both clients, ``model`` and ``site``, with ``accuracy``
            and ``num-test-examples``.
        """
        # A run that goes on for no more rounds has not seen who is there.
        self.roster.assemble(grid, self.min_available_nodes, self.join_timeout)
        asked = ConfigRecord({CROSS_SITE: True})
        questions = [
            Message(RecordDict({CONFIG: asked}), dst_node_id=node, message_type=MessageType.QUERY)
            for node in sorted(self.roster.connected)
        ]
        answers = list(grid.send_and_receive(questions, timeout=timeout))
        replies = by_addressee([question.metadata for question in questions], answers)
        clients = sorted(self.roster.client(node) for node in replies if _consents(replies[node]))
        rows = []
        for model, state in zip(clients, self.evaluation_states(clients), strict=True):
            states = [state] * len(clients)
            messages = self._messages(MessageType.EVALUATE, clients, states, asked)
            for site, reply in self._by_client(grid.send_and_receive(messages, timeout=timeout)):
                try:
                    metrics = read_metrics(reply, self.weighted_by_key)
                    check_ranges(metrics, self.metric_ranges)
                    if (accuracy := metrics.get(ACCURACY)) is None:
                        raise ReplyError("it reports no metrics")
                except ReplyError as error:
                    called = self.roster.called(model)
                    log(WARNING, "%s did not evaluate %s: %s", self._called(site), called, error)
                    continue
                num_examples = int(metrics[self.weighted_by_key])
                rows.append(
                    {
                        "model": model,
                        "site": site,
                        "accuracy": accuracy,
                        "num-test-examples": num_examples,
                    }
                )
        return rows

    def summary(self) -> None:
        """Log the settings."""
        super().summary()
        if self.completed_rounds:
            log(INFO, "\t└──> Going on after round %d", self.completed_rounds)
        log(
            INFO,
            "\t└──> Generated layers: %s, seed: %d",
            ", ".join(self.generated_layers),
            self.seed,
        )

    def _sample(
        self, grid: Grid, purpose: str, server_round: int, fraction: float, minimum: int
    ) -> list[int]:
        """Draw clients, the same for a seed and a round whatever their node ids, and sort them."""
        at_least = max(self.min_available_nodes, minimum)
        self.roster.assemble(grid, at_least, self.join_timeout, self.required)
        self.record.names = self.roster.client_names()
        clients = sorted(map(self.roster.client, self.roster.connected))
        if self.late_clients and server_round < self.join_round:
            clients = clients[: -self.late_clients]
            if not clients:
                raise ValueError(
                    f"onboarding.late-clients = {self.late_clients}: there are only "
                    f"{len(self.roster.connected)} clients; right would be less than that"
                )
        if purpose == "train":
            clients = self._chosen(clients)
        size = min(len(clients), max(minimum, round(fraction * len(clients))))
        log(INFO, "configure_%s: Sampled %s nodes (out of %s)", purpose, size, len(clients))
        return draw(
            clients, size, make_generator(self.sampling_seed, "sample", purpose, server_round)
        )

    def _chosen(self, clients: list[int]) -> list[int]:
        """Return which of the clients ``include`` and ``exclude`` let train.

        Raises
        ------
        ValueError
            If there is none in the first round.
        """
        if not self.include and not self.exclude:
            return clients
        is_first = self.record.server_round == self.completed_rounds + 1
        for setting in ("include", "exclude"):
            for pattern in self.roster.unmatched(getattr(self, setting)) if is_first else ():
                here = ", ".join(map(self.roster.called, clients[:_MAX_SHOWN]))
                log(
                    WARNING,
                    "server.%s: no client that is connected is called %s; here are %s",
                    setting,
                    quoted(pattern),
                    here + ", ..." * (len(clients) > _MAX_SHOWN),
                )
        chosen = [
            client
            for client in clients
            if (not self.include or self.roster.matches(client, self.include))
            and not self.roster.matches(client, self.exclude, by_shared_name=True)
        ]
        if not chosen and clients and is_first:
            raise ValueError(
                "server.include and server.exclude let no connected client train; right would be "
                "the number or name of at least one"
            )
        return chosen

    def _messages(
        self, kind: str, clients: Sequence[int], states: Iterable[StateDict], config: ConfigRecord
    ) -> list[Message]:
        """Make a message a client, each with its state, and take note of whom each is for."""
        spec, layout = self.global_model.spec, self.global_model.layout
        config = ConfigRecord({**config, SERVER_ROUND: self.record.server_round})
        if not spec.sends_fixed:
            config[FINGERPRINT] = spec.fingerprint
        made: dict[int, tuple[StateDict, ArrayRecord]] = {}
        messages = []
        for client, state in zip(clients, states, strict=True):
            if id(state) not in made:  # the same state is one record for all
                # The state is kept with its record: ids are unique among living objects only.
                made[id(state)] = (state, ArrayRecord(layout.to_send(state)))
            content = RecordDict(
                {self.arrayrecord_key: made[id(state)][1], self.configrecord_key: config}
            )
            if extras := self.extras(client):
                content[EXTRAS] = ArrayRecord(extras)
            node_id = self.roster.node_id(client)
            messages.append(Message(content, dst_node_id=node_id, message_type=kind))
        self.record.bytes_down += sum(map(num_bytes, messages))
        # Flower writes the ids of the messages into their metadata when it sends them.
        self._addressees = [message.metadata for message in messages]
        return messages

    def _by_client(self, replies: Iterable[Message]) -> list[tuple[int, Message]]:
        """Sort replies by client, so that nothing depends on the order of their arrival."""
        found = by_addressee(self._addressees, replies)
        return sorted((self.roster.client(node_id), reply) for node_id, reply in found.items())

    def _read_uploads(self, replies: Iterable[Message]) -> dict[int, Upload]:
        """Return the uploads that can be used, and note why others can't."""
        uploads: dict[int, Upload] = {}
        sizes: dict[int, int] = {}
        for client, reply in self._by_client(replies):
            if (demand := read_demand(reply)) is not None:
                called = self._called(client)
                log(INFO, "%s does not train: %s: %s", called, BELOW_FLOOR, demand)
                self.record.below_floor(client, demand)
                continue
            try:
                epsilon = read_spent(reply, self.weighted_by_key)
                if epsilon is not None:
                    check_ranges({EPSILON: epsilon}, self.metric_ranges)
                    called = self._called(client)
                    log(INFO, "%s does not train: its privacy budget is spent", called)
                    self.record.spent(client, epsilon)
                    continue
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
            except ReplyError as error:
                self._refuse(client, str(error))
                if isinstance(error, NotFiniteError):
                    self.record.not_finite(client)
                continue
            state = self.global_model.spec.refreshed(upload.state)
            uploads[client], sizes[client] = replace(upload, state=state), num_bytes(reply)
        names = [entry.name for entry in self.extras_layout.entries] if self.extras_layout else []
        for client, reason in outliers(uploads, self.average, names).items():
            self._refuse(client, reason)
            del uploads[client]
        for client, upload in uploads.items():
            self.record.trained(client, upload.metrics, sizes[client])
        return uploads

    def _refuse(self, client: int, reason: str) -> None:
        log(
            WARNING,
            "%s (node %d) is out of the round: %s",
            self._called(client),
            self.roster.node_id(client),
            reason,
        )
        self.record.failed(client, reason)

    def _called(self, client: int) -> str:
        """Return what a sentence about a client begins with."""
        return f"C{self.roster.called(client)[1:]}"
