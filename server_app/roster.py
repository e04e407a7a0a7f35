"""Which node is which client: nodes have random ids, clients have numbers that stay."""

from collections.abc import Iterable
from logging import INFO

from flwr.app import Message, MessageType, MetricRecord, RecordDict
from flwr.common import log
from flwr.serverapp import Grid

PARTITION_KEY = "partition-id"


class Roster:
    """Number the nodes from 0 in the order of their first appearance, then of their ids.

    A node is known by the id that Flower gave it. The number serves to sort clients, to name files
    and to seed generators.
    """

    def __init__(self) -> None:
        self.clients: dict[int, int] = {}
        self._resumed = False

    def resume(self, clients: dict[int, int]) -> None:
        """Take over the numbers of an earlier run.

        A node that is known by its id keeps its number. If none of the nodes that connect first is
        known, the ids are all new, as in every simulation, and nodes are numbered as at a start.
        """
        self.clients = dict(clients)
        self._resumed = True

    def admit(self, grid: Grid, node_ids: Iterable[int]) -> None:
        """Give every node that is not yet known a number of its own."""
        node_ids = set(node_ids)
        if self._resumed and node_ids and not node_ids & self.clients.keys():
            self.clients = {}
        self._resumed = False
        new = sorted(node_ids - self.clients.keys())
        wishes = self._wishes(grid, new) if new else {}
        for node_id in sorted(new, key=lambda node_id: (wishes.get(node_id, 2**63), node_id)):
            taken = set(self.clients.values())
            wish = wishes.get(node_id)
            if wish is None or wish in taken:
                wish = next(number for number in range(len(taken) + 1) if number not in taken)
            self.clients[node_id] = wish

    def client(self, node_id: int) -> int:
        """Return the number of a node."""
        return self.clients[node_id]

    def node_id(self, client: int) -> int:
        """Return the node of a number."""
        return next(node for node, number in self.clients.items() if number == client)

    def _wishes(self, grid: Grid, node_ids: list[int]) -> dict[int, int]:
        return {}


class PartitionRoster(Roster):
    """Ask new nodes for their partition and number them by it.

    Runs then give the same result although the node ids of a simulation are random. The answer
    decides about order and names only: whoever claims a partition that is taken gets another
    number, and nobody is given the parameters of somebody else.
    """

    def __init__(self, timeout: float = 600.0) -> None:
        super().__init__()
        self.timeout = timeout

    def _wishes(self, grid: Grid, node_ids: list[int]) -> dict[int, int]:
        messages = [
            Message(content=RecordDict(), message_type=MessageType.QUERY, dst_node_id=node_id)
            for node_id in node_ids
        ]
        wishes = {}
        for reply in grid.send_and_receive(messages, timeout=self.timeout):
            node_id = reply.metadata.src_node_id
            partition = None if reply.has_error() else _partition(reply.content)
            if partition is None:
                log(INFO, "Node %d does not tell its partition; it gets a free number", node_id)
            elif node_id in node_ids:
                wishes[node_id] = partition
        return wishes


def _partition(content: RecordDict) -> int | None:
    for record in content.metric_records.values():
        if isinstance(record, MetricRecord):
            partition = record.get(PARTITION_KEY)
            if isinstance(partition, int) and 0 <= partition < 2**31:
                return partition
    return None
