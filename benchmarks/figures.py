"""Draws the figures of README and documents, as PNG and SVG, from the numbers of their tables.

    pfedgpa bench conf/suites/first-run.toml    # curves over rounds are not in docs/results
    python -m benchmarks.figures

Without the first command's results, in ``bench``, docs/first-run.png is left as it is.
"""

import csv
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import typer

from pfedgpa_app.figures import BANDS, Curve, draw_curves, draw_dots
from server_app.bench_tables import curves
from server_app.suites import Suite

DOCS = Path("docs")
SUITE = Path("conf/suites/first-run.toml")

Panels = dict[str, dict[str, list[float]]]
"""The values of the seeds, by column and row."""


def main(bench: Path = Path("build/bench/first-run")) -> None:
    """Draw all figures with available numbers."""
    draw_first_run(bench)
    draw_strategies()
    draw_shifts()
    draw_horizons()
    draw_onboarding()


def draw_first_run(bench: Path) -> None:
    """Draw four strategies over rounds, where averaging hurts and where it helps."""
    suite = Suite.read(SUITE)
    runs = suite.runs()
    if any(run.result(bench) is None for run in runs):
        print(f"first-run: {bench} does not have all runs; right would be pfedgpa bench {SUITE}")
        return
    found = curves(suite, runs, bench)
    titles = {
        "30 images, groups apart": "Groups with different digits",
        "50 images, groups alike": "Groups that are nearly alike",
    }
    shown = {
        "pfedgpa": "pFedGPA",
        "fedavg-ft": "FedAvg, fine-tuned",
        "fedavg": "FedAvg",
        "local": "local training",
    }
    panels = {}
    for case, title in titles.items():
        by_row = {curve.name: curve for curve in found[case]}
        panels[title] = [by_row[row]._replace(name=name) for row, name in shown.items()]
    note = (
        "Digits, 10 clients in 2 groups. Left: 30 images each. Right: 50, a fifth of them of all "
        f"digits. {BANDS}"
    )
    title = "Accuracy of everyone's own model"
    draw_curves(DOCS / "first-run.png", panels, title, note, low=0.3)


def draw_strategies() -> None:
    """Draw all strategies, with and without class prior and momentum."""
    title = "All strategies, 20 clients in 5 groups"
    draw_dots(DOCS / "strategies.png", ordered(read("strategies.csv", title)), title)


def draw_shifts() -> None:
    """Draw strategies under shifts by group."""
    title = "Shifts by group, 20 clients in 5 groups"
    panels = ordered(read("shifts.csv", title))
    lows = {"rotation": 0.62, "contrast": 0.58, "permuted labels": 0.6}
    draw_dots(DOCS / "shifts.png", panels, title, lows)


def draw_horizons() -> None:
    """Draw accuracies over long runs."""
    panels = read("horizons.csv", "Horizons, 20 clients in 5 groups")
    rounds = [int(column.rpartition(" ")[2]) for column in panels]
    found = []
    for row in next(iter(panels.values())):
        seeds = list(zip(*(rows[row] for rows in panels.values()), strict=True))
        found.append(Curve.over(row.removesuffix(", prior and momentum"), rounds, seeds))
    note = (
        "Fashion-MNIST in 14x14 pixels, with class prior and momentum. A mark is the mean of the "
        f"last five rounds. {BANDS}"
    )
    title = "After more rounds, 20 clients in 5 groups"
    draw_curves(DOCS / "horizons.png", {"": found}, title, note)


def draw_onboarding() -> None:
    """Draw the accuracy of late clients by rounds since joining."""
    titles = {
        "1 late client": "One late client",
        "4 late clients": "Four late clients, of four groups",
        "10 late clients": "Ten late clients, two of each group",
        "1 alone in its group": "One late client, alone in its group",
    }
    order = ["pfedgpa", "pfedgpa, from the start", "fedavg-ft", "nearest member"]
    order.append("local, from scratch")
    panels = {}
    for case, title in titles.items():
        cells: dict[str, list[dict[str, str]]] = defaultdict(list)
        for cell in cells_of("onboarding.csv", f"{case}: rounds since joining"):
            cells[cell["row"]].append(cell)
        panels[title] = [with_deviation(row, cells[row]) for row in sorted(cells, key=order.index)]
    note = (
        "Fashion-MNIST in 14x14 pixels, 20 clients in 5 groups; late clients join in round 13. "
        "Lines are the mean over 3 seeds, bands the standard deviation."
    )
    title, x = "Clients that join late", "rounds since joining"
    draw_curves(DOCS / "onboarding.png", panels, title, note, x, low=0.5)


def with_deviation(row: str, cells: list[dict[str, str]]) -> Curve:
    """Return mean and standard deviation by round."""
    rounds = [int(cell["column"].removeprefix("round ")) for cell in cells]
    means = [float(cell["mean"]) for cell in cells]
    deviations = [float(cell["std"]) for cell in cells]
    low = [mean - deviation for mean, deviation in zip(means, deviations, strict=True)]
    high = [mean + deviation for mean, deviation in zip(means, deviations, strict=True)]
    return Curve(row, rounds, means, low, high)


def read(name: str, table: str) -> Panels:
    """Return the values of a table of docs/results, by column and row."""
    panels: Panels = defaultdict(dict)
    for cell in cells_of(name, table):
        panels[cell["column"]][cell["row"]] = [float(value) for value in cell["values"].split()]
    return panels


def cells_of(name: str, table: str) -> list[dict[str, str]]:
    """Return the cells of a table of docs/results."""
    with (DOCS / "results" / name).open(newline="", encoding="utf-8-sig") as stream:
        return [cell for cell in csv.DictReader(stream) if cell["table"] == table]


def ordered(panels: Panels) -> Panels:
    """Return the rows that all panels have, with the best of the first panel first."""
    first = next(iter(panels.values()))
    order = sorted(first, key=lambda row: -fmean(first[row]))
    common = [row for row in order if all(row in rows for rows in panels.values())]
    return {column: {row: rows[row] for row in common} for column, rows in panels.items()}


if __name__ == "__main__":
    typer.run(main)
