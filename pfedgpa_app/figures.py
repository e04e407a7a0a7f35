"""Printed figures: colours, names at the ends of curves, PNG and SVG.

Colours have a contrast of three to white, and a strategy has the same colour, dash and mark in all
figures. Curves have names at their ends.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from pfedgpa_app.strategies import STRATEGY_INFO

# numpy and matplotlib take a second to import, which only figures need.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACCURACY = "accuracy on own test sets"
COLOURS = (
    *("#2f7fc1", "#d1603d", "#2b9a6b", "#a062c0"),
    *("#ab8000", "#1898a5", "#c2508c", "#7d7d7d"),
)
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)))
MARKS = "osD^v"
QUIET = "#5a5a5a"
BANDS = "Lines are the mean over seeds, bands the range."

_STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "figure.titlesize": 10,
    "figure.titleweight": "bold",
    "figure.labelsize": 7.5,
    "savefig.dpi": 200,
    # Text stays text, which can be searched and edited and is a fraction of the size; where the
    # font is missing, another one without serifs takes its place.
    "svg.fonttype": "none",
    "svg.hashsalt": "pfedgpa",
    # A $ in a name is no formula.
    "text.parse_math": False,
}
# Points from one name to the next, and from a curve's end to its name.
_LINE = 9.5
_BESIDE = 7
_MAX_TICKS = 6
_BOLD_AN_INCH, _SMALL_AN_INCH = 12, 17
# Letters of panels' titles that fit beside each other.
_TITLES = 76


class Curve(NamedTuple):
    """A mean over x, all of equal length, with the band around it."""

    name: str
    x: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]

    @classmethod
    def over(cls, name: str, x: Sequence[float], repeats: Sequence[Sequence[float]]) -> Self:
        """Return mean and range of repeats, such as seeds, each as long as x."""
        columns = list(zip(*repeats, strict=True))
        low, high = list(map(min, columns)), list(map(max, columns))
        return cls(name, x, list(map(fmean, columns)), low, high)


@contextmanager
def drawing(file: Path, size: tuple[float, float], title: str, note: str) -> Iterator["Figure"]:
    """Give a figure to draw on, and write it to ``file``, a PNG, and as SVG beside it.

    ``size`` is in inches, as printed; ``note`` is what has to be known to read it. The same figure
    has the same bytes whenever one version of matplotlib writes it. Curves with a label are named
    at their ends. Raises `OSError` if it cannot be written; neither file is then there.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=size, layout="constrained")
        wide = size[0]
        figure.suptitle(fill(title, int(_BOLD_AN_INCH * wide)), x=0.01, ha="left")
        text = fill(note, int(_SMALL_AN_INCH * wide))
        figure.supxlabel(text, x=0.01, ha="left", color=QUIET)
        yield figure
        # How far apart names have to be depends on the room that is left for the axes.
        figure.draw_without_rendering()
        for axes in figure.axes:
            _name_at_ends(axes)
        vector = file.with_suffix(".svg")
        try:
            figure.savefig(file, metadata={"Software": None})
            figure.savefig(vector, metadata={"Date": None, "Creator": None})
        except OSError:
            file.unlink(missing_ok=True)
            vector.unlink(missing_ok=True)
            raise


def draw_curves(
    file: Path,
    panels: Mapping[str, Sequence[Curve]],
    title: str,
    note: str,
    x: str = "round",
    low: float | None = None,
) -> None:
    """Draw accuracies, from 0 to 1, over ``x``: a panel a title, all on one scale from ``low`` on.

    The first curve of a panel is on top of the others. Raises `OSError` if the figure cannot be
    written.
    """

    columns = min(len(panels), 2)
    height = max(2.5, 0.8 + max(map(len, panels.values())) * _LINE / 72)
    size = (7.0 if columns > 1 else 4.6, 0.5 + height * math.ceil(len(panels) / columns))
    with drawing(file, size, title, note) as figure:
        numbers = style_numbers(curve.name for curves in panels.values() for curve in curves)
        for name, axes in _panels(figure, panels, columns):
            for place, curve in enumerate(panels[name]):
                _draw_curve(axes, curve, numbers[curve.name], zorder=3 - place / 100)
            axes.set_xlabel(x)
            axes.set_ylim(bottom=low)
        figure.supylabel(ACCURACY)


def draw_dots(
    file: Path,
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    title: str,
    lows: Mapping[str, float] | None = None,
) -> None:
    """Draw accuracies, from 0 to 1, over seeds: a panel a title and a line a row.

    pFedGPA's rows are filled. What is below a panel's ``lows`` is an arrow at its edge. Raises
    `OSError` if the figure cannot be written.
    """
    from matplotlib.ticker import MaxNLocator

    columns = min(len(panels), 4)
    rows = max(map(len, panels.values()))
    size = (
        7.0 if columns > 1 else 4.6,
        0.7 + (0.4 + 0.17 * rows) * math.ceil(len(panels) / columns),
    )
    note = "A circle is a seed; bar and number are the mean over seeds."
    if lows:
        note += " Arrows are seeds further to the left."
    with drawing(file, size, title, note) as figure:
        numbers = style_numbers(row for rows in panels.values() for row in rows)
        for name, axes in _panels(figure, panels, columns):
            low = (lows or {}).get(name, 0.0)
            best = max((fmean(values) for values in panels[name].values() if values), default=0.0)
            for place, (row, values) in enumerate(panels[name].items()):
                if values:
                    _draw_row(axes, place, row, values, low, best, colour(numbers[row]))
            axes.set_yticks(range(len(panels[name])), list(panels[name]))
            axes.set_ylim(len(panels[name]) - 0.4, -0.6)
            if low:
                axes.set_xlim(left=low)
            axes.set_xlabel("accuracy")
            axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))


