"""What the server knows of each client, and whose models the others learn from."""

import contextlib
import statistics
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated

from torch import Tensor

from pfedgpa_app.state import WriteError
from pfedgpa_app.stateful import Kept, Stateful, Vector
from pfedgpa_app.vault import MemoryVault, Vault

# Rounds after which others do not learn from a client's last upload any more. Where clients take
# part seldom it is as many times the median member's rounds between its last two uploads.
MAX_AGE = 20
_MAX_INTERVALS = 5


class Standing(IntEnum):
    """What a client is to the others, which `Bank.take_in` alone changes."""

    NEWCOMER = 0
    """No upload of it is in the bank yet."""
    MEMBER = 1
    """The others learn from its last upload."""
    QUARANTINED = 2
    """Its last upload is its model as it is, and nobody learns from it."""
    ARCHIVED = 3
    """It was a member, and its last upload is old, or one of too many."""


@dataclass
class ClientRecord:
    """What the server knows of a client.

    Attributes
    ----------
    standing
        What it is to the others.
    model
        Its parameters, ``(d,)``, brought up to date: the last upload of a member, what was
        generated for a newcomer. None where there are none, or they are `Bank.archived`.
    halves
        How two halves of its images moved what all have in common apart, as it told last:
        `normalized` sketches ``(2, size)``, `centred` among all that told in the same round.
    seen
        The round in which something came from it last.
    interval
        The rounds between its last two uploads, once it is no newcomer.
    last_measured_round
        The round in which it was last asked for its halves.
    was_measured_again
        Whether it was asked before that.
    has_misfits
        Whether the halves that it reported last contradict each other or its own update.
    rounds_onboarded
        The rounds that it had as a newcomer; 0 for others.
    """

    standing: Standing = Standing.NEWCOMER
    model: Vector | None = None
    halves: Annotated[Tensor, "2 size"] | None = None
    seen: int = 0
    interval: int | None = None
    last_measured_round: int | None = None
    was_measured_again: bool = False
    has_misfits: bool = False
    rounds_onboarded: int = 0


class Bank(Stateful):
    """The records of all clients.

    Parameters
    ----------
    max_members
        At most so many models, those of the latest uploads, are in the bank, and as many of others
        in memory.
    archived
        Where the models of the rest are, ``(d,)``. Nothing is done with one until it is asked
        for. In memory by default.

    Attributes
    ----------
    uploads
        What clients uploaded in this round, ``(d,)``, and what they are to be by it, until
        `take_in`.
    """

    archived: Kept[Vault]
    clients: Kept[dict[int, ClientRecord]]

    def __init__(self, max_members: int, archived: Vault | None = None) -> None:
        self.max_members = max_members
        self.archived = MemoryVault() if archived is None else archived
        self.clients = {}
        self.uploads: dict[int, tuple[Tensor, Standing]] = {}

    def of(self, client: int) -> ClientRecord:
        """Return the record of a client, a new one if there is none."""
        return self.clients.setdefault(client, ClientRecord())

    @property
    def members(self) -> dict[int, Tensor]:
        """The models ``(d,)`` of members, sorted by client."""
        return self._models(of_members=True)

    @property
    def non_members(self) -> dict[int, Tensor]:
        """The other models ``(d,)`` in memory, sorted by client."""
        return self._models(of_members=False)

    @property
    def has_members(self) -> bool:
        """Whether there was ever an upload of a member."""
        return any(each.standing is not Standing.NEWCOMER for each in self.clients.values())

    def knows(self, client: int) -> bool:
        """Tell whether there is a model of a client."""
        record = self.clients.get(client)
        return (record is not None and record.model is not None) or client in self.archived

    def put(self, client: int, model: Tensor, server_round: int) -> None:
        """Take in what was generated for a newcomer, ``(d,)``."""
        self._forget_archived(client)
        record = self.of(client)
        record.model, record.seen = model, server_round
        record.rounds_onboarded += 1

    def take_in(self, server_round: int) -> None:
        """Take in the uploads of a round, and settle what everyone is to the others.

        A member without an upload for more than `MAX_AGE` rounds, or where there are more than
        ``max_members`` later ones, is archived.
        """
        num_uploads = len(self.uploads)
        for client, (upload, standing) in self.uploads.items():
            self._forget_archived(client)
            record = self.of(client)
            if record.standing is not Standing.NEWCOMER:
                record.interval = server_round - record.seen
            record.model, record.seen, record.rounds_onboarded = upload, server_round, 0
            record.standing = standing
        self.uploads = {}
        max_age = self._max_age(server_round)
        self._settle(server_round - max_age)
        for models in (self.members, self.non_members):
            self._archive(models, max(self.max_members, num_uploads))
        self._settle(server_round - max_age)

    def _settle(self, oldest: float) -> None:
        """Archive members with older uploads, or without a model in memory, and no others."""
        for record in self.clients.values():
            if record.standing in (Standing.MEMBER, Standing.ARCHIVED):
                is_member = record.model is not None and record.seen >= oldest
                record.standing = Standing.MEMBER if is_member else Standing.ARCHIVED

    def _models(self, *, of_members: bool) -> dict[int, Tensor]:
        return {
            client: record.model
            for client, record in sorted(self.clients.items())
            if record.model is not None and (record.standing is Standing.MEMBER) is of_members
        }

    def _max_age(self, server_round: int) -> float:
        """Return how many rounds a member's last upload may be old for others to learn from it."""
        records = [each for each in self.clients.values() if each.standing is not Standing.NEWCOMER]
        # Ages would let nobody go where most are gone; they are all there is at first.
        intervals = [each.interval for each in records if each.interval is not None] or [
            server_round - each.seen for each in records
        ]
        usual = statistics.median(intervals) if intervals else 0
        return max(MAX_AGE, _MAX_INTERVALS * usual)

    def _archive(self, models: dict[int, Tensor], most: int) -> None:
        """Put away the models of all but those of the latest uploads."""
        latest = sorted(models, key=lambda client: (-self.clients[client].seen, client))
        for client in latest[most:]:
            with contextlib.suppress(WriteError):  # it stays then, until there is room
                self.archived[client] = models[client]
                self.clients[client].model = None

    def _forget_archived(self, client: int) -> None:
        if client in self.archived:  # pop would read it
            del self.archived[client]
