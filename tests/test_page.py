"""The page of a run: what its figures show, what it escapes, and that a browser draws it."""

import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import Browser
from plotly.offline import get_plotlyjs
from scipy.stats import binomtest
from typer.testing import CliRunner

from benchmarks.network import wait_until
from pfedgpa_app import cli
from pfedgpa_app.config import Config
from pfedgpa_app.data import client_data
from pfedgpa_app.exported import ExportedModel
from pfedgpa_app.figures import COLOURS
from pfedgpa_app.page import figures, html, method, runs
from pfedgpa_app.page.bench import page_of_bench
from pfedgpa_app.page.holdings import Holdings
from pfedgpa_app.page.runs import grouped, page_of
from pfedgpa_app.report import Run, RunFolder, baselines_of
from pfedgpa_app.rounds import RoundRecord, summarize
from pfedgpa_app.state import WriteError, write_text
from pfedgpa_app.tables import INDEX_KIND

EVIL = "</script><script>window.evil = 1</script><img src=x onerror='window.evil = 2'>\u2028&lt;"
NUM_CLIENTS, ROUNDS = 6, 4
OWN = {"data.shape": "1x8x8", "data.num-classes": 10}


def make_run(path: Path, *, reason: str = "", models: bool = True, **settings: Any) -> Run:
    """Write a run of four rounds by hand; client 5 fails in rounds 2 and 3."""
    config = Config.from_flat({"num-server-rounds": ROUNDS, **settings})
    folder = RunFolder(path, config)
    generator = np.random.default_rng(config.seed)
    for server_round in range(1, ROUNDS + 1):
        record = RoundRecord(
            server_round,
            seconds_clients=2.0,
            seconds_waiting=0.25,
            seconds_diffusion=1.0,
            num_nodes=NUM_CLIENTS,
            bytes_down=3_000_000,
            bytes_up=1_000_000,
        )
        for client in range(NUM_CLIENTS):
            accuracy = (server_round + client / 10 + config.seed / 100) / 10
            record.trained(client, {"accuracy-after": accuracy - 0.01}, 10)
            record.evaluated(client, {"accuracy": accuracy, "loss": 1.0})
        if reason and server_round in (2, 3):
            record.note(NUM_CLIENTS - 1, status=reason)
        rows = [record.clients[client] for client in sorted(record.clients)]
        points = generator.normal(size=(NUM_CLIENTS, 2))
        mixing_weights = np.full((NUM_CLIENTS, NUM_CLIENTS), 0.02) + 0.88 * np.eye(NUM_CLIENTS)
        trace = {
            "members": NUM_CLIENTS,
            "clients": list(range(NUM_CLIENTS)),
            "uploads": points.tolist(),
            "generated": (points / 2).tolist(),
            "explained": [0.6, 0.2],
            "mixing-weights": mixing_weights.tolist(),
            "parameters": 500,
            "spectrum": [5.0, 1.0, 0.5, 0.25, 0.0],
            "floor": 0.5,
            "rank": 1,
            "start": 60,
            "noise": 0.1,
            "kept": [0.9, 0.1, 0.0, 0.0, 0.0],
        }
        is_method = config.strategy == "pfedgpa"
        folder.add_round(summarize(record, config.strategy, 4.0), rows, trace if is_method else {})
    for client in range(NUM_CLIENTS) if models else ():
        site = {"partition": torch.tensor([client, NUM_CLIENTS])}
        folder.save_model(client, {"weight": torch.zeros(1)}, ROUNDS, site)
    return Run.read(path)


