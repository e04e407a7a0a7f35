"""Plotly figures of what every strategy leaves: accuracy, clients, classes, seconds and bytes.

Colour is never the only difference: lines have dashes, points shapes and bars patterns.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import plotly.graph_objects as go

from pfedgpa_app.figures import colour, dash, mark, style_numbers
from pfedgpa_app.rounds import EVALUATED, Row, value_of

ACCURACIES = {
    EVALUATED: "personalized",
    "finetuned-accuracy": "after local training",
    "received-accuracy": "as sent for training",
    f"{EVALUATED}-worst": "worst client",
}
# Those of printed figures, as plotly calls them.
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down")
PATTERNS = ("", "/", "x", ".")

Curve = dict[int, list[float]]
"""The values of all runs, by round."""


def symbol(number: int) -> str:
    """Return the shape of the number-th kind of points."""
    return SYMBOLS[number % len(SYMBOLS)]


def plain(text: object) -> str:
    """Return text in which plotly finds no tags."""
    return html.escape(str(text), quote=False)


def figure(x: str, y: str, height: int = 400, **layout: Any) -> go.Figure:
    """Return an empty figure with titles of its axes."""
    return go.Figure(
        layout={
            "template": go.layout.Template(),
            "height": height,
            "margin": {"l": 48, "r": 12, "t": 16, "b": 56},
            "xaxis": {"title": {"text": x}, "automargin": True},
            "yaxis": {"title": {"text": y}, "automargin": True},
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
            "showlegend": True,
            **layout,
        }
    )


def label_whole_numbers(fig: go.Figure, x: Iterable[int]) -> None:
    """Label the axis of x, such as rounds, at whole numbers alone."""
    numbers = list(x)
    is_short = max(numbers, default=0) - min(numbers, default=0) < 11
    # Left to itself the browser labels halves too, and the format rounds them: 1, 1, 2, 2.
    fig.update_xaxes(tickformat="d", dtick=1 if is_short else None)


def curve_of(runs: Iterable[Sequence[Row]], name: str) -> Curve:
    """Return a metric of the rounds in which it is there, over runs that differ in the seed."""
    values: Curve = {}
    for rows in runs:
        for row in rows:
            if row.get(name) is not None:
                values.setdefault(row["round"], []).append(row[name])
    return dict(sorted(values.items()))


def lines(curves: Mapping[str, Curve], what: str = "accuracy") -> go.Figure:
    """Return curves over rounds: means over seeds, and the range of the seeds as a band.

    The axis shows where they differ: the range of the second half of the rounds.
    """
    curves = {name: curve for name, curve in curves.items() if curve}
    fig = figure("round", what, height=max(400, 320 + 20 * len(curves)))
    fig.update_yaxes(range=late_range(curves.values()))
    numbers = style_numbers(curves)
    for name, curve in curves.items():
        number, rounds = numbers[name], list(curve)
        shade = colour(number)
        if any(len(values) > 1 for values in curve.values()):
            low, high = ([end(values) for values in curve.values()] for end in (min, max))
            fig.add_scatter(
                x=rounds + rounds[::-1],
                y=high + low[::-1],
                fill="toself",
                fillcolor=shade,
                opacity=0.15,
                line={"width": 0},
                mode="lines",
                hoverinfo="skip",
                showlegend=False,
            )
        fig.add_scatter(
            x=rounds,
            y=[fmean(values) for values in curve.values()],
            name=plain(name),
            mode="lines+markers" if len(rounds) <= 40 else "lines",
            line={"color": shade, "dash": DASHES[dash(number)], "width": 2},
            marker={"symbol": SYMBOLS[mark(number)], "size": 6},
            hovertemplate="round %{x}: %{y:.4g}",
        )
    label_whole_numbers(fig, (number for curve in curves.values() for number in curve))
    return fig


def late_range(curves: Iterable[Curve]) -> list[float]:
    """Return the range of the values in the second half of the rounds, with a margin."""
    values: list[float] = []
    for curve in curves:
        rounds = list(curve)
        for server_round in rounds[(len(rounds) - 1) // 2 :]:
            values += curve[server_round]
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = 0.08 * (high - low) or 0.01
    return [low - margin, high + margin]


def last_accuracies(clients: Iterable[Row]) -> dict[int, tuple[float, float | None]]:
    """Return each client's last personalized accuracy, and that after training in its last round.

    Worst first; a client that was never evaluated has none.
    """
    personalized = {row["client"]: row[EVALUATED] for row in clients if EVALUATED in row}
    trained = {row["client"]: row["accuracy-after"] for row in clients if "accuracy-after" in row}
    worst_first = sorted(personalized, key=lambda client: (personalized[client], client))
    return {client: (personalized[client], trained.get(client)) for client in worst_first}


def clients(
    accuracies: Mapping[int, tuple[float, float | None]],
    mean: float,
    tests: Mapping[int, int],
    names: Mapping[int, str],
) -> go.Figure:
    """Return the last accuracies of each client, as `last_accuracies` has them, and the mean.

    ``tests`` has the number of each client's test examples where it is known, for the 95 %
    interval (Wilson, 1927); ``names`` those of clients that have one.
    """
    fig = figure("client, worst first", "accuracy")
    personalized, trained = zip(*accuracies.values(), strict=True)
    z, n = 1.96, np.array([tests.get(client) or np.inf for client in accuracies])
    accuracy = np.array(personalized)
    middle = (accuracy + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(accuracy * (1 - accuracy) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    of_all = {"x": [label(client, names) for client in accuracies], "mode": "markers"}
    fig.add_scatter(
        **of_all,
        y=trained,
        name="after local training",
        marker={"color": colour(1), "symbol": "diamond-open", "size": 10},
        hovertemplate="client %{x}: %{y:.4f}",
    )
    fig.add_scatter(
        **of_all,
        y=personalized,
        name="personalized",
        marker={"color": colour(0), "symbol": symbol(0), "size": 10},
        customdata=[tests.get(client, "?") for client in accuracies],
        hovertemplate="client %{x}: %{y:.4f} of %{customdata} test examples",
        error_y={
            "array": (middle + half - accuracy).tolist(),
            "arrayminus": (accuracy - middle + half).tolist(),
            "thickness": 1,
            "width": 3,
        },
    )
    # The worst, who come first, are below it.
    note = {"text": f"mean {mean:.4f}", "xanchor": "left", "x": 0}
    fig.add_hline(y=mean, line={"dash": "dot", "width": 1}, annotation=note)
    fig.update_xaxes(type="category")
    return fig


def label(client: int, names: Mapping[int, str]) -> str:
    """Return a client's number and, if it has one, its name."""
    return f"{client} {plain(names[client])}" if client in names else str(client)


