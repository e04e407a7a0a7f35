"""What a node tells of itself when it is asked, without torch."""

from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, MetricRecord, MetricRecordValues, RecordDict

from client_app.node import PRIVACY, consents_to_cross_site, node_partition
from pfedgpa_app.protocol import CONFIG, CROSS_SITE, METRICS, PARTITION_ID, SOURCE
from pfedgpa_app.source import source_hash


def query(message: Message, context: Context) -> Message:
    """Tell which partition this node has, which the server sorts the clients by, and its code.

    New nodes are asked, so that from here on this one keeps an account of what it tells. Asked for
    it, a node also says whether it consents to the cross-site matrix.
    """
    partition = node_partition(context)
    context.state.setdefault(PRIVACY, MetricRecord())
    told: dict[str, MetricRecordValues] = {PARTITION_ID: partition[0]} if partition else {}
    if CROSS_SITE in message.content.config_records.get(CONFIG, ()):
        told[CROSS_SITE] = int(consents_to_cross_site(context))
    source = ConfigRecord({SOURCE: source_hash(Path(__file__).parent)})
    return Message(RecordDict({METRICS: MetricRecord(told), SOURCE: source}), reply_to=message)
