"""What figures have in common: colours, dashes, shapes, and where labels go.

Nothing is told by colour alone: lines have dashes and names at their ends, points have shapes.
"""

import html
from collections.abc import Iterable, Mapping
from typing import Any

import plotly.graph_objects as go

from pfedgpa_app import figures
from pfedgpa_app.figures import spread

# Those of printed figures, as plotly calls them.
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down")
PATTERNS = ("", "/", "x", ".")

# Height of a figure, of what is above and below its axes and of the name of a curve, in pixels.
_HEIGHT = 400
_AROUND = 72
_NAME = 17
# Of at most so many whole numbers each has a label.
_MAX_TICKS = 11
# Letters of a name at the end of a curve.
MAX_NAME = 44


def dash(number: int) -> str:
    """Return the dash of the number-th line."""
    return DASHES[figures.dash(number)]


def symbol(number: int) -> str:
    """Return the shape of the number-th kind of points."""
    return SYMBOLS[number % len(SYMBOLS)]


def transparent(colour: str, alpha: float) -> str:
    """Return ``#rrggbb`` as CSS with an opacity."""
    red, green, blue = (int(colour[begin : begin + 2], 16) for begin in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def plain(text: object) -> str:
    """Return text in which plotly finds no tags."""
    return html.escape(str(text), quote=False)


def figure(x: str, y: str, height: int = _HEIGHT, **layout: Any) -> go.Figure:
    """Return an empty figure with titles of its axes; the page's script adds the colours."""
    return go.Figure(
        layout={
            "template": go.layout.Template(),
            "height": height,
            "margin": {"l": 64, "r": 24, "t": 16, "b": 56},
            "xaxis": {"title": {"text": x}, "automargin": True},
            "yaxis": {"title": {"text": y}, "automargin": True},
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
            **layout,
        }
    )


def label_whole_numbers(fig: go.Figure, x: Iterable[int]) -> None:
    """Label the axis of x, such as rounds, at whole numbers alone."""
    numbers = list(x)
    is_short = max(numbers, default=0) - min(numbers, default=0) < _MAX_TICKS
    # Left to itself the browser labels halves too, and the format rounds them: 1, 1, 2, 2.
    fig.update_xaxes(tickformat="d", dtick=1 if is_short else None)


def name_at_ends(fig: go.Figure, ends: Mapping[str, tuple[float, float, str]]) -> None:
    """Write the names of curves beside their ends, one below the other.

    ``ends`` has x, y and the colour of each. Names go by the figure's range of y. On narrow
    screens, and where all of the axis is shown, the script shows the legend instead.
    """
    low, high = fig.layout.yaxis.range
    height = max(fig.layout.height, _AROUND + _NAME * (len(ends) + 1))
    gap = _NAME * (high - low) / (height - _AROUND)
    places = spread([min(max(y, low), high) for _, y, _ in ends.values()], gap, low, high)
    texts = [name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…" for name in ends]
    longest = max(map(len, texts), default=0)
    fig.update_layout(
        height=height,
        showlegend=False,
        margin_r=24 + round(6.4 * longest),
        annotations=[
            {
                "x": 1,
                "xref": "paper",
                "y": place,
                "yref": "y",
                "xanchor": "left",
                "xshift": 6,
                "showarrow": False,
                "text": plain(text),
                "font": {"color": colour, "size": 12},
                "align": "left",
            }
            for text, (_, _, colour), place in zip(texts, ends.values(), places, strict=True)
        ],
    )
