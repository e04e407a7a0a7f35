"""What a node tells of itself when it is asked, without torch."""

from flwr.app import Context, Message, MetricRecord, MetricRecordValues, RecordDict

from client_app.node import PRIVACY, node_partition


def query(message: Message, context: Context) -> Message:
    """Tell which partition this node has, which the server sorts the clients by.

    New nodes are asked, so that from here on this one keeps an account of what it tells.
    """
    partition = node_partition(context)
    context.state.setdefault(PRIVACY, MetricRecord())
    told: dict[str, MetricRecordValues] = {"partition-id": partition[0]} if partition else {}
    return Message(RecordDict({"metrics": MetricRecord(told)}), reply_to=message)