class Content(HTMLParser):
    """Collects the text of a page, and the tags that it has."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._open = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_data(self, data: str) -> None:
        (self.scripts if self._open == "script" else self.texts).append(data)

    def handle_endtag(self, tag: str) -> None:
        self._open = ""


def drawn(page: str) -> list[dict]:
    """Return the figures of a page."""
    found = re.findall(r'<script type="application/json">(.+?)</script>', page)
    return [json.loads(data) for data in found]


def test_curves_are_the_metrics_of_the_run(tmp_path: Path):
    run = make_run(tmp_path / "run")
    curve = figures.curve_of([run.metrics], "personalized-accuracy")
    assert curve == {row["round"]: [row["personalized-accuracy"]] for row in run.metrics}
    (line,) = figures.lines({"pfedgpa": curve}).data
    assert line.x == (1, 2, 3, 4)
    # The mean of (round + client / 10) / 10 over six clients.
    assert line.y == pytest.approx([0.125, 0.225, 0.325, 0.425])


def test_a_band_is_the_range_of_the_seeds_and_the_line_their_mean():
    curve = {1: [0.2, 0.4], 2: [0.5, 0.9]}
    band, line = figures.lines({"ours": curve}).data
    assert band.fill == "toself"
    assert (band.x, band.y) == ((1, 2, 2, 1), (0.4, 0.9, 0.5, 0.2))
    assert line.y == pytest.approx((0.3, 0.7))


def test_the_axis_shows_what_the_second_half_of_the_rounds_shows():
    early_and_late = {n: [0.1 * n] for n in range(1, 10)}
    low, high = figures.late_range([early_and_late, {8: [0.95]}])
    assert low == pytest.approx(0.5 - 0.08 * 0.45)
    assert high == pytest.approx(0.95 + 0.08 * 0.45)


@pytest.mark.parametrize(("num_rounds", "dtick"), [(1, 1), (2, 1), (11, 1), (200, None)])
def test_rounds_are_labelled_at_whole_numbers(num_rounds: int, dtick: int | None):
    rows = [{"round": n, "personalized-accuracy": 0.5} for n in range(1, num_rounds + 1)]
    curve = figures.curve_of([rows], "personalized-accuracy")
    axes = (figures.lines({"ours": curve}), figures.seconds(rows))
    assert [fig.layout.xaxis.dtick for fig in axes] == [dtick] * 2


def test_every_curve_has_its_name_in_the_legend_and_a_look_of_its_own():
    curves = {f"strategy {n}": {1: [0.1], 2: [0.5 + n / 1e6]} for n in range(9)}
    figure = figures.lines(curves)
    assert figure.layout.showlegend
    assert [line.name for line in figure.data] == list(curves)
    looks = {(line.line.color, line.line.dash, line.marker.symbol) for line in figure.data}
    assert len(looks) == 9


def test_colours_can_be_told_from_white():
    for colour in COLOURS:
        parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        assert 1.05 / (float(np.dot(linear, (0.2126, 0.7152, 0.0722))) + 0.05) >= 3, colour


def test_clients_are_shown_worst_first_with_their_last_accuracy():
    rows = [
        {"round": 1, "client": 3, "personalized-accuracy": 0.1},
        {"round": 2, "client": 3, "personalized-accuracy": 0.7, "accuracy-after": 0.6},
        {"round": 2, "client": 1, "personalized-accuracy": 0.5},
        {"round": 2, "client": 9, "status": "no reply"},
    ]
    last = figures.last_accuracies(rows)
    assert list(last.items()) == [(1, (0.5, None)), (3, (0.7, 0.6))]
    fig = figures.clients(last, 0.6, {1: 10}, {})
    assert fig.layout.annotations[0].text == "mean 0.6000"
    trained, personalized = fig.data
    assert (personalized.x, personalized.y) == (("1", "3"), (0.5, 0.7))
    assert trained.y == (None, 0.6)
    expected = binomtest(5, 10).proportion_ci(method="wilson")
    low, high = 0.5 - personalized.error_y.arrayminus[0], 0.5 + personalized.error_y.array[0]
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-4)
    assert personalized.error_y.array[1] == 0  # of an unknown number of examples


def test_seconds_and_megabytes_are_those_of_the_rounds(tmp_path: Path):
    metrics = make_run(tmp_path / "run").metrics
    seconds = {bar.name: bar.y for bar in figures.seconds(metrics).data}
    assert seconds == {
        "clients' training": (2.0,) * 4,
        "learning on the server": (1.0,) * 4,
        "waiting for clients": (0.25,) * 4,
        "evaluation, writing, the rest": (0.75,) * 4,
    }
    down, up = figures.megabytes(metrics).data
    assert (down.y[0], up.y[0]) == (3.0, pytest.approx(1.00006))


@pytest.mark.parametrize("shift", ["none", "permuted-labels"])
def test_classes_are_those_of_the_clients_training_images(tmp_path: Path, shift: str):
    run = make_run(tmp_path / "run", **{"data.shift": shift, "seed": 2})
    holdings = Holdings.of(run)
    for client in range(NUM_CLIENTS):
        data = client_data(run.config.data, 2, client, NUM_CLIENTS)
        right = torch.bincount(data.train_labels, minlength=10)
        assert torch.equal(holdings.counts[client], right)
    assert holdings.groups[0] == holdings.groups[2] != holdings.groups[1]
    counts = {client: each.tolist() for client, each in holdings.counts.items()}
    (heat,) = figures.classes(counts, run.config.data.classes).data
    assert heat.y == ("0", "2", "4", "1", "3", "5")
    assert list(heat.z[3]) == holdings.counts[1].tolist()


def test_where_no_groups_are_set_the_most_frequent_class_is_one(tmp_path: Path):
    holdings = Holdings.of(make_run(tmp_path / "run", **{"data.partition": "disjoint"}))
    counts = holdings.counts[3]
    assert holdings.groups[3] == f"mostly {int(counts.argmax())}"


def test_the_floor_is_the_mean_part_of_each_clients_most_frequent_class(tmp_path: Path):
    run = make_run(tmp_path / "run")
    parts = [max(each.tolist()) / int(each.sum()) for each in Holdings.of(run).counts.values()]
    name = "accuracy, always the most frequent class"
    assert f"<dt>{name}</dt><dd>{np.mean(parts):.4f}</dd>" in page_of([run])
    # The test sets have other parts.
    other = make_run(tmp_path / "other", **{"data.test-uniform-fraction": 0.5})
    assert name not in page_of([other])


def test_a_client_that_claims_another_number_of_partitions_has_no_classes(tmp_path: Path):
    run = make_run(tmp_path / "run")
    liar = ExportedModel({"weight": torch.zeros(1)}, run.config, 2, ROUNDS, None, (2, 100_000))
    liar.save(run.path / "models" / "client-2.safetensors")
    assert sorted(Holdings.of(run).counts) == [0, 1, 3, 4, 5]


@pytest.mark.parametrize(
    ("settings", "models", "why"),
    [
        ({}, False, "no model of the run says"),
        ({"data.dataset": "sites", **OWN}, True, "every site has data of its own"),
        ({"data.dataset": "cifar10", "model.name": "cnn-cifar"}, True, "cifar10 was shared out"),
        ({"data.dataset": "no.such:module", **OWN}, True, "no.such:module was shared out"),
    ],
)
def test_what_is_not_known_of_classes_is_said_and_nothing_fetched(
    tmp_path: Path, settings: dict, models: bool, why: str
):
    page = page_of([make_run(tmp_path / "run", models=models, **settings)])
    text = " ".join(Content(page).texts)
    assert re.search(f"Classes of clients are left out: .*{why}", text)
    assert not list(Path.home().rglob("cifar*"))


def test_rounds_are_turned_onto_the_round_before():
    """The same points, turned and mirrored, stay where they were in the first round."""
    generator = np.random.default_rng(1)
    points, made = generator.normal(size=(2, 5, 2))
    rows = []
    for angle, mirror in ((0.0, 1), (2.0, -1), (4.0, 1)):
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        turn = turn @ np.diag([1, mirror])
        rows.append(
            {
                "clients": [4, 1, 2, 7, 9],
                "uploads": (points @ turn).tolist(),
                "generated": (made @ turn).tolist(),
            }
        )
    for uploads, generated in method.aligned(rows):
        assert list(uploads) == [4, 1, 2, 7, 9]
        np.testing.assert_allclose(list(uploads.values()), points, atol=1e-12)
        np.testing.assert_allclose(list(generated.values()), made, atol=1e-12)


def test_clients_that_come_later_are_turned_with_the_others():
    first = {"clients": [0, 1], "uploads": [[1, 0], [-1, 0]], "generated": [[1, 0], [-1, 0]]}
    second = {
        "clients": [0, 1, 2],
        "uploads": [[-1, 0], [1, 0], [3, 0]],
        "generated": [[0, 0]] * 3,
    }
    assert method.aligned([first, second])[1][0][2] == pytest.approx((-3, 0))


def test_the_figures_of_the_method_have_a_frame_a_round_with_its_numbers(tmp_path: Path):
    rows = make_run(tmp_path / "run").method
    groups = {client: f"group {client % 2}" for client in range(NUM_CLIENTS)}
    plane = method.plane(rows, groups)
    heat = method.mixing_weights(rows, groups)
    spectrum = method.spectrum(rows)
    for figure in (plane, heat, spectrum):
        assert [frame.name for frame in figure.frames] == ["1", "2", "3", "4"]
    first = plane.frames[0]
    assert [trace.name for trace in first.data[1:]] == ["group 0"] * 2 + ["group 1"] * 2
    assert list(first.data[1].customdata) == [0, 2, 4]
    assert first.data[1].x == pytest.approx([rows[0]["uploads"][client][0] for client in (0, 2, 4)])
    assert len({trace.marker.symbol for trace in first.data[1:]}) == 4
    matrix = heat.frames[2].data[0]
    assert matrix.y == ("0", "2", "4", "1", "3", "5")
    assert matrix.z[1][1] == pytest.approx(0.9)
    assert matrix.zmax == pytest.approx(0.02)
    denoised, other, floor, noise, kept = spectrum.frames[0].data
    assert (denoised.y, other.y) == ((5.0,), (1.0, 0.5, 0.25, None))
    assert (set(floor.y), set(noise.y)) == ({0.5}, {0.1})
    assert kept.y == (0.9, 0.1, 0.0, 0.0, 0.0)


def test_clients_without_groups_stand_beside_those_they_share_with():
    mixing_weights = [[0.5, 0.0, 0.5, 0.0], [0.0, 0.5, 0.0, 0.5]] * 2
    row = {"round": 1, "clients": [0, 1, 2, 3], "mixing-weights": mixing_weights}
    order = method.mixing_weights([row], {}).frames[0].data[0].x
    assert {frozenset(order[:2]), frozenset(order[2:])} == {
        frozenset({"0", "2"}),
        frozenset({"1", "3"}),
    }


def test_a_long_run_of_many_clients_has_some_rounds_on_the_slider():
    rows = [{"round": n, "clients": list(range(100))} for n in range(1, 201)]
    thinned = method.thinned(rows)
    assert thinned[-1]["round"] == 200
    assert 20 <= len(thinned) <= 50
    assert method.thinned(rows[:10]) == rows[:10]


def test_runs_that_differ_in_the_seed_are_one_curve_named_by_what_sets_it_apart(tmp_path: Path):
    several = [
        make_run(tmp_path / "0"),
        make_run(tmp_path / "1", seed=1),
        make_run(tmp_path / "2", **{"diffusion.fidelity": 0.5}),
        make_run(tmp_path / "3", strategy="fedavg"),
    ]
    groups = {name: [run.path.name for run in each] for name, each in grouped(several).items()}
    assert groups == {
        "pfedgpa, diffusion.fidelity=0.3": ["0", "1"],
        "pfedgpa, diffusion.fidelity=0.5": ["2"],
        "fedavg": ["3"],
    }


def test_a_name_begins_with_what_tells_most_apart(tmp_path: Path):
    several = [
        make_run(tmp_path / str(size), **{"client.local-epochs": epochs, "client.batch-size": size})
        for epochs, size in ((1, 5), (2, 6), (2, 7))
    ]
    assert list(grouped(several)) == [
        "pfedgpa, client.batch-size=5, client.local-epochs=1",
        "pfedgpa, client.batch-size=6, client.local-epochs=2",
        "pfedgpa, client.batch-size=7, client.local-epochs=2",
    ]


def test_a_page_of_many_clients_shows_the_worst(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runs, "_MAX_CLIENTS", 2)
    page = page_of([make_run(tmp_path / "run")])
    assert drawn(page)[1]["data"][1]["x"] == ["0", "1"]
    assert drawn(page)[2]["data"][0]["y"] == ["0", "2"]
    assert page.count("Of 6 clients, the first 2.") == 2
    assert drawn(page)[1]["layout"]["annotations"][0]["text"] == "mean 0.4250"


def test_what_a_client_says_is_text(tmp_path: Path):
    page = page_of([make_run(tmp_path / "run", reason=EVIL)])
    content = Content(page)
    assert any(EVIL in text for text in content.texts)
    assert [tag for tag, _ in content.tags].count("script") == len(drawn(page)) + 2
    assert not [tag for tag, _ in content.tags if tag == "img"]
    assert "2-3" in content.texts


def test_names_of_classes_and_groups_have_no_tags(tmp_path: Path):
    (heat,) = figures.classes({0: [1]}, [EVIL]).data
    plane = method.plane(make_run(tmp_path / "run").method, {0: EVIL})
    assert "<" not in str((heat.x, [trace.name for trace in plane.data]))


def test_data_in_the_page_cannot_end_its_script():
    figure = figures.lines({EVIL: {1: [0.1], 2: [0.2]}})
    figure.add_scatter(customdata=[EVIL])
    page = html.whole(EVIL, html.figures([html.Panel(EVIL, EVIL, figure)]))
    content = Content(page)
    assert len(content.scripts) == 3
    line, other = drawn(page)[0]["data"]
    assert "<" not in line["name"]
    assert other["customdata"] == [EVIL]
    assert EVIL in content.texts


def test_a_page_has_plotly_once_and_asks_for_nothing(tmp_path: Path):
    both = [make_run(tmp_path / "0"), make_run(tmp_path / "1", strategy="local")]
    page = page_of(both)
    assert page.count(get_plotlyjs()) == 1
    rest = page.replace(get_plotlyjs(), "")
    assert not re.search(r"https?://", rest)
    policy = next(each["content"] for tag, each in Content(page).tags if "http-equiv" in each)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")


def test_settings_that_differ_from_the_defaults_are_marked(tmp_path: Path):
    page = page_of([make_run(tmp_path / "run", **{"diffusion.fidelity": 0.55})])
    marked = re.findall(r'<tr class="marked"><td><code>([^<]+)</code></td><td>([^<]+)', page)
    assert marked == [("num-server-rounds", "4"), ("diffusion.fidelity", "0.55")]
    assert "<code>fedprox.mu" not in page  # another strategy's
    assert "<code>pfedgpa run -c num-server-rounds=4 -c diffusion.fidelity=0.55 --clients" in page


def test_the_command_of_a_run_on_sites_names_a_superlink_and_no_partition(tmp_path: Path):
    sites = {"data.dataset": "sites", "data.class-names": "a,b", "data.shape": "1x8x8"}
    page = page_of([make_run(tmp_path / "run", **sites)])
    assert " --superlink NAME</code>" in page
    assert "--clients" not in page
    assert "pfedgpa on sites, seed 0;" in page


def test_a_page_compares_a_run_with_others_of_the_same_settings(tmp_path: Path):
    make_run(tmp_path / "local", strategy="local")
    make_run(tmp_path / "seed", strategy="fedavg", seed=1)
    run = make_run(tmp_path / "ours")
    curves = {curve["name"]: curve["line"]["color"] for curve in drawn(page_of([run]))[0]["data"]}
    assert next(iter(curves)) == "pfedgpa"
    assert list(curves)[-1] == "local"  # not the fedavg of another seed
    assert len({curves[name] for name in curves if name.startswith("pfedgpa")}) == 1
    assert curves["local"] != curves["pfedgpa"]
    alone = make_run(tmp_path / "other" / "ours")
    assert "No run of local or fedavg to compare with: the command above with" in page_of([alone])
    assert "No run of fedavg to compare with" in page_of([run])
    # On a network it is not known before a run how many clients there will be.
    for number, found in ((None, {"local"}), (run.num_nodes, {"local"}), (99, set())):
        assert baselines_of(run.config, tmp_path, number).keys() == found


def test_a_page_leads_with_what_two_classes_need(tmp_path: Path):
    settings = {"data.dataset": "breast-cancer", "model.name": "mlp", "data.dominant-classes": 1}
    RunFolder(tmp_path / "run", Config.from_flat(settings))
    (tmp_path / "run" / "metrics.jsonl").write_text(
        json.dumps(
            {
                "round": 1,
                "personalized-accuracy": 0.9,
                "personalized-accuracy-error": 0.01,
                "personalized-balanced-accuracy": 0.7,
                "personalized-auroc": 0.8,
            }
        )
    )
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write("\n")
    recalls = {"personalized-recall-1": 0.25, "num-test-examples": 40}
    row = {"round": 1, "client": 0, "personalized-accuracy": 0.9, **recalls}
    (tmp_path / "run" / "clients.jsonl").write_text(json.dumps(row) + "\n")
    page = page_of([Run.read(tmp_path / "run")])
    names = re.findall(r"<dt>([^<]+)</dt><dd>([^<]+)</dd>", page)
    assert names[:3] == [
        ("balanced accuracy", "0.7000"),
        ("AUROC", "0.8000"),
        ("accuracy", "0.9000 ± 0.0196"),
    ]
    assert ("test examples", "40") in names
    found = drawn(page)
    assert [curve["name"] for curve in found[0]["data"]] == ["balanced accuracy", "AUROC"]
    assert found[3]["data"][0]["z"] == [[None, 0.25]]


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path):
    RunFolder(tmp_path / "run", Config())
    page = page_of([Run.read(tmp_path / "run")])
    assert "0 of 10" in page
    assert drawn(page) == []


def write_bench(folder: Path) -> None:
    """Write what a bench of one row and two seeds leaves."""
    (folder / "runs").mkdir(parents=True)
    finished = []
    for seed in (0, 1):
        rounds = [{"round": n, "personalized-accuracy": n / 10 + seed / 100} for n in (1, 2, 3)]
        (folder / "runs" / f"{seed}.json").write_text(json.dumps({"rounds": rounds}))
        finished.append({"case": "a & b", "row": "ours", "seed": seed, "file": f"runs/{seed}.json"})
    cells = {"ours": [["0.3050 ± 0.0071", "best"]], "<theirs>": [["failed", ""]]}
    tables = [{"title": "Suite", "columns": ["a & b"], "rows": cells, "note": "Two seeds."}]
    index = {"kind": INDEX_KIND, "title": "Suite", "tables": tables, "runs": finished}
    (folder / "suite.json").write_text(json.dumps(index))
    (folder / "notes.json").write_text("[]")


def test_a_bench_has_its_tables_and_a_curve_a_row(tmp_path: Path):
    write_bench(tmp_path / "bench")
    page = page_of_bench(tmp_path / "bench")
    assert "<strong>0.3050 ± 0.0071</strong>" in page
    assert "&lt;theirs&gt;" in page
    (figure,) = drawn(page)
    band, line = figure["data"]
    assert line["y"] == pytest.approx([0.105, 0.205, 0.305])
    assert band["y"] == pytest.approx([0.11, 0.21, 0.31, 0.3, 0.2, 0.1])


def test_a_bench_that_evaluated_once_has_its_tables_alone(tmp_path: Path):
    write_bench(tmp_path / "bench")
    for file in (tmp_path / "bench" / "runs").iterdir():
        file.write_text(json.dumps({"rounds": [{"round": 3, "personalized-accuracy": 0.3}]}))
    page = page_of_bench(tmp_path / "bench")
    assert drawn(page) == []
    assert "0.3050 ± 0.0071" in page


@pytest.mark.parametrize(
    "damage",
    [
        lambda index: index.pop("runs"),
        lambda index: index["tables"][0]["rows"].update(x=3),
        lambda index: index["tables"][0]["rows"]["ours"].append(["0.5", "odd"]),
    ],
)
def test_a_damaged_bench_is_said_in_a_line(tmp_path: Path, damage: Callable[[Any], Any]):
    write_bench(tmp_path / "bench")
    file = tmp_path / "bench" / "suite.json"
    index = json.loads(file.read_text())
    damage(index)
    file.write_text(json.dumps(index))
    result = invoke(tmp_path / "bench", "-o", tmp_path / "page.html")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"{file} is damaged: ")


def test_numbers_that_are_not_known_count_as_none(tmp_path: Path):
    run = make_run(tmp_path / "run")
    unknown = dict.fromkeys(("bytes-up", "bytes-down", "seconds-round", "num-failures"))
    run.metrics.append({"round": 5, **unknown})
    page = page_of([run])
    assert "16 s" in page
    assert drawn(page)[-1]["data"][0]["y"] == [3.0] * 4 + [0.0]


def invoke(*arguments: object):
    return CliRunner().invoke(cli.app, ["report", *map(str, arguments)])


def test_the_command_writes_a_page_and_no_other_file(tmp_path: Path):
    make_run(tmp_path / "runs" / "7")
    output = tmp_path / "page.html"
    result = invoke("7", "-o", output, "--output-dir", tmp_path / "runs")
    assert result.exit_code == 0, result.stderr
    assert output.read_text().startswith("<!DOCTYPE html>")
    assert {file.name for file in tmp_path.iterdir()} == {"runs", "page.html"}
    again = invoke(tmp_path / "runs" / "7", "-o", output)
    assert again.exit_code == 1
    assert "exists; --force writes in its place" in again.stderr
    assert invoke(tmp_path / "runs" / "7", "-o", output, "--force").exit_code == 0


def test_the_command_says_what_is_no_run(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    result = invoke(tmp_path / "folder", "-o", tmp_path / "page.html")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "is not the folder of a run" in result.stderr
    write_bench(tmp_path / "bench")
    make_run(tmp_path / "run")
    result = invoke(tmp_path / "bench", tmp_path / "run", "-o", tmp_path / "page.html")
    assert "right would be it alone" in result.stderr
    result = invoke(tmp_path / "run", tmp_path / "bench" / ".." / "run", "-o", tmp_path / "a.html")
    assert result.exit_code == 1
    assert "right would be each run once" in result.stderr


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path: Path):
    (tmp_path / "page.html").mkdir()
    with pytest.raises(WriteError, match=r"page\.html cannot be written"):
        write_text(tmp_path / "page.html", "page")
    assert {file.name for file in tmp_path.iterdir()} == {"page.html"}


DRAWN = """[...document.querySelectorAll(".plot")].map((plot) => ({
  shown: plot.checkVisibility(),
  drawn: plot.querySelectorAll("svg.main-svg").length > 0
    && plot.querySelectorAll(".trace, .hm, .heatmaplayer image, .point").length > 0,
}))"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.mark.processes
@pytest.mark.chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_draws_every_figure_and_has_nothing_to_complain_of(
    tmp_path: Path, browser: Browser, width: int
):
    several = [
        make_run(tmp_path / "ours", reason=EVIL),
        make_run(tmp_path / "second", seed=1),
        make_run(tmp_path / "theirs", strategy="fedavg"),
    ]
    with (tmp_path / "second" / "method.jsonl").open("a") as rows:
        nothing_denoised = several[1].method[-1] | {"round": 5}
        for name in ("rank", "start", "noise", "kept"):
            del nothing_denoised[name]
        rows.write(json.dumps(nothing_denoised) + "\n")
    file = tmp_path / "page.html"
    write_text(file, page_of(several))
    browser.open(file, width)
    seen: set[int] = set()
    sections = browser.run("document.querySelectorAll('.section > summary').length")
    assert sections == 3
    for number in range(sections):
        if number:  # the first is open
            browser.run(f"document.querySelectorAll('.section > summary')[{number}].click()")
        wait_until(lambda: all(plot["drawn"] for plot in browser.run(DRAWN) if plot["shown"]))
        plots = browser.run(DRAWN)
        seen |= {number for number, plot in enumerate(plots) if plot["shown"]}
    assert seen == set(range(len(plots)))
    for kind in ("csv", "svg"):
        browser.run("HTMLAnchorElement.prototype.click = function () { window.saved = this }")
        browser.run(f"document.querySelector('.save[data-as={kind}]').click()")
        wait_until(lambda: browser.run("Boolean(window.saved)"))
        name, link = browser.run("[saved.download, decodeURIComponent(saved.href)]")
        browser.run("delete window.saved")
        assert name == f"Accuracy-personalized.{kind}"
        assert ("<svg" if kind == "svg" else '"pfedgpa",4,') in link
    assert browser.run("document.documentElement.scrollWidth") <= width
    browser.resize(width - 60)
    sizes = "[...document.querySelectorAll('.plot')].filter(p => p.checkVisibility()).map(p => "
    sizes += "p.clientWidth - p.querySelector('.main-svg').clientWidth)"
    wait_until(lambda: set(browser.run(sizes)) == {0})
    assert browser.run("window.evil") is None
    assert browser.errors == []
    loaded = {url for url in browser.requests if not url.startswith("data:")}
    assert loaded == {file.as_uri()[:100]}


@pytest.mark.processes
@pytest.mark.chromium
def test_the_slider_goes_through_the_rounds_by_the_keyboard(tmp_path: Path, browser: Browser):
    run = make_run(tmp_path / "run")
    file = tmp_path / "page.html"
    write_text(file, page_of([run]))
    shown = "document.querySelector('.moved .plot').data[1]"
    browser.open(file)
    browser.run("document.querySelector('input[type=range]').focus()")
    places = [list(uploads.values()) for uploads, _ in method.aligned(run.method)]
    for server_round in (4, 3, 2):
        assert browser.run("document.querySelector('output').textContent") == (
            f"Round {server_round}"
        )
        x = browser.run(f"Array.from({shown}.x)")
        assert x == pytest.approx([places[server_round - 1][client][0] for client in (0, 2, 4)])
        browser.press("ArrowLeft")
    assert browser.errors == []
