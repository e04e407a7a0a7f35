"""The handlers of training and evaluation messages."""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from logging import ERROR, INFO, WARNING
from typing import cast

import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    MetricRecordValues,
    RecordDict,
)
from flwr.common import log
from torch import nn

from client_app.floor import PRIVACY_FLOOR, Floor
from client_app.kept_model import MODEL_PATH, check_model_path, keep_model, place_of_model
from client_app.methods import METHODS, Method, Task, Trained
from client_app.node import (
    PRIVACY,
    NodeError,
    client_number,
    consents_to_cross_site,
    node_partition,
)
from pfedgpa_app import protocol
from pfedgpa_app.config import SITES, Config, ConfigError, home_path
from pfedgpa_app.data import ClientData, DataError, client_data, site_data
from pfedgpa_app.evaluation import Evaluation, class_prior, scores_of
from pfedgpa_app.files import count_of, printable, printable_lines
from pfedgpa_app.model_spec import fingerprint
from pfedgpa_app.models import build_model
from pfedgpa_app.parameters import StateDict, copy_of
from pfedgpa_app.privacy import (
    Ledger,
    cost_of_round,
    require_opacus,
    secure_uniform,
    seeded_uniform,
)
from pfedgpa_app.randomness import make_generator, resolve_device

MEMORY = "memory"
"""The record of the client's Flower state with the memory of its method."""

# Of the classes of a site's data, a line of its log has so many.
_MAX_CLASSES = 20


def train_message(message: Message, context: Context) -> Message:
    """Train the received model, and evaluate it on the client's test set before and after.

    A client whose privacy budget is spent, or that demands more privacy than the run has, replies
    without parameters.
    """
    begin = time.monotonic()
    task, method = prepare(message, context)
    server_round = round_of(message)
    keep_model(method, task, context, server_round - 1)
    num_examples, privacy = len(task.data.train_labels), task.config.privacy
    floor = Floor.of(context)
    if lacks := floor.shortfall(privacy, task.config.client, task.ledger, num_examples):
        text = "This site does not train in round %d: the run's privacy is less than its %s (%s)"
        log(WARNING, text, server_round, PRIVACY_FLOOR, lacks)
        refusal = ConfigRecord({protocol.BELOW_FLOOR: floor.demand})
        return Message(RecordDict({protocol.CONFIG: refusal}), reply_to=message)
    if not task.may_train():
        spent = task.ledger.epsilon(privacy.delta)
        metrics: dict[str, MetricRecordValues] = {protocol.NUM_EXAMPLES: num_examples}
        metrics |= {protocol.EPSILON: spent, protocol.BUDGET_SPENT: 1}
        return _metrics_reply(message, metrics)
    before = task.evaluate(method.personal_model(task))
    reply = training_reply(message, context, task, method, before, method.train(task))
    reply.content.metric_records[protocol.METRICS][protocol.SECONDS] = time.monotonic() - begin
    return reply


def _metrics_reply(message: Message, metrics: dict[str, MetricRecordValues]) -> Message:
    return Message(RecordDict({protocol.METRICS: MetricRecord(metrics)}), reply_to=message)


