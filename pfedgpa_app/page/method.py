"""Figures of what pFedGPA found, with a frame a round: the plane, the weights, the spectrum."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import pdist

from pfedgpa_app.figures import colour
from pfedgpa_app.page.theme import figure, label_whole_numbers, name_at_ends, plain, symbol
from pfedgpa_app.rounds import Row

Points = dict[int, tuple[float, float]]
# Numbers of all mixing matrices of a page, which has every k-th round where there are more.
_MAX_ENTRIES = 500_000


def thinned(rows: Sequence[Row]) -> list[Row]:
    """Return the rounds that have a place on the slider, the first and the last among them."""
    entries = sum(len(row["clients"]) ** 2 for row in rows)
    every = -(-entries // _MAX_ENTRIES)
    if every <= 1:
        return list(rows)
    return [row for number, row in enumerate(reversed(rows)) if number % every == 0][::-1]


def aligned(rows: Sequence[Row]) -> list[tuple[Points, Points]]:
    """Return uploads and generated models of each round, ``{client: (x, y)}``, in one basis.

    The principal axes of a round have any sign and, where two are about as strong, any order. Each
    round is turned or mirrored (orthogonal Procrustes) onto the round before, by the uploads of the
    clients that both have. Distances stay what they are.
    """
    found: list[tuple[Points, Points]] = []
    before: Points = {}
    for row in rows:
        clients = row["clients"]
        uploads, generated = np.array(row["uploads"]), np.array(row["generated"])
        both = [number for number, client in enumerate(clients) if client in before]
        if both:
            there = np.array([before[clients[number]] for number in both])
            left, _, right = np.linalg.svd(uploads[both].T @ there)
            turn = left @ right
            uploads, generated = uploads @ turn, generated @ turn
        before = _points(clients, uploads)
        found.append((before, _points(clients, generated)))
    return found


def _points(clients: Sequence[int], places: NDArray[np.float64]) -> Points:
    return {client: (x, y) for client, (x, y) in zip(clients, places.tolist(), strict=True)}


def plane(rows: Sequence[Row], groups: Mapping[int, str]) -> go.Figure:
    """Return uploads and what was generated for them, in two principal components.

    ``groups`` has a name for the group of each client, where it is known.
    """
    points = aligned(rows)
    names = sorted({groups.get(client, "") for row in rows for client in row["clients"]})
    frames = []
    for row, (uploads, generated) in zip(rows, points, strict=True):
        traces: list[go.Scatter] = [_ways(uploads, generated)]
        for number, name in enumerate(names):
            mine = [client for client in uploads if groups.get(client, "") == name]
            for places, what in ((uploads, "upload"), (generated, "generated")):
                of_group = {client: places[client] for client in mine}
                traces.append(_group(of_group, name, number, what))
        titles = _axis_titles(row)
        frames.append(go.Frame(name=str(row["round"]), data=traces, layout=titles))
    fig = figure("", "", height=460)
    fig.update_layout(showlegend=True)
    for axis, number in (("xaxis", 0), ("yaxis", 1)):
        values = [place[number] for both in points for each in both for place in each.values()]
        low, high = min(values, default=0.0), max(values, default=1.0)
        margin = 0.06 * (high - low) or 1.0
        fig.update_layout({axis: {"range": [low - margin, high + margin]}})
    return _with_frames(fig, frames)


def _group(places: Points, name: str, number: int, what: str) -> go.Scatter:
    """Return the points of a group: what its clients uploaded, or what was generated for them."""
    is_upload = what == "upload"
    return go.Scatter(
        x=[x for x, _ in places.values()],
        y=[y for _, y in places.values()],
        mode="markers",
        name=plain(name or what),
        legendgroup=name,
        showlegend=is_upload,
        marker={
            "color": colour(number),
            "symbol": symbol(number) if is_upload else f"{symbol(number)}-open",
            "size": 9 if is_upload else 13,
            "line": {"width": 0 if is_upload else 2},
        },
        customdata=list(places),
        hovertemplate=f"client %{{customdata}}, {what}<extra></extra>",
    )


def _axis_titles(row: Row) -> dict[str, Any]:
    """Return the axes' titles; after a turn a share would not be that of a single axis."""
    share = sum(row["explained"])
    return {
        "xaxis": {"title": {"text": f"component 1 (both: {share:.0%} of all)"}},
        "yaxis": {"title": {"text": "component 2"}},
    }


