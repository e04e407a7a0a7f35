"""Warnings of a run that diverges: accuracy that falls, losses that are not finite."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pfedgpa_app.config import Config, ServerConfig
from pfedgpa_app.files import count_of
from pfedgpa_app.rounds import EVALUATED, STANDARD_ERROR, Row, value_of
from pfedgpa_app.runs import BEST, CHECKPOINT

# A fall is one of more than so much, and of so many standard errors of the difference of two
# rounds, in so many evaluated rounds in a row.
_MIN_FALL = 0.05
_STANDARD_ERRORS = 4.0
_ROUNDS = 3

DIVERGED = "Training diverged, or data have such values"


class Fall(NamedTuple):
    """Rounds ``first`` to ``last``, whose accuracies are well below ``before`` in round ``best``.

    ``lowest`` is the lowest of them.
    """

    first: int
    last: int
    best: int
    before: float
    lowest: float


def fall_in(rows: Sequence[Row]) -> Fall | None:
    """Return the latest fall that lasted, of a run's rows in metrics.jsonl; None if none did."""
    latest: Fall | None = None
    best: Row | None = None
    below: list[Row] = []
    for row in rows:
        if row.get(EVALUATED) is None:
            continue
        best = row if is_best(row, best) else best
        assert best is not None
        error = math.hypot(value_of(row, STANDARD_ERROR), value_of(best, STANDARD_ERROR))
        is_below = best[EVALUATED] - row[EVALUATED] > max(_MIN_FALL, _STANDARD_ERRORS * error)
        below = [*below, row] if is_below else []
        if len(below) >= _ROUNDS:
            lowest = min(each[EVALUATED] for each in below)
            first, last = below[0]["round"], below[-1]["round"]
            latest = Fall(first, last, best["round"], best[EVALUATED], lowest)
    return latest


def is_best(row: Row, best: Row | None) -> bool:
    """Return whether an evaluated round is at least as good as the best one before.

    With more clients than in that one the mean is another: it begins anew.
    """
    if best is None or row[EVALUATED] >= best[EVALUATED]:
        return True
    return value_of(row, "num-evaluated") > value_of(best, "num-evaluated")


def best_in(rows: Sequence[Row]) -> Row | None:
    """Return the row of a run's best evaluated round; None if none was evaluated."""
    best: Row | None = None
    for row in rows:
        if row.get(EVALUATED) is not None and is_best(row, best):
            best = row
    return best


def reason_to_end(rows: Sequence[Row], server: ServerConfig, since: int = 0) -> str:
    """Return why a run ends now, by ``stop-at`` or ``patience``; empty if it goes on.

    ``since`` is the round after which it went on from another run, whose patience is over.
    """
    evaluated = [row for row in rows if row.get(EVALUATED) is not None]
    if not evaluated or evaluated[-1] is not rows[-1]:
        return ""
    last, best = evaluated[-1], max(evaluated, key=lambda row: row[EVALUATED])
    if server.stop_at and last[EVALUATED] >= server.stop_at:
        return (
            f"Ended after round {last['round']}, with a personalized accuracy of "
            f"{last[EVALUATED]:.4f}: server.stop-at = {server.stop_at:g}"
        )
    if server.patience and last["round"] - max(best["round"], since) >= server.patience:
        return (
            f"Ended after round {last['round']}, since the best personalized accuracy is that of "
            f"round {best['round']}, {best[EVALUATED]:.4f}: server.patience = {server.patience}"
        )
    return ""


def warnings_in(rows: Sequence[Row], config: Config) -> dict[tuple[str, int], str]:
    """Return what goes wrong in a run, by its rows in metrics.jsonl, and what may help.

    That is a sentence each, by what it is of and the round in which that began.
    """
    warnings = {}
    if fall := fall_in(rows):
        warnings["fall", fall.first] = (
            f"Personalized accuracy fell: {fall.before:.4f} in round {fall.best}, then down to "
            f"{fall.lowest:.4f} in rounds {fall.first} to {fall.last}. {help_of(config)}"
        )
    if not_finite := [row for row in rows if value_of(row, "num-not-finite")]:
        most = max(int(value_of(row, "num-not-finite")) for row in not_finite)
        warnings["not finite", not_finite[0]["round"]] = (
            f"In {len(not_finite)} of {count_of(len(rows), 'round')}, from round "
            f"{not_finite[0]['round']} on, losses or weights of up to {count_of(most, 'client')} "
            f"were not finite (NaN or inf, or huge). {DIVERGED}. {help_of(config)}"
        )
    return warnings


def best_kept(path: Path, name: str) -> str:
    """Return how to go on from the checkpoint of a run's best round; nothing if there is none."""
    if not (path / BEST / CHECKPOINT).exists():
        return ""
    return (
        f'. The checkpoint of the best round is kept: resume-from="{name}/{BEST}" goes on from it'
    )


def help_of(config: Config) -> str:
    """Return what may help where training diverges."""
    rate = config.client.learning_rate
    steps = [f"a smaller client.learning-rate (here {rate:g}) or fewer client.local-epochs"]
    if config.server.momentum:
        steps.append(f"server.momentum = 0 (here {config.server.momentum:g})")
    if config.strategy == "pfedgpa" and config.diffusion.denoise:
        steps.append("diffusion.denoise = false")
    return f"What may help: {', '.join(steps)}"