def training_reply(
    message: Message,
    context: Context,
    task: Task,
    method: Method,
    before: Evaluation,
    trained: Trained,
) -> Message:
    """Return the reply of a client that has trained, and store its state for the next message.

    ``before`` is the evaluation before training. The caller adds the training time.
    """
    data, privacy = task.data, task.config.privacy
    state = task.keep_private(trained.state)
    after = task.evaluate(method.personal_model(task))
    _report(message, context, task, before, after)
    if task.memory:
        context.state[MEMORY] = ArrayRecord(copy_of(task.memory))
    metrics: dict[str, MetricRecordValues] = {protocol.NUM_EXAMPLES: len(data.train_labels)}
    floor = Floor.of(context)
    if floor.sends_metrics:
        metrics |= {
            protocol.ACCURACY_BEFORE: before.accuracy,
            protocol.LOSS_BEFORE: before.loss,
            protocol.ACCURACY_AFTER: after.accuracy,
            protocol.LOSS_AFTER: after.loss,
        }
    has_own_data = "data-path" in context.node_config
    # Statistics of a table's features reveal more than those of an image's channels.
    withholds = has_own_data and (privacy.is_on or len(data.info.shape) == 1)
    if floor.sends_normalization and not withholds:
        # Needed to use the model elsewhere, and only known to the client.
        metrics[protocol.IMAGE_MEAN] = data.stats.mean.tolist()
        metrics[protocol.IMAGE_STD] = data.stats.std.tolist()
    if not has_own_data:
        metrics[protocol.PARTITION] = list(node_partition(context) or ())
    if privacy.is_on:
        context.state[PRIVACY] = MetricRecord({**task.ledger.columns()})
        metrics[protocol.EPSILON] = task.ledger.epsilon(privacy.delta)
    reply = _metrics_reply(message, metrics)
    # Frozen weights that were not received are not sent back.
    received = message.content.array_records[protocol.ARRAYS]
    sent = {name: tensor for name, tensor in state.items() if name in received}
    reply.content[protocol.ARRAYS] = ArrayRecord(sent)
    if trained.extras:
        reply.content[protocol.EXTRAS] = ArrayRecord(copy_of(trained.extras))
    return reply


def _report(
    message: Message, context: Context, task: Task, before: Evaluation, after: Evaluation
) -> None:
    """Log a training for a site's operator; simulated clients would fill the log."""
    if not {"data-path", MODEL_PATH} & context.node_config.keys():
        return
    data, names = task.data, task.config.data.classes
    counts = torch.bincount(data.train_labels, minlength=len(names)).tolist()
    of_classes = [f"{name} {count}" for name, count in zip(names, counts, strict=True) if count]
    shown = ", ".join(of_classes[:_MAX_CLASSES]) + ", ..." * (len(of_classes) > _MAX_CLASSES)
    place = place_of_model(context)
    log(
        INFO,
        "Round %d: trained on %s (%s); accuracy on %s %.4f before and %.4f after%s",
        *(round_of(message), count_of(len(data.train_labels), "example"), printable(shown)),
        count_of(len(data.test_labels), "own test example"),
        *(before.accuracy, after.accuracy, f"; {printable(place)}" if place else ""),
    )


def evaluate_message(message: Message, context: Context) -> Message:
    """Evaluate the client's personalized model on its test set.

    For the cross-site matrix the received model is evaluated as it is, and not kept; raises
    `NodeError` if the node does not consent.
    """
    is_own = protocol.CROSS_SITE not in message.content.config_records[protocol.CONFIG]
    if not is_own and not consents_to_cross_site(context):
        raise NodeError("the node config does not consent; right would be cross-site=true")
    task, method = prepare(message, context)
    if is_own:
        keep_model(method, task, context, round_of(message))
    model = method.personal_model(task) if is_own else task.model
    labels, logits = task.data.test_labels, task.test_logits(model)
    metrics: dict[str, MetricRecordValues] = {protocol.NUM_EXAMPLES: len(labels)}
    floor = Floor.of(context)
    if floor.sends_metrics:
        result = Evaluation.of(logits, labels)
        metrics |= {protocol.ACCURACY: result.accuracy, protocol.LOSS: result.loss}
        # Those of classes say which a site has, which private uploads hide.
        withholds = task.config.privacy.is_on or bool(floor.mode)
        for name, score in scores_of(logits, labels).items() if is_own else ():
            if not (withholds and name.startswith(protocol.RECALL)):
                metrics[name] = score
    return _metrics_reply(message, metrics)


