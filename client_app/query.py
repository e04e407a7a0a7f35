"""The reply to a query, without torch."""

from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, MetricRecord, MetricRecordValues, RecordDict

from client_app.node import PRIVACY, consents_to_cross_site, node_partition
from pfedgpa_app.protocol import CONFIG, CROSS_SITE, METRICS, PARTITION_ID, SOURCE
from pfedgpa_app.source import source_hash


def query(message: Message, context: Context) -> Message:
    """Return the node's partition, by which the server sorts clients, and the hash of its code.

    New nodes are queried first, so an empty privacy ledger begins here. If requested, a node also
    reports whether it consents to the cross-site matrix.
    """
    partition = node_partition(context)
    context.state.setdefault(PRIVACY, MetricRecord())
    metrics: dict[str, MetricRecordValues] = {PARTITION_ID: partition[0]} if partition else {}
    if CROSS_SITE in message.content.config_records.get(CONFIG, ()):
        metrics[CROSS_SITE] = int(consents_to_cross_site(context))
    source = ConfigRecord({SOURCE: source_hash(Path(__file__).parent)})
    return Message(RecordDict({METRICS: MetricRecord(metrics), SOURCE: source}), reply_to=message)
