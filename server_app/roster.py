"""Numbers and names of clients: node ids are random, and clients keep their numbers."""

import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import count
from logging import INFO, WARNING
from pathlib import Path

from flwr.app import Message, MessageType, Metadata, RecordDict
from flwr.common import log
from flwr.serverapp import Grid

from pfedgpa_app.files import composed, count_of, printable, quoted
from pfedgpa_app.protocol import PARTITION_ID, SOURCE
from pfedgpa_app.source import source_hash
from server_app.replies import one_line

# The package of the clients, as installed with this one.
_CLIENT_APP = Path(__file__).parents[1] / "client_app"
# Digits of a hash that are logged.
_SHOWN = 12
_MAX_NAME = 40
_OTHERS_SOURCE = (
    "All nodes run another version of client_app or pfedgpa_app than the server; right would be "
    "the same one on all machines, and none that comes first on the PYTHONPATH of a site"
)
_OTHERS_SIMULATION = (
    "The simulated clients run another version of client_app or pfedgpa_app than this app. They "
    "import what is in the folder, or on the PYTHONPATH, of whoever started Flower's SuperLink. "
    'Right would be to end it, with pkill -f "flower-superlink.*--simulation", and to start the '
    "run again: flwr run starts a new one"
)

# Seconds between two polls for nodes, and between two lines of the log about it.
PAUSE = 1.0
_REPORT_EVERY = 30.0


class JoinTimeoutError(RuntimeError):
    """Too few nodes connected in time."""


class SourceError(RuntimeError):
    """All nodes run another version of the code than the server."""


