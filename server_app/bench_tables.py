"""The results of a bench: tables, their index and the figure."""

from pathlib import Path
from statistics import fmean
from typing import Any

from pfedgpa_app.figures import BANDS, Curve, draw_curves, draw_dots
from pfedgpa_app.files import count_of
from pfedgpa_app.rounds import EVALUATED, RECALL, SCORES, mean_and_spread
from pfedgpa_app.tables import INDEX_KIND, Cell, Table, compare, partial_cell
from server_app.bench import BenchRun, Result
from server_app.suites import Suite, described

Results = dict[tuple[str, str], dict[int, Result]]
"""The finished results, by case and row and then by seed."""


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
    failures = sum(row["num-failures"] for each in found for row in each["rounds"])
    unused = f" ({failures} unusable {'reply' if failures == 1 else 'replies'})" if failures else ""
    commits = {each.get("versions", {}).get("commit", "") for each in found}
    commit = commits.pop() if len(commits) == 1 else "several" if commits else ""
    source = (
        command
        if len(found) == len(runs)
        else f"{len(found)} of {count_of(len(runs), 'run')}: {command}"
    )

    def table(what: str, columns: dict[str, dict[str, Cell]], note: str, suffix: str) -> Table:
        rows = {row: [cells[row] for cells in columns.values()] for row in suite.rows}
        titles = [column or "all" for column in columns]
        title = f"{suite.title}: {what}" if what else suite.title
        called = f"{name}-{suffix}" if suffix else name
        return Table(title, titles, rows, note, called, source, commit)

    made = []
    for measure in suite.measures if EVALUATED in suite.measures else [EVALUATED, *suite.measures]:
        columns = {column: _column(suite, results, measure, column) for column in suite.columns}
        what = _in_words(measure, runs)
        note = _note(suite, measure, what, period)
        if measure == EVALUATED:
            made.append(table("", columns, note + unused, ""))
        else:
            made.append(table(what or measure, columns, note, measure))
    if suite.cells:
        columns = {
            case: {row: Cell(described(of_case.get(row, {})) or "-") for row in suite.rows}
            for case, of_case in suite.cells.items()
        }
        note = "Settings of single cells, on top of those of their row and column."
        made.append(table("settings", columns, note, "settings"))
    note = (
        "Rounds / megabytes up and down, models sent for evaluation included / server seconds of "
        "learning until the mean accuracy is reached, mean over seeds; a dash if a seed never "
        "reaches it."
    )
    for target in suite.targets:
        columns = {
            case: {row: _to_target(suite, results[case, row], target) for row in suite.rows}
            for case in suite.cases
        }
        made.append(table(f"until {target}", columns, note, f"until-{target}"))
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
    tables = [table.as_json() for table in found]
    return {"kind": INDEX_KIND, "title": suite.title, "tables": tables, "runs": files}


def _results(runs: list[BenchRun], folder: Path) -> Results:
    results: Results = {}
    for run in runs:
        seeds = results.setdefault((run.case, run.row), {})
        if (result := run.result(folder)) is not None:
            seeds[run.config.seed] = result
    return results


def _column(suite: Suite, results: Results, measure: str, column: str) -> dict[str, Cell]:
    """Return the cells of a measure in a column, compared if it is one of each client."""
    case, evaluated = suite.columns[column]
    if measure in SCORES or RECALL.fullmatch(measure):
        by_row = {}
        for row in suite.rows:
            seeds = {
                seed: _per_client(_scores(result, measure)[evaluated])
                for seed, result in results[case, row].items()
            }
            by_row[row] = {seed: values for seed, values in seeds.items() if values}
        is_error = measure.endswith("-error")
        cells = compare(by_row, len(suite.seeds), is_lower_better=is_error)
    else:
        cells, digits = {}, 0 if measure.startswith("bytes") else 4
        for row in suite.rows:
            rounds = [result["rounds"][evaluated] for result in results[case, row].values()]
            known = [[r[measure] for r in each if r.get(measure) is not None] for each in rounds]
            means = [fmean(each) for each in known if each]
            cell = Cell(mean_and_spread(means, digits), values=means)
            cells[row] = partial_cell(cell, len(suite.seeds))
    # What a finished run does not have is no failure of it.
    return {
        row: Cell("-") if results[case, row] and not cell.values else cell
        for row, cell in cells.items()
    }