def style_numbers(names: Iterable[str]) -> dict[str, int]:
    """Return a number for each name, from which `colour`, dash and mark follow.

    A name that begins with a strategy, up to a comma, has its place in the registry, so that a
    strategy looks the same in all figures. Further names of it have its colour and another dash.
    """
    known, numbers = list(STRATEGY_INFO), dict[str, int]()
    strategies = {name: name.partition(",")[0] for name in names}
    others = len(known) if set(known) & set(strategies.values()) else 0
    for place, name in sorted(enumerate(strategies), key=lambda each: each[1] not in known):
        is_known = strategies[name] in known
        number = known.index(strategies[name]) if is_known else others + place
        while number in numbers.values():
            number += len(COLOURS) if is_known else 1
        numbers[name] = number
    return numbers


def colour(number: int) -> str:
    """Return the colour of a number."""
    return COLOURS[number % len(COLOURS)]


def dash(number: int) -> int:
    """Return the place of a number's dash: one more where the colours begin again."""
    return (number + number // len(COLOURS)) % len(DASHES)


def mark(number: int) -> int:
    """Return the place of a number's mark: one more where the dashes begin again."""
    return number // len(DASHES) % len(MARKS)


def spread(values: list[float], gap: float, low: float, high: float) -> list[float]:
    """Return places near values, in their order, at least a gap apart where there is room."""
    order = sorted(range(len(values)), key=values.__getitem__)
    gap = min(gap, (high - low) / max(1, len(values) - 1))
    places = list(values)
    for below, above in pairwise(order):
        places[above] = max(places[above], places[below] + gap)
    top = high
    for number in reversed(order):
        places[number] = min(places[number], top)
        top = places[number] - gap
    return places


def _panels(figure: "Figure", names: Iterable[str], columns: int) -> Iterator[tuple[str, "Axes"]]:
    """Yield a panel a name, with the name as its title, line by line, with one scale of y."""
    names = list(names)
    lines = math.ceil(len(names) / columns)
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False).flat
    for number, axes in enumerate(grid):
        if number < len(names):
            axes.set_title(fill(names[number], _TITLES // columns))
            yield names[number], axes
        else:
            axes.remove()


def _draw_curve(axes: "Axes", curve: Curve, number: int, zorder: float) -> None:
    from matplotlib.ticker import MaxNLocator

    shade = colour(number)
    axes.plot(
        curve.x,
        curve.mean,
        color=shade,
        linestyle=DASHES[dash(number)],
        marker=MARKS[mark(number)],
        markevery=max(1, len(curve.x) // 10),
        label=curve.name,
        zorder=zorder,
    )
    if curve.low != curve.high:
        axes.fill_between(curve.x, curve.low, curve.high, color=shade, alpha=0.13, linewidth=0)
    if len(curve.x) <= _MAX_TICKS:
        axes.set_xticks(curve.x)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_row(
    axes: "Axes",
    place: int,
    row: str,
    values: Sequence[float],
    low: float,
    best: float,
    shade: str,
) -> None:
    ours, mean = row.startswith("pfedgpa"), fmean(values)
    shown = [value for value in values if value >= low]
    face = shade if ours else "white"
    axes.plot(shown, [place] * len(shown), "o", color=shade, markerfacecolor=face)
    if len(shown) < len(values):
        axes.plot(low, place, "<", color=shade, markerfacecolor=face, clip_on=False)
    if mean >= low:
        axes.plot(mean, place, "|", color="black", markersize=10, markeredgewidth=1.5)
    axes.text(
        1.03,
        place,
        f"{mean:.3f}",
        transform=axes.get_yaxis_transform(),
        va="center",
        weight="bold" if mean == best else "normal",
    )


def _name_at_ends(axes: "Axes") -> None:
    """Write the labels of curves beside their ends, apart from each other."""
    import numpy as np
    from matplotlib.colors import to_rgb

    lines = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
    ends = [np.asarray(line.get_xydata())[-1] for line in lines]
    if not ends:
        return
    points = 72 / axes.figure.dpi
    heights = [y * points for _, y in axes.transData.transform(np.array(ends)).tolist()]
    low, high = (y * points for y in axes.bbox.intervaly)
    places = spread(heights, _LINE, low, high - _LINE / 2)
    is_moved = any(abs(a - b) > 1 for a, b in zip(heights, places, strict=True))
    beside = 2 * _BESIDE if is_moved else _BESIDE
    for line, end, height, place in zip(lines, ends, heights, places, strict=True):
        # Letters are thin: they take a darker shade than lines.
        shade = [0.75 * part for part in to_rgb(line.get_color())]
        axes.annotate(
            str(line.get_label()),
            (end[0], end[1]),
            xytext=(beside, place - height),
            textcoords="offset points",
            va="center",
            color=shade,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": shade,
                "linewidth": 0.6,
                "shrinkA": 0,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
        )
