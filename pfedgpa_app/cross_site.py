"""The cross-site matrix of a run: the accuracy of each client's model at each site."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from pfedgpa_app.files import read_text
from pfedgpa_app.rounds import Row
from pfedgpa_app.state import write_text

CROSS_SITE_FILE = "cross-site.csv"
_COLUMNS = ("model", "model-name", "site", "site-name", "accuracy", "num-test-examples")


def write_matrix(folder: Path, rows: Sequence[Row], names: Mapping[int, str]) -> None:
    """Write a line a pair, with the names of clients that have one; raises `WriteError`."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        named = {f"{of}-name": _as_text(names.get(row[of], "")) for of in ("model", "site")}
        writer.writerow({**row, **named})
    write_text(folder / CROSS_SITE_FILE, text.getvalue())


def read_matrix(folder: Path) -> dict[tuple[int, int], float]:
    """Return the accuracies by the numbers of model and site; none if there is no such file.

    Raises `ValueError` if the file is damaged.
    """
    file = folder / CROSS_SITE_FILE
    if not file.exists():
        return {}
    try:
        rows = csv.DictReader(io.StringIO(read_text(file)))
        found = {(int(row["model"]), int(row["site"])): float(row["accuracy"]) for row in rows}
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not all(0 <= accuracy <= 1 for accuracy in found.values()):
        raise ValueError(f"{file} is damaged; right would be accuracies from 0 to 1")
    return found


def _as_text(name: str) -> str:
    """Return a name in which no spreadsheet sees a formula."""
    return f"'{name}" if name.startswith(("=", "+", "-", "@")) else name
