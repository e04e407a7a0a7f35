"""Flower's Grid, asked so that what one node sends cannot end the run of all."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from logging import WARNING
from typing import Any

from flwr.app import Array, Error, Message
from flwr.common import log
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from server_app.replies import ReplyError, one_line

# Seconds between two looks for replies, as in Flower's own Grid on a network.
PAUSE = 3.0


class GuardedGrid:
    """Flower's Grid with replies that are fetched one by one, and are bounded.

    Flower decodes all replies that are there in one go, and the SuperLink has not looked into them.
    A malformed one raises, and the run ends. One that names a piece of an array again and again
    fills the memory. One that claims to answer another message leaves its own unanswered. Here
    each of these is an error of the node that was asked, and the other replies are read.

    Parameters
    ----------
    grid : Grid
        Flower's Grid.
    max_bytes : int
        What the arrays of a reply may weigh in all.
    """

    def __init__(self, grid: Grid, max_bytes: int) -> None:
        self._grid = grid
        self._max_bytes = max_bytes
        # In a simulation nothing is far away: Flower's Grid there says how long it pauses.
        self._pause: float = getattr(grid, "pull_interval", PAUSE)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the connected nodes."""
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return what the SuperLink knows of the connected nodes."""
        return self._grid.get_nodes()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send messages and return the replies, or errors in their places, in ``timeout`` seconds.

        Raises
        ------
        Exception
            If it is not a reply that cannot be read, but the SuperLink that does not answer.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        waiting = self._send(list(messages))
        del messages  # which may be as large as a model a node
        replies: list[Message] = []
        while waiting and time.monotonic() < deadline:
            begin = time.monotonic()
            self._drop_unasked()
            for message_id, refusal in list(waiting.items()):
                if reply := self._receive(message_id, refusal):
                    replies.append(reply)
                    del waiting[message_id]
            if waiting:
                # The SuperLink has other things to do: it is asked at most half of the time.
                time.sleep(max(self._pause, time.monotonic() - begin))
        return replies

    def _send(self, messages: list[Message]) -> dict[str, Message]:
        """Send messages and return, by their ids, what stands for replies that cannot be read."""
        sent = set(self._grid.push_messages(messages))
        refused = Error(ErrorCode.UNKNOWN)
        return {
            message.metadata.message_id: Message(refused, reply_to=message)
            for message in messages
            if message.metadata.message_id in sent
        }

    def _receive(self, message_id: str, refusal: Message) -> Message | None:
        """Return the reply to a message, or ``refusal`` with the reason; None if there is none."""
        try:
            found = self._pull([message_id])
            own = [reply for reply in found if reply.metadata.reply_to_message_id == message_id]
            if found and not own:
                raise ReplyError("it answers another message than the one that was sent")
            return own[0] if own else None
        except Exception as error:  # decoding raises whatever it stumbles over
            self._grid.get_node_ids()  # raises too, unless it was the reply
            reason = f"its reply cannot be read: {type(error).__name__}: {one_line(str(error))}"
            refusal.error = Error(ErrorCode.UNKNOWN, reason)
            return refusal

    def _drop_unasked(self) -> None:
        """Fetch messages that are no replies, which would come along with the next reply."""
        try:
            num_dropped = len(self._pull([]))
        except Exception as error:
            self._grid.get_node_ids()
            log(WARNING, "A message that nobody asked for cannot be read: %s", one_line(str(error)))
        else:
            if num_dropped:
                log(WARNING, "%d messages are no replies and are not read", num_dropped)

    def _pull(self, message_ids: list[str]) -> list[Message]:
        with bounded_arrays(self._max_bytes):
            return list(self._grid.pull_messages(message_ids))


@contextmanager
def bounded_arrays(max_bytes: int) -> Iterator[None]:
    """Limit what Flower puts together of pieces of arrays to so many bytes in all.

    Flower has no setting for it, and a reply is put together before anyone else sees it. So its
    function is replaced meanwhile by one that counts the pieces as they are taken.

    Raises
    ------
    ReplyError
        Out of the decoding, before memory is taken for more.
    """
    original = Array.__dict__["inflate"]
    inflate: Callable[..., Array] = Array.inflate
    left = max_bytes

    class Pieces(dict[str, Any]):
        """The pieces of an array, counted each time that one is taken."""

        def __getitem__(self, name: str) -> Any:
            nonlocal left
            piece = super().__getitem__(name)
            left -= len(piece.data)
            if left < 0:
                raise ReplyError(f"its arrays have more than {max_bytes} bytes")
            return piece

    def counted(
        cls: type[Array], object_content: bytes, children: dict[str, Any] | None = None
    ) -> Array:
        return inflate(object_content, Pieces(children or {}))

    setattr(Array, "inflate", classmethod(counted))  # noqa: B010
    try:
        yield
    finally:
        setattr(Array, "inflate", original)  # noqa: B010
