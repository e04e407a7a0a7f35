"""Detection of outliers: clients of a round that the others should not learn from.

Clients are compared by their updates, not by what they learned: one with other data than all
others still moves about as far as they do, and not against them. The limits follow from the median
client and the spread about it, which malicious clients cannot set as long as they are less than
half.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pfedgpa_app.diffusion.signal import SKETCH, sketched
from pfedgpa_app.parameters import ParameterLayout, StateDict
from pfedgpa_app.stateful import Kept, Stateful

MIN_CLIENTS = 4
"""Fewer cannot be compared: the median would be one of two or three, any of which may lie."""
FEW = 10
"""In rounds with fewer clients, these are compared with what is remembered of others as well."""
MEMORY = 20
"""Of so many clients, those that took part last, it is remembered how they moved."""

# Ratios to the median client that are always allowed; docs/attacks.md says how they were chosen. In
# a single tensor honest clients differ more.
_MAX_RATIO = 2.0
_MAX_TENSOR_RATIO = 5.0
# The same in standard deviations, where clients differ more.
_MAX_DEVIATIONS = 4.0
# Changes of a tensor below this part of the median move are no changes.
_NO_CHANGE = 1e-3
# Least median cosine for a common direction of the updates, and how far against it a client may go,
# as a part of that cosine: a small group may have nothing of it.
_MIN_COSINE = 0.2
_MAX_AGAINST = 0.5
# Standard deviation of a normal distribution in units of its median absolute deviation.
_DEVIATIONS_PER_MAD = 1.4826


class Move(NamedTuple):
    """A client's update: the difference between its upload and what it was sent."""

    names: tuple[str, ...]
    """Of the tensors, those that are generated first."""
    generated: Tensor
    """The change of the generated parameters, ``(d,)``."""
    averaged: Tensor
    """That of what is averaged and not a whole number, ``(k,)``; statistics among it."""
    sizes: Tensor
    """Length of the generated part, then of each tensor's change its length and its largest entry,
    float64, ``(1 + 2 * num_tensors,)``."""

    @classmethod
    def of(cls, layout: ParameterLayout, sent: StateDict, state: StateDict) -> "Move":
        """Return the update from a state_dict that was ``sent`` to an uploaded one."""
        generated = layout.split(state)[0] - layout.split(sent)[0]
        skipped = layout.fixed.keys() | layout.unbounded.keys()
        rest = {
            name: (tensor.double() - sent[name].double()).flatten().float()
            for name, tensor in layout.rest(state).items()
            if tensor.is_floating_point() and tensor.numel() and name not in skipped
        }
        pieces = [*generated.split([entry.numel for entry in layout.generated]), *rest.values()]
        sizes = [generated.double().norm()]
        for piece in pieces:
            sizes += [piece.double().norm(), piece.abs().max().double()]
        names = (*(entry.name for entry in layout.generated), *rest)
        averaged = torch.cat([torch.empty(0), *rest.values()])
        return cls(names, generated, averaged, torch.stack(sizes))

    @property
    def parts(self) -> list[Tensor]:
        """The generated and the averaged part, without empty ones."""
        return [part for part in (self.generated, self.averaged) if part.numel()]

    def summary(self) -> Tensor:
        """Return its sizes and the `sketched` directions of its parts, float64."""
        return torch.cat([self.sizes, *(sketched(part).double() for part in self.parts)])


class Guard(Stateful):
    """Finds outliers, and remembers the updates of the other clients."""

    memory: Kept[dict[int, Tensor]]
    """`Move.summary` of clients that were no outliers, the latest last."""

    def __init__(self) -> None:
        self.memory = {}
        self.num_compared = 0  # in the last round

    def find_outliers(
        self,
        moves: Mapping[int, Move],
        positions: Mapping[int, Tensor],
        initial: Tensor,
        num_connected: int,
    ) -> dict[int, str]:
        """Return which clients of a round are outliers, and why, and remember the others.

        These are those that moved much farther in this round than the median client, in all or in
        one tensor, that have come much farther from the ``initial`` parameters ``(d,)``, or that
        moved against the others where these have a direction in common. Where fewer than `FEW`
        took part, absent clients of the memory are compared with them. Where that is not enough to
        compare anybody, all are unusual if at least `FEW` could take part (``num_connected``), and
        none elsewhere. ``positions`` are the generated parameters ``(d,)`` of absent clients too.
        """
        summaries = {c: move.summary() for c, move in moves.items()} if len(moves) < FEW else {}
        absent = [c for c in self.memory if summaries and c in positions and c not in moves]
        clients = [*moves, *absent]
        self.num_compared = len(clients)
        reasons: dict[int, str] = {}
        if len(clients) >= MIN_CLIENTS:
            sizes = torch.stack([move.sizes for move in moves.values()])
            directions = list(zip(*(move.parts for move in moves.values()), strict=True))
            if absent:
                rows = torch.stack([*summaries.values(), *(self.memory[c] for c in absent)])
                sizes, sketches = rows[:, : sizes.shape[1]], rows[:, sizes.shape[1] :]
                directions = [part.unbind() for part in sketches.split(SKETCH, dim=1)]
            ways = torch.stack([(positions[c] - initial).double().norm() for c in clients])
            # Their positions are of earlier rounds: by now they would be about a move farther.
            ways[len(moves) :] += sizes[:, 0].median()
            names = next(iter(moves.values())).names
            found = outliers_of(sizes, ways, directions, names)
            reasons = {c: found[row] for row, c in enumerate(moves) if row in found}
        for client in summaries.keys() - reasons.keys():
            self.memory.pop(client, None)
            self.memory[client] = summaries[client]
        for client in list(self.memory)[:-MEMORY]:
            del self.memory[client]
        if len(clients) < MIN_CLIENTS and num_connected >= FEW:
            why = f"only {len(clients)} are known, and it takes {MIN_CLIENTS} to compare them"
            reasons = dict.fromkeys(moves, why)
        return reasons


