"""A ClientApp that falsifies its training replies, in the ways that its node config names.

``fault='nan,size'`` sends NaN in the first round, too large an array in the second, and so on.
"""

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client_app.app import app as honest
from pfedgpa_app.parameters import StateDict

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Answer as the honest client does."""
    return honest(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Answer as the honest client does."""
    return honest(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train as the honest client does, and falsify what is sent."""
    reply = honest(message, context)
    if "fault" in context.node_config:
        faults = str(context.node_config["fault"]).split(",")
        server_round = int(message.content["config"]["server-round"])
        falsify(reply.content, faults[(server_round - 1) % len(faults)])
    return reply


def falsify(content: RecordDict, fault: str) -> None:
    """Put a fault into what a client uploads."""
    if fault == "record":
        content["more"] = ConfigRecord({"nobody": "asked for this"})
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