def _in_words(measure: str, runs: list[BenchRun]) -> str:
    """Return what a measure of each client is called, empty of others."""
    if (found := RECALL.fullmatch(measure)) is None:
        return SCORES.get(measure, "")
    classes, number = runs[0].config.data.classes, int(found[1])
    return f"recall of class {classes[number] if number < len(classes) else number}"


def _note(suite: Suite, measure: str, what: str, period: str) -> str:
    seeds = ", ".join(map(str, suite.seeds))
    is_one = len(suite.seeds) == 1
    over = f"seed {seeds}" if is_one else f"mean ± standard deviation over seeds {seeds}"
    if not what:
        sent = " Models that are sent to be evaluated are counted in."
        return f"Of a round, {period}; {over}.{sent if measure == 'bytes-down' else ''}"
    left_out = "" if measure == EVALUATED else " Clients for which it is not defined are left out."
    return (
        f"{what[0].upper()}{what[1:]} of each client's personalized model on its own test set, "
        f"{period}; {over}.{left_out}"
    )


def _scores(result: Result, measure: str) -> list[dict[str, float]]:
    """Return a measure of each client in the evaluated rounds; of older versions nothing."""
    found: list[dict[str, float]] = (
        result["accuracies"] if measure == EVALUATED else result.get("scores", {}).get(measure, [])
    )
    return found


def _per_client(rounds: list[dict[str, float]]) -> dict[int, float]:
    """Return each client's mean over rounds, of those that have a value in all of them."""
    both = set.intersection(*map(set, rounds)) if rounds else set()
    return {int(c): fmean(each[c] for each in rounds) for c in sorted(both, key=int)}


def _to_target(suite: Suite, results: dict[int, Result], target: float) -> Cell:
    if len(results) < len(suite.seeds):
        return Cell("failed")
    reached: list[list[dict[str, Any]]] = []
    for result in results.values():
        rows = result["rounds"]
        ends = [number for number, row in enumerate(rows, 1) if row[EVALUATED] >= target]
        if not ends:
            return Cell("-")
        reached.append(rows[: ends[0]])
    rounds = fmean(map(len, reached))
    up_and_down = (sum(row["bytes-up"] + row["bytes-down"] for row in rows) for rows in reached)
    seconds = (sum(row["seconds-diffusion"] for row in rows) for rows in reached)
    return Cell(f"{rounds:.1f} / {fmean(up_and_down) / 1e6:.1f} / {fmean(seconds):.1f}")


def draw(suite: Suite, runs: list[BenchRun], folder: Path, file: Path) -> None:
    """Draw every run's accuracy, or its curve, one panel per case, as PNG and SVG.

    Raises `OSError` if they cannot be written.
    """
    if suite.curve:
        draw_curves(file, curves(suite, runs, folder), suite.title, BANDS)
        return
    panels: dict[str, dict[str, list[float]]] = {case: {} for case in suite.cases}
    for (case, row), results in _results(runs, folder).items():
        evaluated = [each["accuracies"][-suite.evaluated_rounds :] for each in results.values()]
        panels[case][row] = [fmean(_per_client(rounds).values()) for rounds in evaluated]
    draw_dots(file, panels, suite.title)


def curves(suite: Suite, runs: list[BenchRun], folder: Path) -> dict[str, list[Curve]]:
    """Return the accuracies over rounds of each row that has a result, by case."""
    found: dict[str, list[Curve]] = {case: [] for case in suite.cases}
    for (case, row), results in _results(runs, folder).items():
        if repeats := [
            [each[EVALUATED] for each in result["rounds"]] for result in results.values()
        ]:
            found[case].append(Curve.over(row, range(1, len(repeats[0]) + 1), repeats))
    return found