class Roster:
    """Numbers nodes from 0 in the order of their first appearance, then of their ids.

    Numbers sort clients, name files and seed generators. Names, with which SuperNodes were
    registered, are for people alone.
    """

    ids_stay = True
    """Whether nodes keep their ids in a resumed run, as on a network. In a simulation all are new,
    and those that connect first get the numbers of the earlier run if they claim all of them."""

    def __init__(self) -> None:
        # Of all nodes by id, at first those of an earlier run.
        self.clients: dict[int, int] = {}
        # By node id, printable: of one node alone, and of several connected ones.
        self.names: dict[int, str] = {}
        self.shared_names: dict[int, str] = {}
        # Partitions that several nodes claimed, which are no client's number.
        self.contested: set[int] = set()
        # Connected nodes with other code, which are queried before each round; and the clients'.
        self.refused: set[int] = set()
        self.connected: set[int] = set()
        self._queried: set[int] = set()
        self._is_first = True

    def assemble(
        self, grid: Grid, minimum: int, timeout: float = math.inf, required: Sequence[str] = ()
    ) -> None:
        """Admit all connected nodes, once there are ``minimum`` and those that are required.

        Each of the patterns ``required`` must match a client, as in `matches`. Meanwhile, the log
        says who is missing. Raises `JoinTimeoutError` or `SourceError` if they are not there in
        ``timeout`` seconds, or all run other code.
        """
        begin = time.monotonic()
        reported = -math.inf
        while True:
            node_ids = list(grid.get_node_ids())
            if len(node_ids) < minimum:
                found = f"{len(node_ids)} of at least {count_of(minimum, 'node')} are connected"
                right = "more SuperNodes, a smaller server.min-available-nodes or"
                missing = self._missing(set(node_ids))
            else:
                self.admit(grid, node_ids)
                if not (absent := self.unmatched(required)):
                    return
                found = f"of server.required, {', '.join(map(quoted, absent))} is not connected"
                right = "the names or numbers of clients that are there, or"
                missing = ""
            now = time.monotonic()
            if now - begin >= timeout:
                raise JoinTimeoutError(
                    f"After {now - begin:.0f} s, {found}; right would be {right} a longer "
                    "server.join-timeout"
                )
            if now - reported >= _REPORT_EVERY:
                reported = now
                log(INFO, "Waiting for nodes: %s%s", found, missing)
            time.sleep(min(PAUSE, begin + timeout - now))

    def _missing(self, node_ids: set[int]) -> str:
        missing = [
            f"{self.called(number)} (node {node})"
            for node, number in self.clients.items()
            if node not in node_ids
        ]
        shown = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        return f"; not here: {shown}" if missing else ""

    def unmatched(self, patterns: Iterable[str]) -> list[str]:
        """Return the patterns that match no connected client."""
        clients = [self.clients[node_id] for node_id in self.connected]
        return [each for each in patterns if not any(self.matches(c, [each]) for c in clients)]

    def matches(
        self, client: int, patterns: Iterable[str], *, by_shared_name: bool = False
    ) -> bool:
        """Return whether a client's number or name is, or matches, one of the patterns.

        They are those of file names, such as ``site-*``. Names of several clients match only with
        ``by_shared_name``.
        """
        node_id = self.node_id(client)
        names = self.shared_names | self.names if by_shared_name else self.names
        texts = [str(client)]
        if node_id in names:
            texts.append(names[node_id])
        return any(
            text == _shown(pattern) or fnmatchcase(text, pattern)
            for pattern in patterns
            for text in texts
        )

    def admit(self, grid: Grid, node_ids: Iterable[int]) -> None:
        """Query every node once, and give those that are new a number of their own.

        Those that are known from an earlier run are queried too: their code may be another by now.
        Raises `SourceError` if all nodes run other code.
        """
        queried = sorted(set(node_ids) - self._queried)
        if queried:
            self._read_names(grid)
        claims = self._claims(grid, queried) if queried else {}
        self._queried |= set(queried) - self.refused
        claims = {node: number for node, number in claims.items() if node not in self.clients}
        new = [node for node in queried if node not in self.refused and node not in self.clients]
        self.connected = set(node_ids) - self.refused
        if self._is_first and self.refused and not self.connected:
            raise SourceError(_OTHERS_SOURCE if self.ids_stay else _OTHERS_SIMULATION)
        if self._is_first and self.clients and len(new) == len(self.connected):
            if not self.ids_stay and set(claims.values()) >= set(self.clients.values()):
                self.clients = {}
            else:
                log(
                    WARNING,
                    "No client of the earlier run (%d) is here, so all %d are newcomers. Right "
                    "would be %s",
                    len(self.clients),
                    len(new),
                    "registered SuperNodes, which keep their node ids"
                    if self.ids_stay
                    else "as many num-supernodes as there were",
                )
        self._is_first = False
        self._drop_contested(claims)
        self.clients |= claims
        taken = {*self.clients.values(), *self.contested}
        free = (number for number in count() if number not in taken)
        self.clients |= dict(zip(sorted(set(new) - claims.keys()), free, strict=False))

    def _read_names(self, grid: Grid) -> None:
        """Set the names of connected nodes, which are text from outside.

        One that reads as a number could be taken for a client's.
        """
        nodes: dict[str, list[int]] = {}
        for node in sorted(grid.get_nodes(), key=lambda node: node.node_id):
            name = _shown(node.name)
            if name and not name.isdecimal():
                nodes.setdefault(name, []).append(node.node_id)
        self.names = {node: name for node, name in self.names.items() if name not in nodes}
        self.shared_names = {}
        for name, node_ids in sorted(nodes.items()):
            if len(node_ids) == 1:
                self.names[node_ids[0]] = name
                continue
            self.shared_names |= dict.fromkeys(node_ids, name)
            log(
                WARNING,
                'Nodes %s are all called "%s", so the name is of none of them; right would be a '
                "name of its own for each SuperNode that is registered",
                ", ".join(map(str, node_ids)),
                name,
            )

    def _drop_contested(self, claims: dict[int, int]) -> None:
        """Drop claims of numbers that are taken, or claimed by several, since any may be false."""
        self.contested |= {number for number, each in Counter(claims.values()).items() if each > 1}
        owners = {number: node_id for node_id, number in self.clients.items()}
        for node_id, number in sorted(claims.items()):
            if number in owners:
                whose = f"is that of {self.called(number)} (node {owners[number]})"
            elif number in self.contested:
                whose = "others claim as well"
            else:
                continue
            log(
                WARNING,
                "%s says that it has partition %d, which %s: it gets another number. Right would "
                "be a partition-id of its own for each SuperNode; a registered one keeps its "
                "number when it is started again",
                self._node(node_id),
                number,
                whose,
            )
            del claims[node_id]

    def client(self, node_id: int) -> int:
        """Return the number of a node."""
        return self.clients[node_id]

    def node_id(self, client: int) -> int:
        """Return the node of a number."""
        return next(node for node, number in self.clients.items() if number == client)

    def client_names(self) -> dict[int, str]:
        """Return the names of clients that have one, by number."""
        return {
            self.clients[node]: name for node, name in self.names.items() if node in self.clients
        }

    def called(self, client: int) -> str:
        """Return a client's number and name as text."""
        return f"client {client}{self._in_brackets(self.node_id(client))}"

    def _node(self, node_id: int) -> str:
        return f"Node {node_id}{self._in_brackets(node_id)}"

    def _in_brackets(self, node_id: int) -> str:
        return f" ({self.names[node_id]})" if node_id in self.names else ""

    def _claims(self, grid: Grid, node_ids: list[int]) -> dict[int, int]:
        return {}


