"""A client of the embedded digits: its messages, and what it answers."""

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client_app.messages import train_message
from pfedgpa_app.config import DATASETS
from pfedgpa_app.models import build_model

SETTINGS = {"client.local-epochs": 3, "client.device": "cpu"}
MODEL = build_model("cnn-8x8", DATASETS["digits"], seed=0)


def context(partition_id: int = 0, **settings) -> Context:
    node = {"partition-id": partition_id, "num-partitions": 4}
    return Context(1, partition_id, node, RecordDict(), {**SETTINGS, **settings})


def message(kind: str, server_round: int = 1) -> Message:
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    content = RecordDict(
        {
            "arrays": ArrayRecord(MODEL.state_dict()),
            "config": ConfigRecord({"server-round": server_round}),
        }
    )
    return Message(content=content, message_type=kind, dst_node_id=3)


def trained(partition_id: int = 0, server_round: int = 1, **settings):
    torch.manual_seed(torch.seed())  # nothing may depend on the global generator
    reply = train_message(
        message(MessageType.TRAIN, server_round), context(partition_id, **settings)
    )
    return reply.content["arrays"].to_torch_state_dict(), reply.content["metrics"]


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)
