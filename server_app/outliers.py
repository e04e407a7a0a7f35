"""Uploads that fit the model and would outweigh all others."""

import math
import statistics
from collections.abc import Collection, Mapping

from torch import Tensor

from pfedgpa_app.parameters import StateDict
from server_app.replies import Upload

# Amounts of data and lengths of updates differ between clients, but not by orders of magnitude.
MAX_RATIO = 1000
# A limit for extras where most are zero.
MIN_SIZE = 1e-6


def outliers(
    uploads: Mapping[int, Upload], average: StateDict, extras: Collection[str]
) -> dict[int, str]:
    """Return the clients that would outweigh all others in any average, with the reason.

    These moved more than `MAX_RATIO` times as far as the median client, or have an extra tensor,
    one of ``extras``, that is so many times as long as the median client's.
    """
    if len(uploads) < 3:
        return {}
    layout = next(iter(uploads.values())).layout
    skipped = layout.fixed.keys() | layout.unbounded.keys()  # infinite differences say nothing

    def length(state: StateDict, start: StateDict | None = None) -> float:
        return math.hypot(
            *(
                _norm(tensor.double() - (start[name].double() if start else 0))
                for name, tensor in state.items()
                if name not in skipped and tensor.is_floating_point()
            )
        )

    moves = {client: length(upload.state, upload.sent) for client, upload in uploads.items()}
    # Where most do not move at all, the length of the average is the measure.
    median_move = statistics.median(moves.values()) or length(average)
    reasons = {
        client: f"its parameters moved by {move:.3g}, more than {MAX_RATIO} times as far as the "
        "median client's"
        for client, move in moves.items()
        if move > MAX_RATIO * median_move
    }
    for name in extras:
        sizes = {client: _norm(upload.extras[name]) for client, upload in uploads.items()}
        limit = MAX_RATIO * max(statistics.median(sizes.values()), MIN_SIZE)
        reasons |= {
            client: f'"{name}" has the length {size:.3g}, more than {MAX_RATIO} times the median '
            "client's"
            for client, size in sizes.items()
            if size > limit
        }
    return reasons


def _norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())
