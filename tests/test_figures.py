"""Figures that are printed: the same bytes again, whole or not at all, readable in grey."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from benchmarks import figures as of_documents
from pfedgpa_app.figures import DASHES, MARKS, Curve, draw_curves, draw_dots, spread
from pfedgpa_app.page import figures as page_figures
from pfedgpa_app.page.figures import lines
from pfedgpa_app.strategies import STRATEGY_INFO

PROJECT = Path(__file__).parents[1]


def curve(name: str, end: float) -> Curve:
    return Curve.over(name, [1, 2, 3], [[0.1, 0.3, end], [0.2, 0.5, end]])


def places_of(file: Path, *names: str) -> list[float]:
    """Return how far down in an SVG names are written, in points."""
    text = file.read_text()
    return [
        float(re.findall(rf'<text [^>]*y="([\d.]+)"[^>]*>{name}</text>', text)[0]) for name in names
    ]


def test_a_curve_has_mean_and_range_of_its_repeats():
    found = Curve.over("a", [1, 2], [[0.0, 0.5], [0.5, 0.5], [1.0, 0.2]])
    assert found == ("a", [1, 2], [0.5, pytest.approx(0.4)], [0.0, 0.2], [1.0, 0.5])


def test_names_of_curves_that_end_together_do_not_overlap(tmp_path: Path):
    names = [f"curve {number}" for number in range(6)]
    draw_curves(tmp_path / "a.png", {"": [curve(name, 0.5) for name in names]}, "title", "note")
    places = sorted(places_of(tmp_path / "a.svg", *names))
    assert all(low + 8 < high for low, high in pairwise(places))


def test_names_of_curves_are_in_the_order_of_their_ends(tmp_path: Path):
    ends = {"low": 0.1, "high": 0.9, "middle": 0.89}
    curves = [curve(name, end) for name, end in ends.items()]
    draw_curves(tmp_path / "a.png", {"": curves}, "title", "note")
    low, high, middle = places_of(tmp_path / "a.svg", *ends)
    assert high < middle < low


def test_the_same_figure_has_the_same_bytes(tmp_path: Path):
    for name in ("a", "b"):
        draw_curves(tmp_path / f"{name}.png", {"": [curve("c", 0.5)]}, "title", "note")
    for suffix in ("png", "svg"):
        first, second = (tmp_path / f"{name}.{suffix}" for name in ("a", "b"))
        assert first.read_bytes() == second.read_bytes()


def test_names_are_written_as_they_are(tmp_path: Path):
    draw_curves(tmp_path / "a.png", {"50 $": [curve("{$x$", 0.5)]}, "5 $, 6 $", "a < b")
    text = (tmp_path / "a.svg").read_text()
    for written in ("50 $", "{$x$", "5 $, 6 $", "a &lt; b"):
        assert f">{written}</text>" in text


def test_strategies_look_the_same_printed_and_on_the_page_and_unlike_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    printed, plot = {}, Axes.plot

    def noting(axes: Axes, *args, **kwargs):
        look = (DASHES.index(kwargs["linestyle"]), MARKS.index(kwargs["marker"]))
        printed[kwargs["label"]] = (kwargs["color"], *look)
        return plot(axes, *args, **kwargs)

    monkeypatch.setattr(Axes, "plot", noting)
    panel = [curve(name, 0.5) for name in STRATEGY_INFO]
    draw_curves(tmp_path / "a.png", {"": panel}, "title", "note")

    def on_page(*names: str) -> dict[str, tuple]:
        curves = lines({name: {1: [0.1], 2: [0.2]} for name in names}).data
        return {
            each.name: (
                each.line.color,
                page_figures.DASHES.index(each.line.dash),
                page_figures.SYMBOLS.index(each.marker.symbol),
            )
            for each in curves
        }

    assert on_page(*STRATEGY_INFO) == printed
    in_grey = {look[1:] for look in printed.values()}
    without_marks = {look[:2] for look in printed.values()}  # as of many rounds
    assert len(in_grey) == len(without_marks) == len(STRATEGY_INFO)
    few = on_page("pfedgpa, affinity", "nearest", "ditto", "pfedgpa", "pfedgpa, alone")
    assert {name: few[name] for name in ("ditto", "pfedgpa")} == {
        name: printed[name] for name in ("ditto", "pfedgpa")
    }
    assert few["pfedgpa, affinity"][0] == few["pfedgpa"][0]
    assert len({look[:2] for look in few.values()}) == len({look[1:] for look in few.values()}) == 5


def test_a_figure_that_cannot_be_written_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save = Figure.savefig

    def full(figure: Figure, file: Path, **settings) -> None:
        if file.suffix == ".svg":
            file.write_text("<svg")
            raise OSError("No space left on device")
        save(figure, file, **settings)

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="No space left"):
        draw_curves(tmp_path / "a.png", {"": [curve("c", 0.5)]}, "title", "note")
    assert not list(tmp_path.iterdir())


def test_dots_have_their_means_beside_them_and_what_is_far_off_is_an_arrow(tmp_path: Path):
    rows = {"pfedgpa": [0.8, 0.9], "fedavg": [0.1, 0.2], "failed": []}
    draw_dots(tmp_path / "a.png", {"case": rows}, "title", {"case": 0.7})
    text = (tmp_path / "a.svg").read_text()
    for written in ("case", "pfedgpa", "fedavg", "failed", "0.850", "0.150"):
        assert f">{written}</text>" in text
    assert ">0.1</text>" not in text
    assert "Arrows are seeds" in text


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_each_case_has_a_panel(tmp_path: Path, number: int):
    cases = [f"case {each}" for each in range(number)]
    draw_dots(tmp_path / "a.png", {case: {"a": [0.5]} for case in cases}, "title")
    assert len(places_of(tmp_path / "a.svg", *cases)) == number


def test_names_are_spread_as_little_as_is_needed():
    assert spread([0.5, 0.1, 0.9], 0.1, 0, 1) == [0.5, 0.1, 0.9]
    assert spread([0.99, 0.98], 0.1, 0, 1) == pytest.approx([1.0, 0.9])
    assert spread([0.0] * 5, 0.5, 0, 1) == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert spread([], 0.1, 0, 1) == []


def test_the_figures_of_the_documents_are_those_of_their_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "conf").symlink_to(PROJECT / "conf")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "results").symlink_to(PROJECT / "docs" / "results")
    monkeypatch.chdir(tmp_path)
    of_documents.main()
    drawn = sorted(tmp_path.glob("docs/*.svg"))
    assert [file.stem for file in drawn] == ["horizons", "onboarding", "shifts", "strategies"]
    for file in drawn:
        # Places differ a little between versions of matplotlib, words do not.
        ours, theirs = (
            re.findall(r"<text[^>]*>([^<]+)</text>", each.read_text())
            for each in (file, PROJECT / "docs" / file.name)
        )
        assert ours == theirs
        sizes = (
            Image.open(each.with_suffix(".png")).size
            for each in (file, PROJECT / "docs" / file.name)
        )
        assert len(set(sizes)) == 1
