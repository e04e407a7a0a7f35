"""Uploads that fit the model and would outweigh all others."""

import math
import statistics
from collections.abc import Collection, Mapping

from torch import Tensor

from pfedgpa_app.parameters import StateDict
from server_app.replies import Upload

# Clients differ in how much data they have and how far they move, but not by orders of magnitude.
MAX_RATIO = 1000
# Where most send zeros beside the parameters, what is not far from them is allowed.
MIN_SIZE = 1e-6


def outliers(
    uploads: Mapping[int, Upload], average: StateDict, extras: Collection[str]
) -> dict[int, str]:
    """Return who moved absurdly farther than the median client, and by how much.

    A single one would outweigh all others in any average and in any principal component. The
    tensors called ``extras``, which all send beside the parameters, must not be absurdly larger
    than the median client's either.
    """
    if len(uploads) < 3:
        return {}
    layout = next(iter(uploads.values())).layout
    skipped = layout.fixed.keys() | layout.unbounded.keys()  # infinite differences say nothing

    def distance(left: StateDict, right: StateDict | None = None) -> float:
        compared = {name: tensor for name, tensor in left.items() if name not in skipped}
        return _distance(compared, right)

    moves = {client: distance(upload.state, upload.sent) for client, upload in uploads.items()}
    # Where most do not move at all, parameters as long as the average are the measure.
    median_move = statistics.median(moves.values()) or distance(average)
    reasons = {}
    for client, move in moves.items():
        if move > MAX_RATIO * median_move:
            reasons[client] = (
                f"its parameters moved by {move:.3g}, more than {MAX_RATIO} times as far as the "
                "median client's"
            )
    for name in extras:
        sizes = {client: _norm(upload.extras[name]) for client, upload in uploads.items()}
        median_size = statistics.median(sizes.values())
        for client, size in sizes.items():
            if size > MAX_RATIO * max(median_size, MIN_SIZE):
                reasons[client] = (
                    f'"{name}" has the length {size:.3g}, more than {MAX_RATIO} times the median '
                    "client's"
                )
    return reasons


def _distance(left: StateDict, right: StateDict | None = None) -> float:
    """Return the Euclidean distance of two states, or of one from zero, without what is counted."""
    norms = [
        _norm(tensor.double() - (right[name].double() if right else 0))
        for name, tensor in left.items()
        if tensor.is_floating_point()
    ]
    return math.hypot(*norms)


def _norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())
