"""What the page has of a bench: its tables, and curves where rounds were evaluated."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from pfedgpa_app.files import is_hidden, read_json, text_of
from pfedgpa_app.page.html import sections, table_of, whole
from pfedgpa_app.page.runs import compared
from pfedgpa_app.rounds import Row
from pfedgpa_app.tables import INDEX_KIND

_MARKS = {"best": "<strong>{}</strong>", "tied": "<em>{}</em>", "": "{}"}


def is_bench(folder: Path) -> bool:
    """Return whether a folder has what `pfedgpa bench` wrote."""
    return bool(_indices(folder))


def page_of_bench(folder: Path) -> str:
    """Return the HTML of the page of a bench's folder, with all that was chosen from its suite.

    Raises `ValueError` if an index of its results is damaged.
    """
    indices = _indices(folder)
    body = ""
    for name, index in indices.items():
        try:
            body += _index(folder, index)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            right = "right would be as pfedgpa bench writes it"
            raise ValueError(f"{folder / name}.json is damaged: {error!r}; {right}") from error
    return whole(next(iter(indices.values()))["title"], body)


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


def _index(folder: Path, index: Mapping[str, Any]) -> str:
    cases: dict[str, dict[str, list[list[Row]]]] = {}
    for run in index["runs"]:
        finished = cases.setdefault(run["case"], {}).setdefault(run["row"], [])
        try:
            finished.append(read_json(folder / run["file"])["rounds"])
        except (OSError, ValueError, KeyError):  # it is not finished
            continue
    panels = [(case or "all", compared(rows)) for case, rows in cases.items()]
    curves = sections(panels) if any(body for _, body in panels) else ""
    tables = "".join(map(_table, index["tables"]))
    return f"<h1>{escape(index['title'])}</h1>{curves}<h2>Results</h2>{tables}"


def _table(table: Mapping[str, Any]) -> str:
    lines = []
    for name, cells in table["rows"].items():
        row = "".join(f"<td>{_MARKS[mark].format(escape(text))}</td>" for text, mark in cells)
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{row}</tr>')
    head = ("", *table["columns"])
    return (
        f"<h3>{escape(table['title'])}</h3>{table_of(head, lines)}"
        f'<p class="quiet">{escape(table["note"])}</p>'
    )