def outliers_of(
    sizes: Tensor, ways: Tensor, directions: Sequence[Sequence[Tensor]], names: Sequence[str]
) -> dict[int, str]:
    """Return which clients are outliers, by their place, and why; see `Guard.find_outliers`.

    ``sizes`` are `Move.sizes`, ``(n, 1 + 2 * num_tensors)``, with the tensors' ``names``, ``ways``
    the distances from the initial parameters, ``(n,)``, and ``directions``, for each part of the
    model, the clients' moves ``(d,)`` or sketches of them.
    """
    reasons: dict[int, str] = {}
    for moves in directions:
        reasons |= _against(cosines_with_others(moves), "its move with the others'", _MAX_AGAINST)
    whole, *tensors = sizes.clamp(min=_NO_CHANGE * float(sizes[:, 0].median())).unbind(dim=1)
    compared = [
        (f"changed {name}", column, _MAX_TENSOR_RATIO)
        for name, pair in zip(names, zip(tensors[::2], tensors[1::2], strict=True), strict=True)
        for column in pair
    ]
    for what, column, ratio in (
        *compared,
        ("came", ways, _MAX_RATIO),
        ("moved", whole, _MAX_RATIO),
    ):
        if column.median() > 0:
            for row in _beyond(column.log(), math.log(ratio)):
                times = column[row] / column.median()
                reasons[row] = f"it {what} {times:.3g} times as far as the median client"
    return reasons


def misfits(halves: Sequence[Tensor], moves: Sequence[Tensor]) -> dict[int, str]:
    """Return which clients reported halves that contradict each other or their update, and why.

    Updates on both halves of an honest client's examples, and on all of them, have similar
    directions at first. ``halves`` are the reports, not `centred`, ``(2, SKETCH)``, ``moves`` the
    `sketched` updates of the uploads, ``(SKETCH,)``.
    """
    if len(halves) < MIN_CLIENTS:
        return {}
    pairs = [half.double().unbind() for half in halves]
    cosine = partial(functional.cosine_similarity, dim=0)
    each_other = torch.stack([cosine(one, other) for one, other in pairs])
    own = torch.stack(
        [cosine(one + other, m.double()) for (one, other), m in zip(pairs, moves, strict=True)]
    )
    return _against(own, "its halves with its move") | _against(each_other, "its halves")


def _against(cosines: Tensor, whose: str, most: float = 0.0) -> dict[int, str]:
    """Return the clients whose cosine ``(n,)`` is below zero where the median is clearly above.

    ``most`` is how far below is allowed, as a part of the median.
    """
    usual = float(cosines.median())
    if usual < _MIN_COSINE:
        return {}
    return {
        row: f"the cosine of {whose} is {cosines[row]:.2f}, that of the median client's {usual:.2f}"
        for row in _beyond(-cosines, (1 + most) * usual)
        if cosines[row] < 0  # the two in the middle of few may be far apart
    }


def cosines_with_others(moves: Sequence[Tensor]) -> Tensor:
    """Return the cosine of each update ``(d,)`` with the mean direction of the others, ``(n,)``.

    Each of the others counts the same, whatever its length. An update of zero has 0.
    """
    total = torch.zeros_like(moves[0], dtype=torch.float64)
    for move in moves:
        total += functional.normalize(move.double(), dim=0)
    cosines = []
    for move in moves:  # once more, so that the float64 copies are not all in memory
        unit = functional.normalize(move.double(), dim=0)
        cosines.append(functional.cosine_similarity(unit, total - unit, dim=0))
    return torch.stack(cosines)


def _beyond(values: Tensor, margin: float) -> list[int]:
    """Return the places of the values ``(n,)`` that are far above their median."""
    above = values - values.median()
    spread = _DEVIATIONS_PER_MAD * above.abs().median()
    limit = torch.clamp(_MAX_DEVIATIONS * spread, min=margin)
    return [int(row) for row in (above > limit).nonzero()]
