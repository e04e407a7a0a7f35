"""Tuning: the settings of each row of a suite that are best on other seeds than the published."""

from collections.abc import Callable, Mapping
from itertools import product
from math import inf
from pathlib import Path
from statistics import fmean
from typing import Any

from pfedgpa_app.config import flatten
from server_app.bench import BenchRun
from server_app.suites import Settings, Suite, SuiteError, Tune, described

Chosen = dict[tuple[str, str], Settings]
"""Settings by case and row."""
Grid = Mapping[str, list[Any]]


def search(suite: Suite, folder: Path, execute: Callable[[list[BenchRun]], object]) -> Chosen:
    """Return the best settings of every row, found on the seeds of ``[tune]``.

    First all points of the common grid are tried, then, at the best of them, those of a row's own
    grid. The best has the highest mean accuracy over the seeds; a point with a failed run is out.
    ``execute`` does runs whose results are to be in ``folder``. Raises `SuiteError` if the suite
    has no ``[tune]``, settings are wrong, or all points of a row failed.
    """
    if suite.tune is None:
        raise SuiteError(
            "there is no [tune] section; right would be, for example,\n[tune]\nseeds = [100, 101]\n"
            "[tune.grid]\nclient.learning-rate = [0.01, 0.03, 0.1]"
        )
    tune = suite.tune
    found: Chosen = {cell: {} for cell in product(suite.cases, suite.rows)}
    own = {row: dict(flatten(tune.rows[row])) for row in suite.rows if row in tune.rows}
    common = {row: dict(flatten(tune.grid)) for row in suite.rows}
    for grids in (common, own):
        points = {
            f"{row}; {described(point)}": (row, point)
            for row, grid in grids.items()
            for point in _points(grid)
        }
        runs = _trials(suite, tune, points, found).runs() if points else []
        execute(runs)
        scores: dict[tuple[str, str], list[float]] = {}
        for run in runs:
            result = run.result(folder)
            rounds = [] if result is None else result["accuracies"]
            score = fmean(fmean(each.values()) for each in rounds) if rounds else -inf
            scores.setdefault((run.case, run.row), []).append(score)
        for case, row in product(suite.cases, grids):
            means = {
                name: fmean(scores[case, name]) for name, (of, _) in points.items() if of == row
            }
            name = max(means, key=means.__getitem__)
            if means[name] == -inf:
                raise SuiteError(f"{row}: all runs of its tuning failed")
            found[case, row] = found[case, row] | points[name][1]
    return found


def with_tuned(suite: Suite, found: Chosen) -> Suite:
    """Return the suite with two columns for each case: as published, and with settings found."""
    cases: dict[str, Settings] = {}
    cells = {}
    for case, settings in suite.cases.items():
        tuned = f"{case}, tuned" if case else "tuned"
        cases |= {case or "as published": settings, tuned: settings}
        cells[tuned] = {row: found[case, row] for row in suite.rows}
    return suite.model_copy(update={"cases": cases, "cells": cells})


def _trials(
    suite: Suite, tune: Tune, points: Mapping[str, tuple[str, Settings]], found: Chosen
) -> Suite:
    cells = {
        case: {name: found[case, row] | point for name, (row, point) in points.items()}
        for case in suite.cases
    }
    rows = {name: suite.rows[row] for name, (row, _) in points.items()}
    fixed = {"curve": False, "horizons": [], "targets": []}
    changed = {"seeds": tune.seeds, "rows": rows, "cells": cells}
    return suite.model_copy(update=fixed | changed)


def _points(grid: Grid) -> list[Settings]:
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
