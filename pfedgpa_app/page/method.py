"""Figures of what pFedGPA found, with a frame a round: the plane, the weights, the spectrum."""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import pdist

from pfedgpa_app.figures import colour
from pfedgpa_app.page.figures import figure, heat, label_whole_numbers, matrix, plain, symbol
from pfedgpa_app.rounds import Row

Points = dict[int, tuple[float, float]]
# Numbers of all mixing matrices of a page, which has every k-th round where there are more.
_MAX_ENTRIES = 500_000


def thinned(rows: Sequence[Row]) -> list[Row]:
    """Return the rounds that have a place on the slider, the last among them."""
    entries = sum(len(row["clients"]) ** 2 for row in rows)
    every = max(1, -(-entries // _MAX_ENTRIES))
    return list(rows[::-1][::every][::-1])


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
        both = [number for number, client in enumerate(clients) if client in before]
        turn = np.eye(2)
        if both:
            there = np.array([before[clients[number]] for number in both])
            left, _, right = np.linalg.svd(np.array(row["uploads"])[both].T @ there)
            turn = left @ right
        before, generated = (
            dict(zip(clients, map(tuple, (np.array(row[name]) @ turn).tolist()), strict=True))
            for name in ("uploads", "generated")
        )
        found.append((before, generated))
    return found


def plane(rows: Sequence[Row], groups: Mapping[int, str]) -> go.Figure:
    """Return uploads and what was generated for them, in two principal components.

    ``groups`` has a name for the group of each client, where it is known.
    """
    points = aligned(rows)
    names = sorted({groups.get(client, "") for row in rows for client in row["clients"]})
    frames = []
    for row, (uploads, generated) in zip(rows, points, strict=True):
        ends = [(*uploads[client], *generated[client]) for client in uploads]
        traces = [
            go.Scatter(
                x=[x for left, _, right, _ in ends for x in (left, right, None)],
                y=[y for _, low, _, high in ends for y in (low, high, None)],
                mode="lines",
                line={"color": "#888888", "width": 1},
                hoverinfo="skip",
                showlegend=False,
            )
        ]
        for number, name in enumerate(names):
            group = [client for client in uploads if groups.get(client, "") == name]
            for places, what in ((uploads, "upload"), (generated, "generated")):
                is_upload = what == "upload"
                marker = {
                    "color": colour(number),
                    "symbol": symbol(number) if is_upload else f"{symbol(number)}-open",
                    "size": 9 if is_upload else 13,
                    "line": {"width": 0 if is_upload else 2},
                }
                traces.append(
                    go.Scatter(
                        x=[places[client][0] for client in group],
                        y=[places[client][1] for client in group],
                        mode="markers",
                        name=plain(name or what),
                        legendgroup=name,
                        showlegend=is_upload,
                        marker=marker,
                        customdata=group,
                        hovertemplate=f"client %{{customdata}}, {what}<extra></extra>",
                    )
                )
        # After a turn, a part of the variance would not be that of a single axis.
        both = f"component 1 (both: {sum(row['explained']):.0%} of all)"
        titles = {"xaxis": {"title": {"text": both}}}
        frames.append(go.Frame(name=str(row["round"]), data=traces, layout=titles))
    fig = figure("", "component 2", height=460)
    for axis, number in (("xaxis", 0), ("yaxis", 1)):
        values = [place[number] for both in points for each in both for place in each.values()]
        margin = 0.06 * (max(values) - min(values)) or 1.0
        fig.update_layout({axis: {"range": [min(values) - margin, max(values) + margin]}})
    return _with_frames(fig, frames)


def mixing_weights(rows: Sequence[Row], groups: Mapping[int, str]) -> go.Figure | None:
    """Return each upload's part in what clients receive; None where it was not written down.

    Clients of a group stand together; where no groups are known, those that share most.
    """
    weights: list[dict[tuple[int, int], float]] = [
        {
            (one, other): part
            for one, parts in zip(row["clients"], row.get("mixing-weights", ()), strict=False)
            for other, part in zip(row["clients"], parts, strict=True)
        }
        for row in rows
    ]
    if not any(weights):
        return None
    order = _ordered(rows, groups)
    names = list(map(str, order))
    others = [part for each in weights for (one, other), part in each.items() if one != other]
    hover = "client %{y} receives %{z:.3f} of client %{x}'s upload"
    low, high = min(0.0, *others), max(0.01, *others)
    frames = []
    for row, of_pair in zip(rows, weights, strict=True):
        z = [[of_pair.get((one, other)) for other in order] for one in order]
        trace = heat(names, names, z, "part", hover, zmin=low, zmax=high)
        frames.append(go.Frame(name=str(row["round"]), data=[trace]))
    fig = matrix("client who uploaded", "client who receives", frames[-1].data[0])
    fig.frames = frames
    return fig


def _ordered(rows: Sequence[Row], groups: Mapping[int, str]) -> list[int]:
    clients = sorted({client for row in rows for client in row["clients"]})
    if groups:
        return sorted(clients, key=lambda client: groups.get(client, ""))
    last = next(row for row in reversed(rows) if "mixing-weights" in row)
    together: list[int] = last["clients"]
    if len(together) > 2:
        tree = linkage(pdist(np.array(last["mixing-weights"])), optimal_ordering=True)
        together = [together[leaf] for leaf in leaves_list(tree)]
    return together + [client for client in clients if client not in together]


def spectrum(rows: Sequence[Row]) -> go.Figure:
    """Return the variances along the principal axes, the floor, the noise and what is kept."""
    frames = [go.Frame(name=str(row["round"]), data=_spectrum_of(row)) for row in rows]
    every = [v for row in rows for v in (*row.get("spectrum", ()), row.get("noise")) if v]
    # What is far below the rest is rounding.
    low = max(min(every, default=1e-3), 1e-7 * max(every, default=1.0))
    fig = figure("principal axis of the uploads", "variance along it", height=460)
    fig.update_layout(
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
    points = (
        ("denoised", axes[:rank], variances[:rank], "circle"),
        ("not denoised", axes[rank:], variances[rank:], "square-open"),
    )
    levels = (
        ("floor (median)", row.get("floor"), "dash"),
        ("noise added", row.get("noise"), "dot"),
    )
    ends = [0.5, len(axes) + 0.5]
    return [
        *(
            go.Scatter(
                x=x,
                y=y,
                mode="markers",
                name=name,
                marker={"color": colour(number), "symbol": shape, "size": 9},
                hovertemplate="axis %{x}: variance %{y:.3g}<extra></extra>",
            )
            for number, (name, x, y, shape) in enumerate(points)
        ),
        *(
            go.Scatter(
                x=ends if value else [],
                y=[value, value] if value else [],
                mode="lines",
                name=name,
                line={"color": colour(number), "dash": dash, "width": 2},
                hovertemplate=f"{name}: %{{y:.3g}}<extra></extra>",
            )
            for number, (name, value, dash) in enumerate(levels, start=2)
        ),
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


def _with_frames(fig: go.Figure, frames: list[go.Frame]) -> go.Figure:
    """Return a figure that begins with its last frame."""
    fig.frames = frames
    fig.add_traces(frames[-1].data)
    return fig
