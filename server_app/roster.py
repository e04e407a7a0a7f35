"""Which node is which client: nodes have random ids, clients have numbers that stay."""

import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from logging import INFO, WARNING
from pathlib import Path

from flwr.app import Message, MessageType, Metadata, RecordDict
from flwr.common import log
from flwr.serverapp import Grid

from pfedgpa_app.files import composed, printable, quoted
from pfedgpa_app.protocol import PARTITION_ID, SOURCE
from pfedgpa_app.source import source_hash
from server_app.replies import one_line

# The package of the clients, as it was installed with this one.
_CLIENT_APP = Path(__file__).parents[1] / "client_app"
# Of a hash, so many digits are shown.
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

# Seconds between two looks for nodes, and between two lines of the log about it.
_PAUSE = 1.0
_REPORT_EVERY = 30.0


class JoinTimeoutError(RuntimeError):
    """Too few nodes connected in time."""


class SourceError(RuntimeError):
    """All nodes run another version of the code than the server."""


class Roster:
    """Number the nodes from 0 in the order of their first appearance, then of their ids.

    A node is known by the id that Flower gave it. The number serves to sort clients, to name files
    and to seed generators. The name with which a SuperNode was registered is for people alone.

    Attributes
    ----------
    names
        The names of nodes that have one, fit for a log, by node id.
    ids_stay
        Whether a node has the same id in a run that goes on from another, as on a network. In a
        simulation all ids are new.
    contested
        Numbers that several nodes claimed, which none of them has.
    refused
        Nodes that are connected and do not take part, since they run other code. They are asked
        again before each round.
    """

    ids_stay = True

    def __init__(self) -> None:
        self.clients: dict[int, int] = {}
        self.names: dict[int, str] = {}
        self.shared_names: dict[int, str] = {}
        self.contested: set[int] = set()
        self.refused: set[int] = set()
        self.connected: set[int] = set()
        self._asked: set[int] = set()
        self._is_first = True

    def resume(self, clients: dict[int, int]) -> None:
        """Take over the numbers of an earlier run.

        A node that is known by its id keeps its number, and on a network all others are newcomers.
        In a simulation, if the nodes that connect first claim all the old numbers between them, the
        numbers are theirs.
        """
        self.clients = dict(clients)

    def assemble(
        self, grid: Grid, minimum: int, timeout: float = math.inf, required: Sequence[str] = ()
    ) -> None:
        """Admit all connected nodes, once there are so many and those that are required.

        ``required`` are what `matches` takes; of each at least one client has to be there.

        Raises
        ------
        JoinTimeoutError, SourceError
            If they are not there in ``timeout`` seconds, or all run other code.
        """
        deadline = time.monotonic() + timeout
        reported = -math.inf
        while True:
            self.admit(grid, self.gather(grid, minimum, deadline - time.monotonic()))
            if not (missing := self.unmatched(required)):
                return
            found = f"of server.required, {', '.join(map(quoted, missing))} is not connected"
            now = time.monotonic()
            if now >= deadline:
                raise JoinTimeoutError(
                    f"After {timeout:.0f} s, {found}; right would be the names or numbers of "
                    "clients that are there, or a longer server.join-timeout"
                )
            if now - reported >= _REPORT_EVERY:
                reported = now
                log(INFO, "Waiting for nodes: %s", found)
            time.sleep(min(_PAUSE, deadline - now))

    def unmatched(self, patterns: Iterable[str]) -> list[str]:
        """Return which of the patterns no connected client `matches`."""
        clients = [self.clients[node_id] for node_id in self.connected]
        return [each for each in patterns if not any(self.matches(c, [each]) for c in clients)]

    def matches(
        self, client: int, patterns: Iterable[str], *, by_shared_name: bool = False
    ) -> bool:
        """Tell whether a client's number or name is one of, or fits one of, the patterns.

        They are those of file names, such as ``site-*``. A name that several have counts with
        ``by_shared_name`` alone: whom it excludes, it excludes all of.
        """
        node_id = self.node_id(client)
        name = self.names.get(node_id)
        if name is None and by_shared_name:
            name = self.shared_names.get(node_id)
        texts = [str(client)] if name is None else [str(client), name]
        return any(
            text == _shown(pattern) or fnmatchcase(text, pattern)
            for pattern in patterns
            for text in texts
        )

    def gather(self, grid: Grid, minimum: int, timeout: float = math.inf) -> list[int]:
        """Return the ids of all connected nodes, once there are so many.

        Meanwhile, the log says who is missing. ``timeout`` is in seconds.

        Raises
        ------
        JoinTimeoutError
            If there are too few by then.
        """
        begin = time.monotonic()
        reported = -math.inf
        while len(node_ids := list(grid.get_node_ids())) < minimum:
            now = time.monotonic()
            found = f"{len(node_ids)} of at least {minimum} nodes are connected"
            if now - begin >= timeout:
                raise JoinTimeoutError(
                    f"After {now - begin:.0f} s, {found}; right would be more SuperNodes, a "
                    "smaller server.min-available-nodes or a longer server.join-timeout"
                )
            if now - reported >= _REPORT_EVERY:
                reported = now
                log(INFO, "Waiting for nodes: %s%s", found, self._missing(node_ids))
            time.sleep(min(_PAUSE, begin + timeout - now))
        return node_ids

    def _missing(self, node_ids: Iterable[int]) -> str:
        connected = set(node_ids)
        missing = [
            f"{self.called(number)} (node {node})"
            for node, number in self.clients.items()
            if node not in connected
        ]
        shown = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        return f"; not here: {shown}" if missing else ""

    def admit(self, grid: Grid, node_ids: Iterable[int]) -> None:
        """Ask every node once who it is, and give those that are new a number of their own.

        Those that are known from an earlier run are asked too: their code may be another by now.

        Raises
        ------
        SourceError
            If there is nobody but such as run other code.
        """
        asked = sorted(set(node_ids) - self._asked)
        if asked:
            self._take_names(grid)
        wishes = self._wishes(grid, asked) if asked else {}
        self._asked |= set(asked) - self.refused
        wishes = {node: number for node, number in wishes.items() if node not in self.clients}
        new = [node for node in asked if node not in self.refused and node not in self.clients]
        node_ids = self.connected = set(node_ids) - self.refused
        if self._is_first and self.refused and not node_ids:
            raise SourceError(_OTHERS_SOURCE if self.ids_stay else _OTHERS_SIMULATION)
        all_new = len(new) == len(node_ids) and set(wishes.values()) >= set(self.clients.values())
        if self._is_first and all_new and not self.ids_stay:
            self.clients = {}
        elif self._is_first and self.clients and len(new) == len(node_ids):
            log(
                WARNING,
                "None of the %d clients of the earlier run is here; all %d are newcomers. Right "
                "would be %s",
                len(self.clients),
                len(new),
                "registered SuperNodes, which keep their node ids"
                if self.ids_stay
                else "as many num-supernodes as there were",
            )
        self._is_first = False
        self._leave_contested(wishes)
        self.clients |= wishes
        for node_id in sorted(set(new) - wishes.keys()):
            taken = {*self.clients.values(), *self.contested}
            free = (number for number in range(len(taken) + 1) if number not in taken)
            self.clients[node_id] = next(free)

    def _take_names(self, grid: Grid) -> None:
        """Note the names of connected nodes, but those that several have, and say which these are.

        A name is text from outside. One that reads as a number could be taken for a client's.
        """
        found = {node.node_id: _shown(node.name) for node in grid.get_nodes()}
        found = {node_id: name for node_id, name in found.items() if name and not name.isdecimal()}
        counts = Counter(found.values())
        gone = {node: name for node, name in self.names.items() if name not in counts}
        for name, count in sorted(counts.items()):
            if count > 1:
                log(
                    WARNING,
                    'Nodes %s are all called "%s", so the name is of none of them; right would be '
                    "a name of its own for each SuperNode that is registered",
                    ", ".join(str(node) for node in sorted(found) if found[node] == name),
                    name,
                )
        self.names = gone | {node: name for node, name in found.items() if counts[name] == 1}
        self.shared_names = {node: name for node, name in found.items() if counts[name] > 1}

    def _leave_contested(self, wishes: dict[int, int]) -> None:
        """Take claims out of ``wishes`` that others have as well, and say so.

        Nobody is numbered by such a claim, or by the number: who is right cannot be known, and the
        numbers of all others stay as they would be without.
        """
        counts = Counter(wishes.values())
        self.contested |= {number for number, count in counts.items() if count > 1}
        owners = {number: node_id for node_id, number in self.clients.items()}
        for node_id, number in sorted(wishes.items()):
            if number in owners:
                whose = f"is that of {self.called(number)} (node {owners[number]})"
            elif number in self.contested:
                whose = "others claim as well"
            else:
                continue
            log(
                WARNING,
                "Node %d%s says that it has partition %d, which %s: it gets another number. Right "
                "would be a partition-id of its own for each SuperNode; a registered one keeps its "
                "number when it is started again",
                node_id,
                self._in_brackets(node_id),
                number,
                whose,
            )
            del wishes[node_id]

    def client(self, node_id: int) -> int:
        """Return the number of a node."""
        return self.clients[node_id]

    def node_id(self, client: int) -> int:
        """Return the node of a number."""
        return next(node for node, number in self.clients.items() if number == client)

    def client_names(self) -> dict[int, str]:
        """Return the names of the clients that have one, by client."""
        return {
            self.clients[node]: name for node, name in self.names.items() if node in self.clients
        }

    def called(self, client: int) -> str:
        """Return a client's number and, if it has one, its name, as for a log."""
        return f"client {client}{self._in_brackets(self.node_id(client))}"

    def _in_brackets(self, node_id: int) -> str:
        return f" ({self.names[node_id]})" if node_id in self.names else ""

    def _wishes(self, grid: Grid, node_ids: list[int]) -> dict[int, int]:
        return {}


