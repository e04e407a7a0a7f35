"""Who of a round is unusual, so that the others should not learn from it.

Clients are judged by how they moved, not by what they learned: those with other data than all
others still move about as far as they do, and not against them. The median client says what is
usual, and the spread about it how far one may be from that: those who lie cannot decide it as long
as they are less than half.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

MIN_CLIENTS = 4
"""Fewer are not judged: the median would be one of two or three, any of which may lie."""

# How far a client may always be from the median one: docs/attacks.md says how it was chosen.
_MAX_RATIO = 2.0
# The same in standard deviations, where clients differ more.
_MAX_DEVIATIONS = 4.0
# Median cosine of the moves, at least, for there to be a direction that all have in common; and
# how far against it a client may go, as a part of it: a small group may have nothing of it.
_MIN_COSINE = 0.2
_MAX_AGAINST = 0.5
# Standard deviation of a normal distribution in units of its median absolute deviation.
_DEVIATIONS_PER_MAD = 1.4826


def unusual(
    moves: Sequence[Tensor], positions: Sequence[Tensor], initial: Tensor
) -> dict[int, str]:
    """Return which clients are unusual, by their place, and why.

    These are those that moved much farther in this round than the median client, that have come
    much farther from the ``initial`` parameters ``(d,)``, or who moved against the others where
    these have a direction in common.

    Parameters
    ----------
    moves
        By how much each client changed its parameters in this round, ``(d,)``.
    positions
        What they became, ``(d,)``.
    """
    if len(moves) < MIN_CLIENTS:
        return {}
    lengths = torch.stack([move.double().norm() for move in moves])
    ways = torch.stack([(position - initial).double().norm() for position in positions])
    cosines = cosines_with_others(moves)
    reasons = {}
    usual = float(cosines.median())
    if usual >= _MIN_COSINE:
        for row in _beyond(-cosines, (1 + _MAX_AGAINST) * usual):
            reasons[row] = (
                f"the cosine of its move with the others' is {cosines[row]:.2f}, that of the "
                f"median client's {usual:.2f}"
            )
    for what, sizes in (("came", ways), ("moved", lengths)):
        if sizes.median() > 0:
            logs = sizes.log()
            for row in _beyond(logs, math.log(_MAX_RATIO)):
                ratio = sizes[row] / sizes.median()
                reasons[row] = f"it {what} {ratio:.3g} times as far as the median client"
    return reasons


def cosines_with_others(moves: Sequence[Tensor]) -> Tensor:
    """Return the cosine of each move ``(d,)`` with the mean direction of the others, ``(n,)``.

    Each of the others counts as much, however far it moved. Who did not move has 0.
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
