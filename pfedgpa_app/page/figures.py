"""Figures of what every strategy leaves: accuracy, clients, their classes, seconds and bytes."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

import plotly.graph_objects as go

from pfedgpa_app.figures import colour, looks
from pfedgpa_app.page.theme import (
    PATTERNS,
    dash,
    figure,
    label_whole_numbers,
    name_at_ends,
    plain,
    symbol,
    transparent,
)
from pfedgpa_app.rounds import Row, value_of

ACCURACIES = {
    "personalized-accuracy": "personalized",
    "finetuned-accuracy": "after local training",
    "received-accuracy": "as sent for training",
    "personalized-accuracy-worst": "worst client",
}
# Rounds whose curves decide about the range of the axis, as a part of all.
_LATE = 0.5

Curve = dict[int, list[float]]
"""The values of all runs, by round."""


def curve_of(runs: Sequence[Sequence[Row]], name: str) -> Curve:
    """Return a metric of the rounds in which it is there, over runs that differ in the seed."""
    values: Curve = {}
    for rows in runs:
        for row in rows:
            if row.get(name) is not None:
                values.setdefault(row["round"], []).append(row[name])
    return dict(sorted(values.items()))


def accuracy(curves: Mapping[str, Curve], what: str = "accuracy") -> go.Figure:
    """Return curves over rounds: means over seeds, and the range of the seeds as a band.

    The axis shows where they differ: the range of the second half of the rounds.
    """
    fig = figure("round", what)
    curves = {name: curve for name, curve in curves.items() if curve}
    fig.update_yaxes(range=late_range(curves.values()))
    ends, numbers = {}, looks(curves)
    for name, curve in curves.items():
        number, shade = numbers[name], colour(numbers[name])
        rounds, means = list(curve), [fmean(values) for values in curve.values()]
        if any(len(values) > 1 for values in curve.values()):
            opacity = 0.18 if len(curves) <= 4 else 0.1
            fig.add_trace(_band(curve, transparent(shade, opacity)))
        fig.add_trace(
            go.Scatter(
                x=rounds,
                y=means,
                name=plain(name),
                mode="lines+markers" if len(rounds) <= 40 else "lines",
                line={"color": shade, "dash": dash(number), "width": 2},
                marker={"symbol": symbol(number), "size": 6},
                hovertemplate="round %{x}: %{y:.4f}",
            )
        )
        ends[name] = (rounds[-1], means[-1], shade)
    name_at_ends(fig, ends)
    label_whole_numbers(fig, (number for curve in curves.values() for number in curve))
    return fig


def late_range(curves: Iterable[Curve]) -> list[float]:
    """Return the range of what is seen in the second half of the rounds, with a margin."""
    values: list[float] = []
    for curve in curves:
        rounds = list(curve)
        for server_round in rounds[int(_LATE * (len(rounds) - 1)) :]:
            values += curve[server_round]
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = 0.08 * (high - low) or 0.01
    return [low - margin, high + margin]


def _band(curve: Curve, colour: str) -> go.Scatter:
    rounds = list(curve)
    low, high = ([end(values) for values in curve.values()] for end in (min, max))
    return go.Scatter(
        x=rounds + rounds[::-1],
        y=high + low[::-1],
        fill="toself",
        fillcolor=colour,
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
    )


def last_accuracies(clients: Sequence[Row]) -> dict[int, tuple[float, float | None]]:
    """Return each client's last personalized accuracy, and that after training in its last round.

    Worst first; a client that was never evaluated has none.
    """
    personalized: dict[int, float] = {}
    trained: dict[int, float] = {}
    for row in clients:
        if "personalized-accuracy" in row:
            personalized[row["client"]] = row["personalized-accuracy"]
        if "accuracy-after" in row:
            trained[row["client"]] = row["accuracy-after"]
    worst_first = sorted(personalized, key=lambda client: (personalized[client], client))
    return {client: (personalized[client], trained.get(client)) for client in worst_first}


def interval(accuracy: float, num_examples: int) -> tuple[float, float]:
    """Return the 95 % interval of an accuracy on so many test examples (Wilson, 1927)."""
    z, n = 1.96, num_examples
    middle = accuracy + z**2 / (2 * n)
    half = z * (accuracy * (1 - accuracy) / n + z**2 / (4 * n**2)) ** 0.5
    return (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)


def clients(
    accuracies: Mapping[int, tuple[float, float | None]],
    mean: float,
    tests: Mapping[int, int],
    called: Mapping[int, str] | None = None,
) -> go.Figure:
    """Return the last accuracy of each client, worst first, and the mean over all.

    ``tests`` has the number of each client's test examples, where it is known; ``called`` the names
    of those that have one.
    """
    bounds = [
        interval(each, tests[client]) if tests.get(client) else (each, each)
        for client, (each, _) in accuracies.items()
    ]
    values = [each for each, _ in accuracies.values()]
    fig = figure("client, worst first", "accuracy")
    names = [label(client, called or {}) for client in accuracies]
    kinds = (("personalized", symbol(0)), ("after local training", "diamond-open"))
    for number, (name, shape) in reversed(list(enumerate(kinds))):
        fig.add_trace(
            go.Scatter(
                x=names,
                y=[each[number] for each in accuracies.values()],
                name=name,
                mode="markers",
                marker={"color": colour(number), "symbol": shape, "size": 10},
                hovertemplate="client %{x}: %{y:.4f}",
            )
        )
    # The worst, who come first, are below it.
    fig.add_hline(
        y=mean,
        line={"dash": "dot", "width": 1},
        annotation={"text": f"mean {mean:.4f}", "xanchor": "left", "x": 0},
    )
    fig.data[-1].update(
        customdata=[tests.get(client, "?") for client in accuracies],
        hovertemplate="client %{x}: %{y:.4f} of %{customdata} test examples",
        error_y={
            "array": [high - each for each, (_, high) in zip(values, bounds, strict=True)],
            "arrayminus": [each - low for each, (low, _) in zip(values, bounds, strict=True)],
            "thickness": 1,
            "width": 3,
        },
    )
    fig.update_xaxes(type="category")
    fig.update_layout(showlegend=True)
    return fig


def label(client: int, called: Mapping[int, str]) -> str:
    """Return a client's number and, if it has one, its name."""
    return f"{client} {plain(called[client])}" if client in called else str(client)


