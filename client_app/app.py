"""The ClientApp: trains and judges what the server sends, on the data of its own site."""

import time
from typing import NamedTuple, cast

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, MetricRecordValues, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from client_app.training import train
from pfedgpa_app.config import ClientConfig, Config
from pfedgpa_app.data import ClientData, DataError, client_data
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
    partition = MetricRecord({"partition-id": node_partition(context)[0]})
    return Message(RecordDict({"metrics": partition}), reply_to=message)


@app.train()
def train_message(message: Message, context: Context) -> Message:
    """Train the received model, and judge it on the client's test set before and after."""
    begin = time.monotonic()
    model, data, config, generator = prepare(message, context)
    test = (data.test_images, data.test_labels, data.stats)
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
        "partition": list(node_partition(context)),
    }
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    return Message(
        RecordDict({"arrays": ArrayRecord(state), "metrics": MetricRecord(metrics)}),
        reply_to=message,
    )


@app.evaluate()
def evaluate_message(message: Message, context: Context) -> Message:
    """Judge the received model on the client's test set."""
    model, data, _, _ = prepare(message, context)
    result = evaluate(model, data.test_images, data.test_labels, data.stats)
    metrics: dict[str, MetricRecordValues] = {
        "num-examples": len(data.test_labels),
        "accuracy": result.accuracy,
        "loss": result.loss,
    }
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)


def node_partition(context: Context) -> tuple[int, int]:
    """Return partition-id and num-partitions of this node's configuration.

    Raises
    ------
    DataError
        If one of them is missing or no whole number.
    """
    values = [context.node_config.get(key) for key in ("partition-id", "num-partitions")]
    match values:
        case [int(partition_id), int(num_partitions)]:
            return partition_id, num_partitions
    raise DataError(
        f"node config {context.node_config}: right would be a SuperNode started with, for example, "
        '--node-config "partition-id=0 num-partitions=2"'
    )


def prepare(message: Message, context: Context) -> Task:
    """Load data and model of a message, with a generator fixed by seed, client and round."""
    config = Config.from_flat(context.run_config)
    if config.client.torch_threads:
        torch.set_num_threads(config.client.torch_threads)
    device = resolve_device(config.client.device)
    partition_id, num_partitions = node_partition(context)
    data = client_data(config.data, config.seed, partition_id, num_partitions)
    model = build_model(config.model.name, config.data.info, config.seed)
    arrays = message.content.array_records["arrays"]
    model.load_state_dict(arrays.to_torch_state_dict(), strict=True)
    server_round = cast(int, message.content.config_records["config"]["server-round"])
    return Task(
        model.to(device),
        data.to(device),
        config.client,
        make_generator(config.seed, "local", partition_id, server_round),
    )