def _ways(uploads: Points, generated: Points) -> go.Scatter:
    """Return the lines from each upload to what was generated for it."""
    x: list[float | None] = []
    y: list[float | None] = []
    for client, (left, low) in uploads.items():
        right, high = generated[client]
        x += [left, right, None]
        y += [low, high, None]
    return go.Scatter(
        x=x,
        y=y,
        mode="lines",
        line={"color": "#888888", "width": 1},
        hoverinfo="skip",
        showlegend=False,
    )


def mixing_weights(rows: Sequence[Row], groups: Mapping[int, str]) -> go.Figure | None:
    """Return each upload's part in what clients receive; None where it was not written down.

    Clients of a group stand together; where no groups are known, those that share most.
    """
    if not any("mixing-weights" in row for row in rows):
        return None
    order = _ordered(rows, groups)
    names = [str(client) for client in order]
    others = [
        part
        for row in rows
        for number, parts in enumerate(row.get("mixing-weights", ()))
        for part in parts[:number] + parts[number + 1 :]
    ]
    frames = []
    for row in rows:
        matrix = {
            one: dict(zip(row["clients"], parts, strict=True))
            for one, parts in zip(row["clients"], row.get("mixing-weights", ()), strict=False)
        }
        z = [[matrix.get(one, {}).get(other) for other in order] for one in order]
        heat = go.Heatmap(
            x=names,
            y=names,
            z=z,
            zmin=min(0.0, *others),
            zmax=max(0.01, *others),
            texttemplate="%{z:.2f}" if len(order) <= 12 else None,
            colorbar={"title": {"text": "part"}, "thickness": 12},
            hovertemplate="client %{y} receives %{z:.3f} of client %{x}'s upload<extra></extra>",
            xgap=1 if len(order) <= 40 else 0,
            ygap=1 if len(order) <= 40 else 0,
        )
        frames.append(go.Frame(name=str(row["round"]), data=[heat]))
    fig = figure("client who uploaded", "client who receives", height=460)
    fig.update_xaxes(type="category")
    fig.update_yaxes(type="category", autorange="reversed")
    return _with_frames(fig, frames)


def _ordered(rows: Sequence[Row], groups: Mapping[int, str]) -> list[int]:
    clients = sorted({client for row in rows for client in row["clients"]})
    if groups:
        return sorted(clients, key=lambda client: (groups.get(client, ""), client))
    last = next(row for row in reversed(rows) if "mixing-weights" in row)
    together: list[int] = last["clients"]
    if len(together) > 2:
        leaves = leaves_list(
            linkage(pdist(np.array(last["mixing-weights"])), optimal_ordering=True)
        )
        together = [together[leaf] for leaf in leaves]
    return together + [client for client in clients if client not in together]


def spectrum(rows: Sequence[Row]) -> go.Figure:
    """Return the variances along the principal axes, the floor, the noise and what is kept."""
    frames = [go.Frame(name=str(row["round"]), data=_spectrum_of(row)) for row in rows]
    every = [v for row in rows for v in (*row.get("spectrum", ()), row.get("noise")) if v]
    # What is far below the rest is rounding.
    low = max(min(every, default=1e-3), 1e-7 * max(every, default=1.0))
    fig = figure("principal axis of the uploads", "variance along it", height=460)
    fig.update_layout(
        showlegend=True,
        yaxis={
            "type": "log",
            "domain": [0.36, 1],
            "range": [np.log10(low) - 0.2, np.log10(max(every, default=1.0)) + 0.2],
            "exponentformat": "power",
            "dtick": 1,
        },
        yaxis2={
            "title": {"text": "part kept"},
            "domain": [0, 0.26],
            "range": [0, 1.05],
            "tickformat": ".0%",
            "anchor": "x",
        },
        xaxis={"anchor": "y2"},
    )
    label_whole_numbers(fig, range(max(len(row.get("spectrum", ())) for row in rows)))
    return _with_frames(fig, frames)


