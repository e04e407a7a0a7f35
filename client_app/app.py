"""The ClientApp, whose parts are imported when they are needed.

Flower starts a process for every message of a SuperNode, and a query needs no torch.
"""

from flwr.app import Context, Message, MetricRecord, MetricRecordValues, RecordDict
from flwr.clientapp import ClientApp

from client_app.node import PRIVACY, node_partition

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Tell which partition this node has, which the server sorts the clients by.

    New nodes are asked, so that from here on this one keeps an account of what it tells.
    """
    partition = node_partition(context)
    context.state.setdefault(PRIVACY, MetricRecord())
    told: dict[str, MetricRecordValues] = {"partition-id": partition[0]} if partition else {}
    return Message(RecordDict({"metrics": MetricRecord(told)}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the received model."""
    from client_app.messages import train_message

    return train_message(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Judge the received model."""
    from client_app.messages import evaluate_message

    return evaluate_message(message, context)
