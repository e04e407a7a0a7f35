"""What the page has of a bench: its tables, and curves where rounds were evaluated."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from pfedgpa_app.files import is_hidden, read_json, text_of
from pfedgpa_app.page import figures
from pfedgpa_app.page.html import Page, Panel, table_of, tabs
from pfedgpa_app.rounds import Row
from pfedgpa_app.tables import INDEX_KIND

_MARKS = {"best": "<strong>{}</strong>", "tied": "<em>{}</em>", "": "{}"}
_CAPTION = (
    "Mean over the clients and the seeds, each client on its own test set; the band is the range "
    "of the seeds. The axis shows the range of the second half of the rounds."
)


def is_bench(folder: Path) -> bool:
    """Tell whether a folder has what `pfedgpa bench` wrote."""
    return bool(_indices(folder))


def page_of_bench(folder: Path) -> str:
    """Return the HTML of the page of a bench's folder, with all that was chosen from its suite.

    Raises
    ------
    ValueError
        If it is none, or what lists its results is damaged.
    """
    indices = _indices(folder)
    if not indices:
        raise ValueError(
            f"{folder} has no results of a bench; right would be build/bench/<suite> after "
            "pfedgpa bench, which does not repeat finished runs"
        )
    page = Page()
    bodies = []
    for name, index in indices.items():
        try:
            bodies.append(_index(page, folder, index, name))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            right = "right would be as pfedgpa bench writes it"
            raise ValueError(f"{folder / name}.json is damaged: {error!r}; {right}") from error
    title = next(iter(indices.values()))["title"]
    return page.whole(title, "".join(bodies))


def _indices(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for file in sorted(file for file in folder.glob("*.json") if not is_hidden(file.name)):
        try:
            index = read_json(file)
        except (OSError, ValueError):
            continue
        if isinstance(index, dict) and index.get("kind") == INDEX_KIND:
            found[text_of(file.stem)] = index
    return found


def _index(page: Page, folder: Path, index: Mapping[str, Any], name: str) -> str:
    results: dict[tuple[str, str], list[list[Row]]] = {}
    for run in index["runs"]:
        results.setdefault((run["case"], run["row"]), []).extend(_rounds(folder / run["file"]))
    panels = []
    for case in dict.fromkeys(run["case"] for run in index["runs"]):
        rows = {row: each for (of, row), each in results.items() if of == case}
        panels.append((case or "all", _case(page, rows)))
    tables = "".join(map(_table, index["tables"]))
    curves = tabs(panels, name) if any(body for _, body in panels) else ""
    return f"<h1>{escape(index['title'])}</h1>{curves}<h2>Results</h2>{tables}"


def _rounds(file: Path) -> list[list[Row]]:
    """Return the rounds of a result, if the run is finished."""
    try:
        return [read_json(file)["rounds"]]
    except (OSError, ValueError, KeyError):
        return []


def _case(page: Page, rows: Mapping[str, Sequence[Sequence[Row]]]) -> str:
    """Return the curves of a case; one point is none."""
    shown = []
    for name, title in list(figures.ACCURACIES.items())[:2]:
        curves = {row: figures.curve_of(runs, name) for row, runs in rows.items()}
        if any(len(curve) > 1 for curve in curves.values()):
            drawn = figures.accuracy(curves)
            shown.append(Panel(f"Accuracy, {title}", _CAPTION, drawn, has_zoom=True, is_wide=True))
    return page.figures(shown) if shown else ""


def _table(table: Mapping[str, Any]) -> str:
    lines = []
    for name, cells in table["rows"].items():
        marked = (_MARKS[mark].format(escape(text)) for text, mark in cells)
        row = "".join(f"<td>{cell}</td>" for cell in marked)
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{row}</tr>')
    head = ("", *table["columns"])
    return (
        f"<h3>{escape(table['title'])}</h3>{table_of(head, lines)}"
        f'<p class="quiet">{escape(table["note"])}</p>'
    )
