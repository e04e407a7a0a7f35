"""The server's records of the clients, and the bank of models that the others learn from."""

import contextlib
import statistics
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated

import torch
from torch import Tensor

from pfedgpa_app.diffusion.signal import centred
from pfedgpa_app.state import WriteError
from pfedgpa_app.stateful import Kept, Stateful, Vector
from pfedgpa_app.vault import MemoryVault, Vault

# Largest age, in rounds, of an upload that the others learn from. Where clients take part seldom,
# it is `_MAX_INTERVALS` times the median member's rounds between its last two uploads.
MAX_AGE = 20
_MAX_INTERVALS = 5


class Standing(IntEnum):
    """A client's part in the models of others; `Bank.take_in` alone changes it."""

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
    """The server's record of a client."""

    standing: Standing = Standing.NEWCOMER
    """Its part in the models of others."""
    model: Vector | None = None
    """Its parameters, ``(d,)``, brought up to date: the last upload of a member, what was generated
    for a newcomer. None where there are none, or they are `Bank.archived`."""
    halves: Annotated[Tensor, "2 size"] | None = None
    """Its last report of the updates on each half of its examples, `normalized` sketches, `centred`
    among the reports of the same round."""
    seen: int = 0
    """The round of its last upload."""
    interval: int | None = None
    """The rounds between its last two uploads, once it is no newcomer."""
    last_measured_round: int | None = None
    """The round in which its halves were last requested."""
    was_measured_again: bool = False
    """Whether they were requested before that as well."""
    has_misfits: bool = False
    """Whether the halves that it reported last contradict each other or its own update."""
    rounds_onboarded: int = 0
    """The rounds that it had as a newcomer; 0 for others."""


class Bank(Stateful):
    """The records of all clients.

    At most ``max_members`` models of members, those of the latest uploads, are in memory, and as
    many of others.
    """

    archived: Kept[Vault]
    """The other models, ``(d,)``, which are read when they are needed; in memory by default."""
    clients: Kept[dict[int, ClientRecord]]

    def __init__(self, max_members: int, archived: Vault | None = None) -> None:
        self.max_members = max_members
        self.archived = MemoryVault() if archived is None else archived
        self.clients = {}
        # Those of this round, (d,), and the standing that they give, until `take_in`.
        self.uploads: dict[int, tuple[Tensor, Standing]] = {}
        # Their halves, `normalized` sketches (2, size), until `take_in` as well.
        self.reports: dict[int, Tensor] = {}

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
    def halves(self) -> list[Tensor | None]:
        """Both halves of each member, ``(2, size)``; None without a report."""
        return [self.clients[client].halves for client in self.members]

    @property
    def has_members(self) -> bool:
        """Whether there was ever an upload of a member."""
        return any(each.standing is not Standing.NEWCOMER for each in self.clients.values())

    def knows(self, client: int) -> bool:
        """Return whether there is a model of a client."""
        record = self.clients.get(client)
        return (record is not None and record.model is not None) or client in self.archived

    def put(self, client: int, model: Tensor, server_round: int) -> None:
        """Store the model ``(d,)`` that was generated for a newcomer."""
        self._forget_archived(client)
        record = self.of(client)
        record.model, record.seen = model, server_round
        record.rounds_onboarded += 1

    def take_in(self, server_round: int) -> None:
        """Take in uploads and reports of a round, and update the standing of every client.

        A member whose last upload is older than `MAX_AGE` rounds, or than ``max_members`` others,
        is archived.
        """
        # A round's reports began at the same parameters, and those of other rounds at others. A
        # single client's own update cannot be separated from the common one.
        if len(self.reports) > 1:
            clients = sorted(self.reports)
            reports = torch.stack([self.reports[client] for client in clients])
            for client, halves in zip(clients, centred(reports), strict=True):
                self.of(client).halves = halves
        self.reports = {}
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
        # Without intervals, in the first rounds, ages stand in. Where most clients are gone, ages
        # would archive nobody.
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
