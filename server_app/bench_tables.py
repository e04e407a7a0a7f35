"""The results of a bench: tables, their index and the figure."""

from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from pfedgpa_app.figures import BANDS, Curve, draw_curves, draw_dots
from pfedgpa_app.rounds import JUDGED, mean_and_spread
from pfedgpa_app.tables import INDEX_KIND, Cell, Table, compare, partial_cell
from server_app.suites import BenchRun, Result, Suite


def tables(
    suite: Suite, runs: list[BenchRun], folder: Path, name: str, command: str
) -> list[Table]:
    """Return the tables of a suite: accuracies, further measures and rounds to targets.

    The first is called ``name``, which prefixes the names of the others; ``command`` made them.
    """
    results = _results(runs, folder)
    found = [result for each in results.values() for result in each.values()]
    rounds = {run.config.num_server_rounds for run in runs}
    last = suite.evaluated_rounds
    period = "last round" if last == 1 else f"mean of the last {last} rounds"
    if suite.horizons:
        period += " up to the column's"
    elif len(rounds) == 1:
        period += f" of {rounds.pop()}"
    note = (
        f"Accuracy of everyone's personalized model on its own test set, {period}; mean ± standard "
        f"deviation over seeds {', '.join(map(str, suite.seeds))}. Marked: the best, and what "
        "a paired t-test over seeds and clients does not distinguish from it (5 %). Clients of a "
        "seed are not independent, so unmarked ones may still be as good on other seeds."
    )
    source = (
        f"{len(found)} of {len(runs)} runs, {sum(each['seconds'] for each in found):.0f} seconds "
        f"of computing: {command}"
    )
    if failures := sum(row["num-failures"] for each in found for row in each["rounds"]):
        note += f" ({failures} unusable replies)"
    compared = {
        column: compare(
            {
                row: {
                    seed: _per_client(result["accuracies"][evaluated_rounds])
                    for seed, result in results[case, row].items()
                }
                for row in suite.rows
            },
            len(suite.seeds),
        )
        for column, (case, evaluated_rounds) in suite.columns.items()
    }
    made = [
        _table(
            suite,
            suite.title,
            [*suite.columns],
            lambda column, row: compared[column][row],
            note,
            name,
            source,
        )
    ]
    for measure in suite.measures:

        def mean(column: str, row: str, measure: str = measure) -> Cell:
            case, evaluated_rounds = suite.columns[column]
            each = results[case, row].values()
            means = [
                fmean(r[measure] for r in result["rounds"][evaluated_rounds]) for result in each
            ]
            text = mean_and_spread(means, 0 if measure.startswith("bytes") else 4)
            return partial_cell(Cell(text, values=means), len(suite.seeds))

        title, what = f"{suite.title}: {measure}", f"A round, {period}."
        if measure == "bytes-down":
            what += " Models sent for evaluation are included."
        called = f"{name}-{measure}"
        made.append(_table(suite, title, [*suite.columns], mean, what, called))
    for target in suite.targets:

        def reached(case: str, row: str, target: float = target) -> Cell:
            cell = Cell(_to_target(list(results[case, row].values()), target))
            return cell if len(results[case, row]) == len(suite.seeds) else Cell("failed")

        note = (
            "Rounds / megabytes up and down, models sent for evaluation included / server seconds "
            "of learning until the mean accuracy is reached, mean over seeds; a dash if a seed "
            "never reaches it."
        )
        title, called = f"{suite.title}: until {target}", f"{name}-until-{target}"
        made.append(_table(suite, title, [*suite.cases], reached, note, called))
    return made


def index_of(suite: Suite, runs: list[BenchRun], folder: Path, found: list[Table]) -> Result:
    """Return the index of a bench for `pfedgpa report`: its tables and its result files."""
    files = [
        {
            "case": run.case,
            "row": run.row,
            "seed": run.config.seed,
            "file": str(run.file(folder).relative_to(folder)),
        }
        for run in runs
    ]
    tables = [table.facts() for table in found]
    return {"kind": INDEX_KIND, "title": suite.title, "tables": tables, "runs": files}


def _results(runs: list[BenchRun], folder: Path) -> dict[tuple[str, str], dict[int, Result]]:
    """Return the finished results, by case and row and then by seed."""
    results: dict[tuple[str, str], dict[int, Result]] = {}
    for run in runs:
        seeds = results.setdefault((run.case, run.row), {})
        if (result := run.result(folder)) is not None:
            seeds[run.config.seed] = result
    return results


def _table(
    suite: Suite,
    title: str,
    columns: list[str],
    cell: Callable[[str, str], Cell],
    note: str,
    name: str,
    source: str = "",
) -> Table:
    rows = {row: [cell(column, row) for column in columns] for row in suite.rows}
    return Table(title, [column or "all" for column in columns], rows, note, name, source)


def _per_client(rounds: list[dict[str, float]]) -> dict[int, float]:
    """Return each client's mean accuracy over rounds."""
    return {int(client): fmean(each[client] for each in rounds) for client in rounds[0]}


def _to_target(results: list[Result], target: float) -> str:
    reached = [list(_until(result["rounds"], target)) for result in results]
    if not reached or any(rows[-1][JUDGED] < target for rows in reached):
        return "-"
    rounds = fmean(len(rows) for rows in reached)
    up_and_down = (sum(row["bytes-up"] + row["bytes-down"] for row in rows) for rows in reached)
    seconds = (sum(row["seconds-diffusion"] for row in rows) for rows in reached)
    return f"{rounds:.1f} / {fmean(up_and_down) / 1e6:.1f} / {fmean(seconds):.1f}"


def _until(rows: list[dict[str, Any]], target: float) -> Iterator[dict[str, Any]]:
    for row in rows:
        yield row
        if row[JUDGED] >= target:
            return


def draw(suite: Suite, runs: list[BenchRun], folder: Path, file: Path) -> None:
    """Draw every run's accuracy, or its curve, one panel per case, as PNG and SVG.

    Raises
    ------
    OSError
        If they cannot be written.
    """
    if suite.curve:
        draw_curves(file, curves(suite, runs, folder), suite.title, BANDS)
        return
    results, last = _results(runs, folder), slice(-suite.evaluated_rounds, None)

    def over_seeds(case: str, row: str) -> list[float]:
        found = results[case, row].values()
        return [fmean(_per_client(each["accuracies"][last]).values()) for each in found]

    panels = {case: {row: over_seeds(case, row) for row in suite.rows} for case in suite.cases}
    draw_dots(file, panels, suite.title)


def curves(suite: Suite, runs: list[BenchRun], folder: Path) -> dict[str, list[Curve]]:
    """Return the accuracies over rounds of each row that has a result, by case."""
    found: dict[str, list[Curve]] = {case: [] for case in suite.cases}
    for (case, row), results in _results(runs, folder).items():
        if repeats := [[each[JUDGED] for each in result["rounds"]] for result in results.values()]:
            found[case].append(Curve.over(row, range(1, len(repeats[0]) + 1), repeats))
    return found
