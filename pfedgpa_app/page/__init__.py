"""One HTML page to look at a run, to compare some, or of a bench.

The figures are functions from what runs left to plotly figures, in `figures` (what every strategy
has) and `method` (what pFedGPA found, over a slider). `runs` and `bench` put them together, and
`html` makes one page of them that needs no network, server or file beside it. Whatever imports
these waits for plotly.
"""

from pathlib import Path

from pfedgpa_app.state import writing


def write_page(file: Path, html: str) -> None:
    """Write a page, whole or not at all.

    Raises
    ------
    WriteError
        If it cannot be written.
    """
    unfinished = file.with_name(file.name + ".unfinished")
    with writing(file):
        try:
            unfinished.write_text(html, encoding="utf-8")
            unfinished.replace(file)
        finally:
            unfinished.unlink(missing_ok=True)