def heat(
    rows: Sequence[str],
    columns: Sequence[str],
    z: Sequence[Sequence[float | None]],
    what: str,
    hover: str,
    number: str = "%{z:.2f}",
    **options: Any,
) -> go.Heatmap:
    """Return a cell a row and column, with ``what`` its colour means, and numbers if few."""
    is_small = len(rows) <= 40
    return go.Heatmap(
        x=columns,
        y=rows,
        z=z,
        colorscale="Blues",
        texttemplate=number if is_small and len(columns) <= 20 else None,
        colorbar={"title": {"text": what}, "thickness": 12},
        hovertemplate=f"{hover}<extra></extra>",
        xgap=int(is_small),
        ygap=int(is_small),
        **options,
    )


def matrix(x: str, y: str, trace: go.Heatmap) -> go.Figure:
    """Return a figure of a `heat`, the first row on top, as high as its rows need."""
    fig = figure(x, y, height=max(280, min(900, 110 + 22 * len(trace.y))))
    fig.add_trace(trace)
    fig.update_xaxes(type="category")
    fig.update_yaxes(type="category", autorange="reversed")
    return fig


def classes(
    values: Mapping[int, Sequence[float | None]], names: Sequence[str], what: str = "images"
) -> go.Figure:
    """Return what each client has of each class, such as its training images."""
    number = "%{z}" if what == "images" else "%{z:.2f}"
    hover = f"client %{{y}}, class %{{x}}: {number} {what}"
    rows, columns = list(map(str, values)), list(map(plain, names))
    z = list(map(list, values.values()))
    return matrix("class", "client", heat(rows, columns, z, what, hover, number, zmin=0))


def cross_site(accuracies: Mapping[tuple[int, int], float], names: Mapping[int, str]) -> go.Figure:
    """Return the accuracy of each client's model, a row, at each site, a column."""
    numbers = sorted({client for pair in accuracies for client in pair})
    labels = [label(client, names) for client in numbers]
    z = [[accuracies.get((model, site)) for site in numbers] for model in numbers]
    hover = "model of %{y}, at %{x}: %{z:.4f}"
    return matrix("evaluated at", "model of", heat(labels, labels, z, "accuracy", hover))


def seconds(metrics: Sequence[Row]) -> go.Figure:
    """Return the seconds of each round, by who took them."""
    names = {
        "seconds-clients": "clients' training",
        "seconds-diffusion": "learning on the server",
        "seconds-waiting": "waiting for clients",
    }
    parts = {name: [value_of(row, key) for row in metrics] for key, name in names.items()}
    parts["evaluation, writing, the rest"] = [
        max(0.0, value_of(row, "seconds-round") - sum(value_of(row, key) for key in names))
        for row in metrics
    ]
    return _bars(metrics, "seconds", parts, "%{y:.2f} s")


def megabytes(metrics: Sequence[Row]) -> go.Figure:
    """Return the megabytes of each round, up and down."""
    ways = {
        f"{way} ({what})": [value_of(row, f"bytes-{way}") / 1e6 for row in metrics]
        for way, what in (("down", "to the clients"), ("up", "to the server"))
    }
    return _bars(metrics, "megabytes", ways, "%{y:.3f} MB")


def _bars(
    metrics: Sequence[Row], what: str, parts: Mapping[str, list[float]], template: str
) -> go.Figure:
    fig = figure("round", what, barmode="stack")
    rounds = [row["round"] for row in metrics]
    for number, (name, values) in enumerate(parts.items()):
        fig.add_bar(
            x=rounds,
            y=values,
            name=name,
            marker={
                "color": colour(number),
                "line": {"width": 0},
                "pattern": {"shape": PATTERNS[number], "size": 6},
            },
            hovertemplate=f"round %{{x}}: {template}",
        )
    label_whole_numbers(fig, rounds)
    return fig