class PartitionRoster(Roster):
    """Ask nodes for their partition and the hash of their code, and number new ones by the former.

    Runs then give the same result although the node ids of a simulation are random. The answer
    decides about order and names only: whoever claims a partition that is taken, or that others
    claim too, gets another number, and nobody is given the parameters of somebody else.
    """

    # The first question waits for processes that start; later, a node must not hold up a round.
    FIRST_TIMEOUT = 600.0
    TIMEOUT = 60.0

    def _wishes(self, grid: Grid, node_ids: list[int]) -> dict[int, int]:
        messages = [
            Message(content=RecordDict(), message_type=MessageType.QUERY, dst_node_id=node_id)
            for node_id in node_ids
        ]
        timeout = self.FIRST_TIMEOUT if self._is_first else self.TIMEOUT
        replies = list(grid.send_and_receive(messages, timeout=timeout))
        wishes = {}
        self.refused -= set(node_ids)
        for node_id, reply in by_addressee([m.metadata for m in messages], replies).items():
            if reply.has_error():
                continue
            if self._runs_other_code(node_id, reply.content):
                self.refused.add(node_id)
            elif (partition := _partition(reply.content)) is not None:
                wishes[node_id] = partition
        for node_id in set(node_ids) - wishes.keys() - self.refused - self.clients.keys():
            named = self._in_brackets(node_id)
            log(
                INFO, "Node %d%s does not tell its partition; it gets a free number", node_id, named
            )
        return wishes

    def _runs_other_code(self, node_id: int, content: RecordDict) -> bool:
        """Tell whether a node says so. Clients of another's own say nothing."""
        record = content.config_records.get(SOURCE)
        theirs, ours = record and record.get(SOURCE), source_hash(_CLIENT_APP)
        if theirs is None or theirs == ours:
            return False
        log(
            WARNING,
            "Node %d%s is out of the round: it runs another version of client_app or pfedgpa_app "
            "(%s) than the server (%s); right would be the same one",
            node_id,
            self._in_brackets(node_id),
            one_line(str(theirs), _SHOWN),
            ours[:_SHOWN],
        )
        return True


def by_addressee(sent: Iterable[Metadata], replies: Iterable[Message]) -> dict[int, Message]:
    """Return the first reply to each message by the node that the message was sent to.

    The SuperLink replies in its own name for a node that left, so the sender does not tell.
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
    """Return a node's name as it may be shown; empty if there is none."""
    return printable(composed(name[:_MAX_NAME]).strip())[:_MAX_NAME]


def _partition(content: RecordDict) -> int | None:
    for record in content.metric_records.values():
        partition = record.get(PARTITION_ID)
        if isinstance(partition, int) and 0 <= partition < 2**31:
            return partition
    return None
