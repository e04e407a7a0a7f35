"""What the server knows of each client, and whose models the others learn from."""

import contextlib
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from pfedgpa_app.state import WriteError, below, under
from pfedgpa_app.vault import MemoryVault, Vault

# Rounds after which others do not learn from a client's last upload any more. Where clients take
# part seldom it is as many times the median member's rounds between its last two uploads.
MAX_AGE = 20
_MAX_INTERVALS = 5
# Of a client in a state, what is a number; -1 stands for None.
_NUMBERS = (
    "in_bank",
    "is_secluded",
    "seen",
    "uploaded",
    "interval",
    "asked",
    "was_asked_again",
    "has_misfits",
    "rounds_onboarded",
)
_FLAGS = ("in_bank", "is_secluded", "was_asked_again", "has_misfits")
_NONE = -1


@dataclass
class ClientRecord:
    """What the server knows of a client.

    Attributes
    ----------
    model
        Its parameters, ``(d,)``, brought up to date: the last upload of a member, what was
        generated for a newcomer. None where there are none, or they are `Bank.retired`.
    upload
        What it uploaded in this round, ``(d,)``, until `Bank.take_in`.
    report
        How two halves of its images moved what all have in common apart, as it told in this round:
        `normalized` sketches ``(2, size)``.
    halves
        The latest of these, `centred` among all that told in the same round.
    in_bank
        Whether the others learn from it.
    is_secluded
        Whether its upload is its model as it is, until it is observed again.
    seen
        The round in which something came from it last.
    uploaded
        The round of its last upload as a member; None before it is one.
    interval
        The rounds between its last two uploads as a member.
    asked
        The round in which it was last asked for its halves.
    was_asked_again
        Whether it was asked before that.
    has_misfits
        Whether the halves that it reported last contradict each other or its own update.
    rounds_onboarded
        The rounds that it had as a newcomer; 0 for members.
    """

    model: Tensor | None = None
    upload: Tensor | None = None
    report: Tensor | None = None
    halves: Tensor | None = None
    in_bank: bool = False
    is_secluded: bool = False
    seen: int = 0
    uploaded: int | None = None
    interval: int | None = None
    asked: int | None = None
    was_asked_again: bool = False
    has_misfits: bool = False
    rounds_onboarded: int = 0


class Bank:
    """The records of all clients.

    Parameters
    ----------
    max_members
        At most so many models, those of the latest uploads, are in the bank, and as many among the
        guests.
    retired
        Where the models of the others are, ``(d,)``. Nothing is done with one until it is asked
        for. In memory by default.
    """

    def __init__(self, max_members: int, retired: Vault | None = None) -> None:
        self.max_members = max_members
        self.retired: Vault = MemoryVault() if retired is None else retired
        self.clients: dict[int, ClientRecord] = {}

    def of(self, client: int) -> ClientRecord:
        """Return the record of a client, a new one if there is none."""
        return self.clients.setdefault(client, ClientRecord())

    @property
    def members(self) -> dict[int, Tensor]:
        """The models ``(d,)`` in the bank, those that the others learn from, sorted by client.

        A member without an upload for more than `MAX_AGE` rounds, or that is secluded, is
        a guest.
        """
        return self._models(in_bank=True)

    @property
    def guests(self) -> dict[int, Tensor]:
        """The other models ``(d,)`` in memory, sorted by client."""
        return self._models(in_bank=False)

    @property
    def has_members(self) -> bool:
        """Whether there was ever an upload of a member."""
        return any(record.uploaded is not None for record in self.clients.values())

    def knows(self, client: int) -> bool:
        """Tell whether there is a model of a client."""
        record = self.clients.get(client)
        return (record is not None and record.model is not None) or client in self.retired

    def put(self, client: int, model: Tensor, server_round: int) -> None:
        """Take in what was generated for a newcomer, ``(d,)``."""
        self._forget_retired(client)
        record = self.of(client)
        record.model, record.seen = model, server_round
        record.rounds_onboarded += 1

    def take_in(self, server_round: int) -> None:
        """Sort the uploads of a round, and the members without an upload for long."""
        num_uploads = 0
        for client, record in self.clients.items():
            if record.upload is None:
                continue
            num_uploads += 1
            self._forget_retired(client)
            if record.uploaded is not None:
                record.interval = server_round - record.uploaded
            record.seen = record.uploaded = server_round
            record.model, record.upload = record.upload, None
        max_age = self._max_age(server_round)
        for record in self.clients.values():
            is_recent = record.uploaded is not None and server_round - record.uploaded <= max_age
            record.in_bank = record.model is not None and is_recent and not record.is_secluded
        for models in (self.members, self.guests):
            self._retire(models, max(self.max_members, num_uploads))

    def state(self) -> dict[str, Tensor]:
        """Return everything but what a round leaves behind, as named tensors.

        Each kind of number is one tensor, ``(num_clients,)``, in the order of ``client``.
        """
        clients = sorted(self.clients)
        records = [self.clients[client] for client in clients]
        tensors = {"client": torch.tensor(clients, dtype=torch.long)}
        for name in _NUMBERS:
            values = [getattr(record, name) for record in records]
            numbers = [_NONE if value is None else int(value) for value in values]
            tensors[name.replace("_", "-")] = torch.tensor(numbers, dtype=torch.long)
        for name in ("model", "halves"):
            vectors = zip(clients, (getattr(record, name) for record in records), strict=True)
            tensors |= under(name, {client: each for client, each in vectors if each is not None})
        return tensors | under("retired", self.retired.state())

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state` returned.

        Raises
        ------
        KeyError
            If it is something else; the records are then as they were.
        ValueError
            If files of retired models are missing or damaged; the same holds.
        """
        clients = {int(client): ClientRecord() for client in tensors["client"]}
        for name in _NUMBERS:
            numbers = tensors[name.replace("_", "-")].tolist()
            for record, number in zip(clients.values(), numbers, strict=True):
                value = bool(number) if name in _FLAGS else number
                setattr(record, name, None if number == _NONE else value)
        for name in ("model", "halves"):
            for client, vector in below(name, tensors).items():
                setattr(clients[int(client)], name, vector)
        self.retired.restore(below("retired", tensors))
        self.clients = clients

    def _models(self, *, in_bank: bool) -> dict[int, Tensor]:
        models = {
            client: record.model
            for client, record in self.clients.items()
            if record.model is not None and record.in_bank is in_bank
        }
        return dict(sorted(models.items()))

    def _max_age(self, server_round: int) -> float:
        """Return how many rounds a member's last upload may be old for others to learn from it."""
        records = self.clients.values()
        ages = [server_round - each.uploaded for each in records if each.uploaded is not None]
        # Ages would let nobody go where most are gone; they are all there is at first.
        intervals = [each.interval for each in records if each.interval is not None] or ages
        usual = statistics.median(intervals) if intervals else 0
        return max(MAX_AGE, _MAX_INTERVALS * usual)

    def _retire(self, models: dict[int, Tensor], most: int) -> None:
        """Put away the models of all but those of the latest uploads."""
        latest = sorted(models, key=lambda client: (-self.clients[client].seen, client))
        for client in latest[most:]:
            with contextlib.suppress(WriteError):  # it stays then, until there is room
                self.retired[client] = models[client]
                record = self.clients[client]
                record.model, record.in_bank = None, False

    def _forget_retired(self, client: int) -> None:
        if client in self.retired:  # pop would read it
            del self.retired[client]
