"""A ClientApp that sends faulty training replies, as its node config says.

``fault='nan,size'`` sends NaN in the first round, too large an array in the second, and so on.
"""

import json
from collections.abc import Callable

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from benchmarks.dishonest import honest, training_by
from pfedgpa_app.parameters import StateDict


def train(message: Message, context: Context) -> Message:
    """Train like the honest client, and falsify the reply."""
    reply = honest(message, context)
    if "fault" in context.node_config:
        faults = str(context.node_config["fault"]).split(",")
        server_round = int(message.content["config"]["server-round"])
        fault = faults[(server_round - 1) % len(faults)]
        if fault == "address":
            reply.__class__ = MisdirectedReply
        else:
            falsify(reply.content, fault)
    return reply


class ForgedArray(Array):
    """An array whose object passes the SuperLink but is malformed."""

    def __init__(self, array: Array, fault: str) -> None:
        super().__init__(array.dtype, array.shape, array.stype, array.data)
        self.fault = fault

    def deflate(self) -> bytes:
        """Return the object: the type, the chunks' ids, the body's length, and the body."""
        head, _, body = super().deflate().partition(b"\0")
        kind, chunks, _ = head.split(b" ")
        chunks, body = FORGERIES[self.fault](chunks, body)
        return b"%s %s %d\0%s" % (kind, chunks, len(body), body)


class MisdirectedReply(Message):
    """A reply whose content answers another message than its metadata."""

    def deflate(self) -> bytes:
        """Return the object, made with another message's id."""
        metadata = self.metadata.__dict__
        asked, metadata["_reply_to_message_id"] = metadata["_reply_to_message_id"], "0" * 64
        try:
            return super().deflate()
        finally:
            metadata["_reply_to_message_id"] = asked


# The class's name is the object's type.
ForgedArray.__qualname__ = Array.__qualname__
MisdirectedReply.__qualname__ = Message.__qualname__

REPETITIONS = 100_000


def _repeat(chunks: bytes, body: bytes) -> tuple[bytes, bytes]:
    said = json.loads(body) | {"arraychunk_ids": [0] * REPETITIONS}
    return chunks, json.dumps(said).encode()


FORGERIES: dict[str, Callable[[bytes, bytes], tuple[bytes, bytes]]] = {
    "json": lambda chunks, body: (chunks, b"no JSON"),
    "nesting": lambda chunks, body: (chunks, b"[" * 100_000),
    "missing": lambda chunks, body: (chunks + b"," + b"0" * 64, body),
    "repeat": _repeat,
}
"""Falsified chunk ids and body of an array's object."""


def falsify(content: RecordDict, fault: str) -> None:
    """Insert a fault into an upload."""
    if fault == "record":
        content["more"] = ConfigRecord({"nobody": "asked for this"})
        return
    if fault in FORGERIES:
        arrays = content.array_records["arrays"]
        name = max(arrays, key=lambda name: len(arrays[name].data))
        arrays[name] = ForgedArray(arrays[name], fault)
        return
    state: StateDict = content["arrays"].to_torch_state_dict()
    name, tensor = next(iter(state.items()))
    match fault:
        case "nan":
            tensor[0] = torch.nan
        case "shape":
            state[name] = tensor.flatten()
        case "names":
            state = {f"module.{name}": tensor for name, tensor in state.items()}
        case "size":
            state[name] = tensor.repeat(100, *[1] * (tensor.dim() - 1))
        case _:
            raise ValueError(f'fault = "{fault}"')
    content["arrays"] = ArrayRecord(state)


app = training_by(train)