def classes(
    values: Mapping[int, Sequence[float | None]], names: Sequence[str], what: str = "images"
) -> go.Figure:
    """Return what each client has of each class, such as its training images."""
    fig = figure("class", "client", height=max(280, min(900, 110 + 22 * len(values))))
    number = "%{z}" if what == "images" else "%{z:.2f}"
    fig.add_trace(
        go.Heatmap(
            x=[plain(name) for name in names],
            y=[str(client) for client in values],
            z=list(map(list, values.values())),
            texttemplate=number if len(names) <= 20 and len(values) <= 40 else None,
            colorbar={"title": {"text": what}, "thickness": 12},
            hovertemplate=f"client %{{y}}, class %{{x}}: {number} {what}<extra></extra>",
            xgap=1,
            ygap=1,
            zmin=0,
        )
    )
    fig.update_xaxes(type="category")
    fig.update_yaxes(type="category", autorange="reversed")
    return fig


def cross_site(accuracies: Mapping[tuple[int, int], float], called: Mapping[int, str]) -> go.Figure:
    """Return the accuracy of each client's model, a row, at each site, a column."""
    numbers = sorted({client for pair in accuracies for client in pair})
    names = [label(client, called) for client in numbers]
    fig = figure("evaluated at", "model of", height=max(280, min(900, 110 + 22 * len(numbers))))
    fig.add_trace(
        go.Heatmap(
            x=names,
            y=names,
            z=[[accuracies.get((model, site)) for site in numbers] for model in numbers],
            texttemplate="%{z:.2f}" if len(numbers) <= 20 else None,
            colorbar={"title": {"text": "accuracy"}, "thickness": 12},
            hovertemplate="model of %{y}, at %{x}: %{z:.4f}<extra></extra>",
            xgap=1,
            ygap=1,
        )
    )
    fig.update_xaxes(type="category")
    fig.update_yaxes(type="category", autorange="reversed")
    return fig


def seconds(metrics: Sequence[Row]) -> go.Figure:
    """Return the seconds of each round, by who took them."""
    fig = figure("round", "seconds", barmode="stack")
    names = {
        "seconds-clients": "clients' training",
        "seconds-diffusion": "learning on the server",
        "seconds-waiting": "waiting for clients",
    }
    parts = {name: [value_of(row, key) for row in metrics] for key, name in names.items()}
    whole = [value_of(row, "seconds-round") for row in metrics]
    taken = [sum(each) for each in zip(*parts.values(), strict=True)]
    rest = [max(0.0, each - of) for each, of in zip(whole, taken, strict=True)]
    _bars(fig, metrics, {**parts, "evaluation, writing, the rest": rest}, "%{y:.2f} s")
    return fig


def megabytes(metrics: Sequence[Row]) -> go.Figure:
    """Return the megabytes of each round, up and down."""
    fig = figure("round", "megabytes", barmode="stack")
    ways = {
        f"{way} ({what})": [value_of(row, f"bytes-{way}") / 1e6 for row in metrics]
        for way, what in (("down", "to the clients"), ("up", "to the server"))
    }
    _bars(fig, metrics, ways, "%{y:.3f} MB")
    return fig


def _bars(
    fig: go.Figure, metrics: Sequence[Row], parts: Mapping[str, list[float]], template: str
) -> None:
    for number, (name, values) in enumerate(parts.items()):
        fig.add_trace(
            go.Bar(
                x=[row["round"] for row in metrics],
                y=values,
                name=name,
                marker={
                    "color": colour(number),
                    "line": {"width": 0},
                    "pattern": {"shape": PATTERNS[number], "size": 6},
                },
                hovertemplate=f"round %{{x}}: {template}",
            )
        )
    label_whole_numbers(fig, (row["round"] for row in metrics))
    fig.update_layout(showlegend=True)
