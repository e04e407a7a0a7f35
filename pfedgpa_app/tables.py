"""Tables of comparisons: means over seeds, and paired tests of their differences."""

import csv
import io
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scipy.stats import ttest_rel

from pfedgpa_app.rounds import mean_and_spread

SIGNIFICANCE = 0.05
INDEX_KIND = "pfedgpa-bench-1"
"""The kind of the JSON file that lists a bench's tables and result files."""
# What spreadsheets calculate begins so.
_FORMULAS = ("=", "+", "-", "@", "\t", "\r")
CSV_HEAD = "table,row,column,text,mark,seeds,mean,std,values,commit\n"
_LATEX = {character: "\\" + character for character in "&%_#${}"}
_LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''"}
# At the beginning of a line the first two are options of the line before.
_LATEX |= {"[": "{[}", "*": "{*}", "]": "{]}", "`": r"\textasciigrave{}", "±": r"$\pm$"}

Accuracies = Mapping[int, Mapping[int, float]]
"""The evaluated number of each client, by seed."""


@dataclass(frozen=True)
class Cell:
    """A number over seeds, as ``mean ± standard deviation``, and how it stands in its column.

    ``mark`` is ``"best"``, ``"tied"`` if not significantly different from the best, or empty;
    ``values`` are those of the seeds.
    """

    text: str
    mark: str = ""
    values: Sequence[float] = ()


