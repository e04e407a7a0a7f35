"""A wrapper of Flower's Grid that isolates malformed replies."""

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

from pfedgpa_app.files import count_of
from server_app.replies import ReplyError, one_line

# Seconds between two polls at most, as in Flower's own Grid on a network.
PAUSE = 3.0
# At first they are shorter, so that quick replies are not waited for: a part of the time so far.
_FIRST_PAUSE, _PART = 0.1, 0.2


class GuardedGrid:
    """Flower's Grid with replies that are fetched one by one and limited in size.

    Flower decodes all available replies at once and does not validate them. A malformed one would
    end the run, one that repeats a chunk of an array would fill the memory, and one with a wrong
    message id would leave its message unanswered. Here each is an error of its node alone.
    ``max_bytes`` limits all arrays of a reply.
    """

    def __init__(self, grid: Grid, max_bytes: int) -> None:
        self._grid = grid
        self._max_bytes = max_bytes
        # Simulations have their own, shorter interval.
        self._longest_pause: float = getattr(grid, "pull_interval", PAUSE)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the connected nodes."""
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return what the SuperLink knows of the connected nodes."""
        return self._grid.get_nodes()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send messages and return the replies of ``timeout`` seconds, or errors in their places.

        Raises `Exception` if the SuperLink does not answer.
        """
        start = time.monotonic()
        deadline = math.inf if timeout is None else start + timeout
        messages = list(messages)
        sent = set(self._grid.push_messages(messages))
        # An error reply for each message, if its reply is malformed.
        waiting = {
            message.metadata.message_id: Message(Error(ErrorCode.UNKNOWN), reply_to=message)
            for message in messages
            if message.metadata.message_id in sent
        }
        del messages  # up to one model per node
        replies: list[Message] = []
        while waiting and time.monotonic() < deadline:
            begin = time.monotonic()
            self._drop_unsolicited()
            for message_id, refusal in list(waiting.items()):
                if reply := self._receive(message_id, refusal):
                    replies.append(reply)
                    del waiting[message_id]
            if waiting:
                now = time.monotonic()
                pause = min(self._longest_pause, max(_FIRST_PAUSE, _PART * (now - start)))
                # Polling takes at most half of the time.
                time.sleep(max(pause, now - begin))
        return replies

    def _receive(self, message_id: str, refusal: Message) -> Message | None:
        """Return the reply to a message, ``refusal`` for an unreadable one, or None."""
        try:
            found = self._pull([message_id])
            own = [reply for reply in found if reply.metadata.reply_to_message_id == message_id]
            if found and not own:
                raise ReplyError("it answers another message")
            return own[0] if own else None
        except Exception as error:  # decoding may raise anything
            self._grid.get_node_ids()  # raises if the SuperLink, not the reply, is the problem
            reason = f"its reply cannot be read: {type(error).__name__}: {one_line(str(error))}"
            refusal.error = Error(ErrorCode.UNKNOWN, reason)
            return refusal

    def _drop_unsolicited(self) -> None:
        """Discard messages that are no replies, which would be fetched with the next reply."""
        try:
            num_dropped = len(self._pull([]))
        except Exception as error:
            self._grid.get_node_ids()
            log(WARNING, "An unsolicited message cannot be read: %s", one_line(str(error)))
        else:
            if num_dropped:
                log(WARNING, "Discarded: %s", count_of(num_dropped, "unsolicited message"))

    def _pull(self, message_ids: list[str]) -> list[Message]:
        with bounded_arrays(self._max_bytes):
            return list(self._grid.pull_messages(message_ids))


@contextmanager
def bounded_arrays(max_bytes: int) -> Iterator[None]:
    """Limit the total bytes of arrays that Flower assembles from chunks.

    Flower assembles a reply before anyone can check it. So ``Array.inflate`` is replaced by a
    version that counts chunks as they are read, and raises a `ReplyError` before memory is
    allocated for more.
    """
    original = Array.__dict__["inflate"]
    inflate: Callable[..., Array] = Array.inflate
    left = max_bytes

    class Chunks(dict[str, Any]):
        """The chunks of an array, counted on each access."""

        def __getitem__(self, name: str) -> Any:
            nonlocal left
            chunk = super().__getitem__(name)
            left -= len(chunk.data)
            if left < 0:
                raise ReplyError(f"its arrays have more than {max_bytes} bytes")
            return chunk

    def counted(
        cls: type[Array], object_content: bytes, children: dict[str, Any] | None = None
    ) -> Array:
        return inflate(object_content, Chunks(children or {}))

    setattr(Array, "inflate", classmethod(counted))  # noqa: B010
    try:
        yield
    finally:
        setattr(Array, "inflate", original)  # noqa: B010