def prepare(message: Message, context: Context) -> tuple[Task, Method]:
    """Return the task of a message, with data and model, and the client's method.

    Raises `ConfigError`, `DataError` or `NodeError` if settings, data or node config are wrong,
    which is logged for the node's operator.
    """
    check_model_path(context)
    try:
        config = Config.from_flat(context.run_config)
        require_opacus(config.privacy)
        client = client_number(context)
        Floor.of(context)
        data = load_data(config, context)
    except (ConfigError, DataError, NodeError) as error:
        log(ERROR, "This node cannot take part: %s", printable_lines(str(error)))
        raise
    if config.client.torch_threads:
        torch.set_num_threads(config.client.torch_threads)
    device = resolve_device(config.client.device)
    build = partial(build_model, config.model.name, config.data.info, config.seed)
    model = build()
    records = message.content.array_records
    received = _completed(records[protocol.ARRAYS].to_torch_state_dict(), model, message)
    # Cloned, since a model may keep the tensors that it is given.
    model.load_state_dict({name: tensor.clone() for name, tensor in received.items()})
    extras = records[protocol.EXTRAS].to_torch_state_dict() if protocol.EXTRAS in records else {}
    kept = context.state.array_records.get(MEMORY)
    server_round = round_of(message)
    noise = make_generator(config.seed, "noise", client, server_round)
    prior = class_prior(data.train_labels, data.info.num_classes)
    task = Task(
        model=model.to(device),
        received=_to(device, received),
        extras=_to(device, extras),
        data=data.to(device),
        config=config,
        offset=(prior if config.client.class_prior else torch.zeros_like(prior)).to(device),
        memory=_to(device, kept.to_torch_state_dict() if kept else {}),
        generator=make_generator(config.seed, "local", client, server_round),
        build=build,
        ledger=_kept_ledger(context, config, len(data.train_labels), server_round),
        uniform=seeded_uniform(noise) if config.privacy.seeded_noise else secure_uniform,
    )
    return task, METHODS[config.strategy]()


def _completed(received: StateDict, model: nn.Module, message: Message) -> StateDict:
    """Return the received parameters, completed by the model's own frozen weights.

    Raises `NodeError` if these differ from the server's.
    """
    expected = message.content.config_records[protocol.CONFIG].get(protocol.FINGERPRINT)
    if expected is None:
        return received
    state = copy_of(model.state_dict())
    own = {name: tensor for name, tensor in state.items() if name not in received}
    if fingerprint(own) != expected:
        raise NodeError(
            "the frozen weights that model.name makes here are not those of the server; right "
            "would be the same file of weights everywhere, or model.send-frozen = true"
        )
    return received | own


def round_of(message: Message) -> int:
    """Return the server round of a message."""
    return cast(int, message.content.config_records[protocol.CONFIG][protocol.SERVER_ROUND])


def _kept_ledger(context: Context, config: Config, num_examples: int, server_round: int) -> Ledger:
    """Return a client's privacy ledger before a round.

    A client's Flower state is lost when its SuperNode restarts. A client without a ledger may have
    trained in every earlier round, so all of them are counted.
    """
    kept = context.state.metric_records.get(PRIVACY)
    if kept is not None:
        return Ledger.of(cast(Mapping[str, Sequence[float]], kept))
    if server_round == 1 or not config.privacy.is_on:
        return Ledger()
    noise, sample_rate, steps = cost_of_round(config.privacy, config.client, num_examples)
    return Ledger().after(noise, sample_rate, (server_round - 1) * steps)


def _to(device: torch.device, tensors: StateDict) -> StateDict:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def load_data(config: Config, context: Context) -> ClientData:
    """Return the node's own data (``data-path``), or its partition of the data set.

    Raises `DataError` if there is none, or it does not match the settings.
    """
    path = context.node_config.get("data-path")
    if path is not None:
        if config.data.dataset != SITES:
            raise DataError(
                f'data.dataset = "{config.data.dataset}": this node has its own data (data-path), '
                f'which the run would not use; right would be data.dataset = "{SITES}"'
            )
        folder = home_path(str(path))
        return site_data(
            folder, config.data, config.seed, lambda note: log(WARNING, "%s", printable(note))
        )
    partition = node_partition(context)
    assert partition is not None  # only a node with a data-path may have none
    return client_data(config.data, config.seed, *partition)