def _spectrum_of(row: Row) -> list[go.Scatter | go.Bar]:
    variances = [value if value > 0 else None for value in row.get("spectrum", ())]
    axes = list(range(1, len(variances) + 1))
    rank = row.get("rank") or 0
    return [
        _axes_of(axes[:rank], variances[:rank], "denoised", 0, "circle"),
        _axes_of(axes[rank:], variances[rank:], "not denoised", 1, "square-open"),
        _level(axes, row.get("floor"), "floor (median)", 2, "dash"),
        _level(axes, row.get("noise"), "noise added", 3, "dot"),
        go.Bar(
            x=axes,
            # Of an axis without bars plotly cannot say where it is, and complains.
            y=row.get("kept", [None] * len(axes))[: len(axes)],
            name="part kept",
            yaxis="y2",
            marker={"color": colour(5)},
            hovertemplate="axis %{x}: %{y:.0%} kept<extra></extra>",
        ),
    ]


def _axes_of(
    axes: list[int], variances: list[float | None], name: str, number: int, shape: str
) -> go.Scatter:
    return go.Scatter(
        x=axes,
        y=variances,
        mode="markers",
        name=name,
        marker={"color": colour(number), "symbol": shape, "size": 9},
        hovertemplate="axis %{x}: variance %{y:.3g}<extra></extra>",
    )


def _level(axes: list[int], value: float | None, name: str, number: int, dashes: str) -> go.Scatter:
    ends = [0.5, len(axes) + 0.5] if value and axes else []
    return go.Scatter(
        x=ends,
        y=[value] * len(ends),
        mode="lines",
        name=name,
        line={"color": colour(number), "dash": dashes, "width": 2},
        hovertemplate=f"{name}: %{{y:.3g}}<extra></extra>",
    )


def levels(rows: Sequence[Row]) -> go.Figure:
    """Return how the strongest variance, the floor and the noise went over the rounds."""
    fig = figure("round", "variance along an axis")
    lines = {
        "strongest axis": [max(row.get("spectrum", ()), default=None) for row in rows],
        "floor": [row.get("floor") for row in rows],
        "noise added": [row.get("noise") for row in rows],
    }
    every = [value for line in lines.values() for value in line if value]
    low, high = min(every, default=1.0), max(every, default=1.0)
    fig.update_yaxes(
        type="log",
        range=[np.log10(low) - 0.2, np.log10(high) + 0.2],
        exponentformat="power",
        dtick=1,
    )
    ends = {}
    for number, (name, values) in enumerate(lines.items()):
        values = [value or None for value in values]
        fig.add_trace(
            go.Scatter(
                x=[row["round"] for row in rows],
                y=values,
                name=name,
                mode="lines+markers" if len(rows) <= 40 else "lines",
                line={"color": colour(number), "dash": ("solid", "dash", "dot")[number]},
                marker={"symbol": symbol(number), "size": 6},
                customdata=[(row.get("rank"), row.get("start")) for row in rows],
                hovertemplate="round %{x}: %{y:.3g}; rank %{customdata[0]}, "
                "timestep %{customdata[1]}",
            )
        )
        last = [value for value in values if value]
        if last:
            ends[name] = (rows[-1]["round"], float(np.log10(last[-1])), colour(number))
    name_at_ends(fig, ends)
    label_whole_numbers(fig, (row["round"] for row in rows))
    return fig


def _with_frames(fig: go.Figure, frames: list[go.Frame]) -> go.Figure:
    """Return a figure that begins with its last frame."""
    fig.frames = frames
    fig.add_traces(frames[-1].data)
    return fig