@dataclass(frozen=True)
class Table:
    """Cells by row and column, and what has to be known to read them.

    ``name`` is what papers refer to the table by, ``source`` the command that it comes from, and
    ``commit`` the version of the code.
    """

    title: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[Cell]]
    note: str
    name: str = ""
    source: str = ""
    commit: str = ""

    def caption(self, best: str = "Bold", tied: str = "italic") -> str:
        """Return the note, and what the marks of cells mean, if some have any."""
        if not any(cell.mark for row in self.rows.values() for cell in row):
            return self.note
        return (
            f"{self.note} {best}: the best; {tied}: not significantly different from it (paired "
            "t-test over seeds and clients, 5 %). Clients of a seed are not independent, so the "
            "test finds too many differences."
        )

    def text(self) -> str:
        """Return the table as text, with ``*`` at the best and ``=`` at what is tied."""
        grid = self._grid({"best": "{} *", "tied": "{} =", "": "{}  "}, str)
        widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
        lines = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in grid)
        return "\n".join([self.title, "", *lines, "", self._note("*", "="), ""])

    def markdown(self) -> str:
        """Return the table in Markdown, with the best in bold and what is tied in italics."""

        def escaped(text: str) -> str:
            return _one_line(text).replace("\\", r"\\").replace("|", r"\|")

        head, *rows = self._grid({"best": "**{}**", "tied": "*{}*", "": "{}"}, escaped)
        lines = [head, ["---"] * len(head), *rows]
        body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"**{_one_line(self.title)}**\n\n{body}\n\n{_one_line(self._note())}\n"

    def latex(self) -> str:
        """Return the table in LaTeX, with the best in bold and what is tied in italics.

        It needs the package booktabs. Where it comes from is a comment.
        """

        def escaped(text: str) -> str:
            text = "".join(_LATEX.get(character, character) for character in _one_line(text))
            return re.sub("-(?=-)", "-{}", text)  # or two of them would be a dash

        marks = {"best": r"\textbf{{{}}}", "tied": r"\textit{{{}}}", "": "{}"}
        head, *body = (" & ".join(line) + r" \\" for line in self._grid(marks, escaped))
        # Nothing that LaTeX reads as a command, or other packages.
        label = re.sub("[^A-Za-z0-9.]+", "-", self.name).strip("-")
        lines = [
            r"% \usepackage{booktabs}",
            f"% {_one_line(self.source)}" if self.source else "",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{escaped(self.title)}. {escaped(self.caption())}}}",
            rf"\label{{tab:{label}}}" if self.name else "",
            rf"\begin{{tabular}}{{l{'r' * len(self.columns)}}}",
            r"\toprule",
            head,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
        return "".join(f"{line}\n" for line in lines if line)

    def as_json(self) -> dict[str, Any]:
        """Return the table as what JSON takes, each cell as its text and its mark."""
        rows = {name: [(cell.text, cell.mark) for cell in row] for name, row in self.rows.items()}
        return {
            "title": self.title,
            "columns": list(self.columns),
            "rows": rows,
            "note": self._note(),
        }

    def csv(self) -> str:
        """Return the table as comma-separated values, a line a cell, without a head."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        for name, row in self.rows.items():
            for column, cell in zip(self.columns, row, strict=True):
                values = cell.values
                mean = f"{statistics.fmean(values):.6f}" if values else ""
                std = f"{statistics.stdev(values):.6f}" if len(values) > 1 else ""
                each = " ".join(f"{value:.6f}" for value in values)
                # After an apostrophe, no spreadsheet takes a text for a formula.
                texts = (
                    f"'{text}" if text.startswith(_FORMULAS) else text
                    for text in (self.title, name, column)
                )
                row_of_cell = [*texts, cell.text, cell.mark, len(values), mean, std, each]
                writer.writerow([*row_of_cell, self.commit])
        return stream.getvalue()

    def _note(self, best: str = "Bold", tied: str = "italic") -> str:
        return f"{self.caption(best, tied)} {self.source}".strip()

    def _grid(self, marks: Mapping[str, str], escaped: Callable[[str], str]) -> list[list[str]]:
        """Return the names of columns, then the rows, with each cell in the form of its mark."""
        return [["", *map(escaped, self.columns)]] + [
            [escaped(name), *(marks[cell.mark].format(escaped(cell.text)) for cell in row)]
            for name, row in self.rows.items()
        ]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def compare(
    column: Mapping[str, Accuracies], num_seeds: int, *, is_lower_better: bool = False
) -> dict[str, Cell]:
    """Return the cells of a column: means over clients, their mean and deviation over seeds.

    A cell without all of ``num_seeds`` is not compared, and has their number. The best mean is
    marked, and those that a two-sided paired t-test over seeds and clients finds no different at
    5 %. Clients of one seed are not independent, so the test finds more differences than other
    seeds would confirm: a mark is no evidence of equality.
    """
    means, cells = {}, {}
    for name, seeds in column.items():
        values = [sum(each.values()) / len(each) for each in seeds.values()]
        cells[name] = partial_cell(Cell(mean_and_spread(values), values=values), num_seeds)
        if len(values) == num_seeds:
            means[name] = sum(values) / num_seeds
    if len(means) < 2:
        return cells
    best = (min if is_lower_better else max)(means, key=means.__getitem__)
    for name in means:
        if name == best:
            cells[name] = replace(cells[name], mark="best")
        elif p_value(column[name], column[best]) >= SIGNIFICANCE:
            cells[name] = replace(cells[name], mark="tied")
    return cells


def partial_cell(cell: Cell, num_seeds: int) -> Cell:
    """Return a cell with the number of its seeds, if it lacks some of ``num_seeds``."""
    found = len(cell.values)
    if found == num_seeds:
        return cell
    return replace(cell, text=f"{cell.text} ({found} of {num_seeds})" if found else "failed")


def p_value(left: Accuracies, right: Accuracies) -> float:
    """Return that of the paired t-test over all clients of all seeds that both sides have.

    It is 1 where there are no two pairs, or no pair differs.
    """
    pairs = [
        (value, right[seed][client])
        for seed, clients in left.items()
        if seed in right
        for client, value in clients.items()
        if client in right[seed]
    ]
    if len(pairs) < 2 or all(one == other for one, other in pairs):
        return 1.0
    return float(ttest_rel(*zip(*pairs, strict=True)).pvalue)
