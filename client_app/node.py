"""The identity of a node, and its reply to a query, without its data and without torch."""

from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, MetricRecord, MetricRecordValues, RecordDict

from pfedgpa_app.protocol import CONFIG, CROSS_SITE, METRICS, PARTITION_ID, SOURCE
from pfedgpa_app.source import source_hash

PRIVACY = "privacy"
"""The record of the client's Flower state with its privacy ledger."""


class NodeError(ValueError):
    """A node config that is wrong; the message says what would be right."""


def node_partition(context: Context) -> tuple[int, int] | None:
    """Return partition-id and num-partitions of the node config.

    A node with its own data (``data-path``) may have neither. Raises `NodeError` if one of them is
    missing or not a whole number.
    """
    values = [context.node_config.get(key) for key in ("partition-id", "num-partitions")]
    match values:
        case [int(partition_id), int(num_partitions)]:
            return partition_id, num_partitions
        case [None, None] if "data-path" in context.node_config:
            return None
    # The error goes to the server, so it names no other entries, such as paths.
    raise NodeError(
        f"node config with partition-id {values[0]!r} and num-partitions {values[1]!r}: "
        "right would be a SuperNode started with, for example, "
        '--node-config "partition-id=0 num-partitions=2"'
    )


def client_number(context: Context) -> int:
    """Return a stable id of this client: its partition, or else its node id.

    Node ids are random in simulations and fixed for registered SuperNodes.
    """
    partition = node_partition(context)
    return partition[0] if partition else context.node_id


def consents_to_cross_site(context: Context) -> bool:
    """Return whether others' models may be evaluated here, and this node's at their sites.

    A site with its own data consents by ``cross-site=true`` in its node config; partitions need no
    consent. Raises `NodeError` if the entry is not true or false.
    """
    given = context.node_config.get("cross-site", "data-path" not in context.node_config)
    if not isinstance(given, bool):
        raise NodeError(f"node config with cross-site {given!r}: right would be true or false")
    return given


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
