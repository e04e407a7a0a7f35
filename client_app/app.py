"""The ClientApp: trains and judges what the server sends, on the data of its own site."""

import time
from logging import ERROR
from typing import NamedTuple, cast

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, MetricRecordValues, RecordDict
from flwr.clientapp import ClientApp
from flwr.common import log
from torch import nn

from client_app.training import train
from pfedgpa_app.config import ClientConfig, Config, ConfigError, below_home
from pfedgpa_app.data import ClientData, DataError, client_data, site_data
from pfedgpa_app.evaluation import evaluate
from pfedgpa_app.models import build_model
from pfedgpa_app.randomness import make_generator, resolve_device

app = ClientApp()


class Task(NamedTuple):
    """What a message asks for: the received model and this site's data, on one device."""

    model: nn.Module
    data: ClientData
    config: ClientConfig
    generator: torch.Generator


@app.query()
def query(message: Message, context: Context) -> Message:
    """Tell which partition this node has, which the server sorts the clients by."""
    partition = node_partition(context)
    told: dict[str, MetricRecordValues] = {"partition-id": partition[0]} if partition else {}
    return Message(RecordDict({"metrics": MetricRecord(told)}), reply_to=message)


@app.train()
def train_message(message: Message, context: Context) -> Message:
    """Train the received model, and judge it on the client's test set before and after."""
    begin = time.monotonic()
    model, data, config, generator = prepare(message, context)
    test = (data.test_images, data.test_labels, data.stats, config.precision)
    before = evaluate(model, *test)
    train(model, data.train_images, data.train_labels, data.stats, config, generator)
    after = evaluate(model, *test)
    metrics: dict[str, MetricRecordValues] = {
        "num-examples": len(data.train_labels),
        "accuracy-before": before.accuracy,
        "loss-before": before.loss,
        "accuracy-after": after.accuracy,
        "loss-after": after.loss,
        "seconds": time.monotonic() - begin,
        # What a model needs to be used elsewhere, and its client alone knows.
        "image-mean": data.stats.mean.tolist(),
        "image-std": data.stats.std.tolist(),
    }
    if "data-path" not in context.node_config:
        metrics["partition"] = list(node_partition(context) or ())
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    return Message(
        RecordDict({"arrays": ArrayRecord(state), "metrics": MetricRecord(metrics)}),
        reply_to=message,
    )


@app.evaluate()
def evaluate_message(message: Message, context: Context) -> Message:
    """Judge the received model on the client's test set."""
    model, data, config, _ = prepare(message, context)
    result = evaluate(model, data.test_images, data.test_labels, data.stats, config.precision)
    metrics: dict[str, MetricRecordValues] = {
        "num-examples": len(data.test_labels),
        "accuracy": result.accuracy,
        "loss": result.loss,
    }
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)


def node_partition(context: Context) -> tuple[int, int] | None:
    """Return partition-id and num-partitions of this node's configuration.

    A node that has data of its own (``data-path``) may have none.

    Raises
    ------
    DataError
        If one of them is missing or no whole number.
    """
    node_config = context.node_config
    values = [node_config.get(key) for key in ("partition-id", "num-partitions")]
    match values:
        case [int(partition_id), int(num_partitions)]:
            return partition_id, num_partitions
        case [None, None] if "data-path" in node_config:
            return None
    raise DataError(
        f"node config {node_config}: right would be a SuperNode started with, for example, "
        '--node-config "partition-id=0 num-partitions=2"'
    )


def prepare(message: Message, context: Context) -> Task:
    """Load data and model of a message, with a generator fixed by seed, client and round.

    Raises
    ------
    ConfigError, DataError
        If settings or data are wrong, which is logged for the node's operator.
    """
    try:
        config = Config.from_flat(context.run_config)
        partition = node_partition(context)
        data = load_data(config, context)
    except (ConfigError, DataError) as error:
        log(ERROR, "This node cannot take part: %s", error)
        raise
    if config.client.torch_threads:
        torch.set_num_threads(config.client.torch_threads)
    device = resolve_device(config.client.device)
    model = build_model(config.model.name, config.data.info, config.seed)
    arrays = message.content.array_records["arrays"]
    model.load_state_dict(arrays.to_torch_state_dict(), strict=True)
    server_round = cast(int, message.content.config_records["config"]["server-round"])
    # A simulation's node ids are random, those of registered SuperNodes stay.
    client = partition[0] if partition else context.node_id
    return Task(
        model.to(device),
        data.to(device),
        config.client,
        make_generator(config.seed, "local", client, server_round),
    )


def load_data(config: Config, context: Context) -> ClientData:
    """Return the data that this node's operator gave it, or its partition of the data set.

    Raises
    ------
    DataError
        If there is none, or it is not what the settings say.
    """
    path = context.node_config.get("data-path")
    if path is not None:
        return site_data(below_home(str(path)), config.data, config.seed)
    partition = node_partition(context)
    assert partition is not None  # only a node with a data-path may have none
    return client_data(config.data, config.seed, *partition)
