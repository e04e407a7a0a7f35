"""The page: sections of figures and tables in one file, with all that they need.

Whatever comes from elsewhere is escaped, and the page's policy lets no script run but its own two,
nor anything be loaded.
"""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from pfedgpa_app.page.script import SCRIPT
from pfedgpa_app.page.style import STYLE

_SAVE = " ".join(
    f'<button class="save" data-as="{kind.lower()}">{kind}</button>' for kind in ("CSV", "SVG")
)


@dataclass(frozen=True)
class Panel:
    """A figure with its title and one or two sentences on how to read it."""

    title: str
    caption: str
    figure: go.Figure
    is_wide: bool = False


def figures(panels: Iterable[Panel]) -> str:
    """Return figures side by side, each with its data, which `whole`'s script draws."""
    shown = ""
    for panel in panels:
        title = escape(panel.title)
        # plotly writes < as \u003c, so that no string of the data ends the script.
        shown += (
            f'<figure class="card{" wide" if panel.is_wide else ""}"><h3>{title}</h3>'
            f"<figcaption>{escape(panel.caption)} {_SAVE}</figcaption>"
            f'<div class="plot" role="img" aria-label="{title}" '
            f'style="min-height:{panel.figure.layout.height}px"></div>'
            f'<script type="application/json">{panel.figure.to_json()}</script></figure>'
        )
    return f'<div class="figures">{shown}</div>'


def whole(title: str, body: str) -> str:
    """Return the page with a title and a body that is HTML."""
    library = get_plotlyjs()
    digests = (hashlib.sha256(each.encode()).digest() for each in (library, SCRIPT))
    scripts = " ".join(f"'sha256-{base64.b64encode(each).decode()}'" for each in digests)
    policy = (
        f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src data: blob:"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head>\n<body><main>\n{body}\n</main>\n"
        f"<script>{library}</script>\n<script>{SCRIPT}</script></body></html>\n"
    )


def numbers(of: Sequence[tuple[str, str]]) -> str:
    """Return the numbers that one looks for first, each with its name."""
    each = (f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in of)
    return f'<dl class="numbers">{"".join(each)}</dl>'


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table of text."""
    lines = [f"<tr>{''.join(f'<td>{escape(str(each))}</td>' for each in row)}</tr>" for row in rows]
    return table_of(head, lines)


def table_of(head: Sequence[str], lines: Iterable[str]) -> str:
    """Return a table of rows that are HTML."""
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    return (
        f'<div class="table" tabindex="0"><table><thead><tr>{names}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def slider(rounds: Sequence[int], name: str) -> str:
    """Return the slider over rounds of the section that it is in, at the last round."""
    last = len(rounds) - 1
    shown = f"Round {rounds[-1]}"
    return (
        f'<div class="rounds"><label for="{name}"><output>{shown}</output></label>'
        f'<input type="range" id="{name}" min="0" max="{last}" value="{last}" step="1" '
        f'aria-valuetext="{shown}" data-rounds="{list(rounds)}"></div>'
    )


def sections(bodies: Sequence[tuple[str, str]]) -> str:
    """Return sections under their names, which open them; all but the first are closed."""
    if len(bodies) == 1:
        return f"<section>{bodies[0][1]}</section>"
    return "".join(
        f"<details class='section'{'' if number else ' open'}><summary>{escape(name)}</summary>"
        f"{body}</details>"
        for number, (name, body) in enumerate(bodies)
    )