class PartitionRoster(Roster):
    """Queries nodes for the hash of their code and their partitions, and numbers new ones by these.

    Results then do not depend on the random node ids of simulations. Replies decide about order and
    names only: a node that claims a partition of another gets another number, and never the
    parameters of another.
    """

    # In seconds. The first query waits for processes that start; later ones hold up rounds.
    FIRST_TIMEOUT = 600.0
    TIMEOUT = 60.0

    def _claims(self, grid: Grid, node_ids: list[int]) -> dict[int, int]:
        timeout = self.FIRST_TIMEOUT if self._is_first else self.TIMEOUT
        self.refused -= set(node_ids)
        claims: dict[int, int] = {}
        for node_id, reply in query(grid, node_ids, RecordDict(), timeout).items():
            if reply.has_error():
                continue
            if self._runs_other_code(node_id, reply.content):
                self.refused.add(node_id)
                continue
            for record in reply.content.metric_records.values():
                partition = record.get(PARTITION_ID)
                if isinstance(partition, int) and 0 <= partition < 2**31:
                    claims.setdefault(node_id, partition)
        for node_id in set(node_ids) - claims.keys() - self.refused - self.clients.keys():
            log(INFO, "%s reports no partition; it gets a free number", self._node(node_id))
        return claims

    def _runs_other_code(self, node_id: int, content: RecordDict) -> bool:
        """Return whether a node reports another hash of its code; other apps' nodes report none."""
        record = content.config_records.get(SOURCE)
        theirs, ours = record and record.get(SOURCE), source_hash(_CLIENT_APP)
        if theirs is None or theirs == ours:
            return False
        log(
            WARNING,
            "%s is out of the round: it runs another version of client_app or pfedgpa_app (%s) "
            "than the server (%s); right would be the same one",
            self._node(node_id),
            one_line(str(theirs), _SHOWN),
            ours[:_SHOWN],
        )
        return True


def query(
    grid: Grid, node_ids: Iterable[int], content: RecordDict, timeout: float
) -> dict[int, Message]:
    """Send nodes a query, and return the replies of ``timeout`` seconds by node."""
    messages = [
        Message(content, dst_node_id=node_id, message_type=MessageType.QUERY)
        for node_id in node_ids
    ]
    replies = grid.send_and_receive(messages, timeout=timeout)
    return by_addressee([message.metadata for message in messages], replies)


def by_addressee(sent: Iterable[Metadata], replies: Iterable[Message]) -> dict[int, Message]:
    """Return the first reply to each message, by the node to which the message was sent.

    The sender of a reply may be the SuperLink, which replies for nodes that left.
    """
    addressees = {metadata.message_id: metadata.dst_node_id for metadata in sent}
    found: dict[int, Message] = {}
    for reply in replies:
        node_id = addressees.get(reply.metadata.reply_to_message_id)
        own = reply.metadata.src_node_id == node_id or reply.has_error()
        if node_id is not None and own:
            found.setdefault(node_id, reply)
        else:
            log(WARNING, "Node %d sent a reply that nobody asked for", reply.metadata.src_node_id)
    return found


def _shown(name: str) -> str:
    """Return a node's name as printable text, "" for none."""
    return printable(composed(name[:_MAX_NAME]).strip())[:_MAX_NAME]
