"""Suites of whole runs, and the tables that come of them."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from benchmarks.network import PATIENCE, wait_until
from pfedgpa_app.console import DEBUG
from pfedgpa_app.page.bench import page_of_bench
from pfedgpa_app.report import Run, RunFolder
from pfedgpa_app.strategies import FedProxConfig
from pfedgpa_app.tables import CSV_HEAD, Cell, Table, compare, p_value
from server_app import bench, bench_tables
from server_app.cli import app
from server_app.suites import Suite

PROJECT = Path(__file__).parents[1]

SUITE = """
title = "Two rivals"
clients = 3
seeds = [0, 1]
evaluated-rounds = 2
measures = ["bytes-up"]

[settings]
num-server-rounds = 3
data.train-samples = 20
data.test-samples = 10
client.local-epochs = 1

[rows.local]
strategy = "local"

[rows.ditto]
strategy = "ditto"

[quick]
seeds = [0]
clients = 2
evaluated-rounds = 1
rows = ["local"]
settings = { num-server-rounds = 1 }
"""


def rows_of(number: int, accuracy: float, **scores: float) -> list[dict[str, float]]:
    row = {"round": number, "personalized-accuracy": accuracy, **scores}
    return [{"client": client, **row} for client in range(3)]


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(PROJECT)
    file = tmp_path / "suite.toml"
    file.write_text(SUITE)
    return file


def invoke(*arguments: object):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def results(folder: Path) -> dict[str, dict]:
    """Return all results by name, without what no two runs have in common."""
    found = {}
    for file in (folder / "runs").glob("*.json"):
        result = json.loads(file.read_text())
        seconds = [row.pop(name) for row in result["rounds"] for name in list(row) if "sec" in name]
        assert result.pop("seconds") > 0
        assert seconds
        found[result["name"]] = result
    return found


def test_a_suite_ends_with_tables_and_a_figure_whatever_the_number_of_processes(
    suite: Path, tmp_path: Path
):
    here = invoke(suite, "--processes", 0, "--results", tmp_path / "here")
    assert here.exit_code == 0, here.output
    assert "4 runs, 0 finished before, 4 to go" in here.output
    pool = invoke(suite, "--rows", "ditto", "--processes", 2, "--results", tmp_path / "pool")
    assert pool.exit_code == 0, pool.output
    found = results(tmp_path / "here")
    assert found.keys() == {f"{row}, seed {seed}" for row in ("local", "ditto") for seed in (0, 1)}
    ditto = {name: result for name, result in found.items() if name.startswith("ditto")}
    assert results(tmp_path / "pool") == ditto
    for suffix in ("txt", "md", "tex", "csv"):
        text = (tmp_path / "here" / f"suite.{suffix}").read_text()
        assert "local" in text
        assert ("pfedgpa bench" in text) == (suffix != "csv")
    latex = (tmp_path / "here" / "suite.tex").read_text()
    labels = re.findall(r"\\label{(.+?)}", latex)
    assert labels == ["tab:suite", "tab:suite-bytes-up"]
    captions = re.findall(r"\\caption{(.+?)}\n", latex)
    assert [caption.partition(". ")[0] for caption in captions] == [
        "Two rivals",
        "Two rivals: bytes-up",
    ]
    assert "pfedgpa bench" not in "".join(captions)
    with (tmp_path / "here" / "suite.csv").open() as stream:
        rows = {row["row"]: row for row in csv.DictReader(stream) if row["table"] == "Two rivals"}
    for name in ("local", "ditto"):
        # The mean of the last two rounds over clients, then over seeds, once more.
        seeds = [
            np.mean([list(each.values()) for each in found[f"{name}, seed {seed}"]["accuracies"]])
            for seed in (0, 1)
        ]
        assert float(rows[name]["mean"]) == pytest.approx(np.mean(seeds), abs=1e-6)
        assert float(rows[name]["std"]) == pytest.approx(np.std(seeds, ddof=1), abs=1e-6)
    assert "mean of the last 2 rounds of 3" in here.output
    assert (tmp_path / "here" / "suite.png").stat().st_size > 1000
    texts = texts_of(tmp_path / "here" / "suite.svg")
    for name in ("local", "ditto"):
        # Beside its dots, a row has its mean.
        assert {name, f"{float(rows[name]['mean']):.3f}"} <= texts
    page = page_of_bench(tmp_path / "here")
    first = re.findall(r'json">(.+?)</script>', page)[0]
    personalized = {curve.get("name", "band"): curve["y"] for curve in json.loads(first)["data"]}
    for name in ("local", "ditto"):
        rounds = [found[f"{name}, seed {seed}"]["rounds"][-2:] for seed in (0, 1)]
        evaluated = [[row["personalized-accuracy"] for row in each] for each in rounds]
        assert personalized[name] == pytest.approx(np.mean(evaluated, axis=0))


def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let runs write results without computing them; return the names of those executed."""
    executed: list[str] = []

    def write(run: bench.BenchRun, folder: Path) -> None:
        executed.append(run.name)
        row = {"num-clients": 3, "num-failures": 0, "personalized-accuracy": 0.5, "bytes-up": 5}
        numbers = range(1, run.config.num_server_rounds + 1)
        clients = [row for number in numbers for row in rows_of(number, 0.5)]
        run.write(folder, [{"round": number, **row} for number in numbers], clients, 1.0)

    monkeypatch.setattr(bench.BenchRun, "execute", write)
    return executed


def test_what_is_finished_is_not_run_again(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, executed = tmp_path / "results", written(monkeypatch)
    first = invoke(suite, "--rows", "local", "--processes", 0, "--results", folder)
    assert first.exit_code == 0, first.output
    printed = invoke(suite, "--rows", "local", "--results", folder, "--json")
    (index,) = folder.glob("*.json")
    assert json.loads(printed.stdout) == json.loads(index.read_text())
    assert "0 to go" in printed.stderr
    executed.clear()
    second = invoke(suite, "--processes", 0, "--results", folder)
    assert "4 runs, 2 finished before, 2 to go" in second.output
    assert executed == ["ditto, seed 0", "ditto, seed 1"]
    damaged = next((folder / "runs").glob("*.json"))
    damaged.write_text("{")
    invoke(suite, "--processes", 0, "--results", folder)
    assert len(executed) == 3
    invoke(suite, "--rows", "local", "--processes", 0, "--results", folder, "--fresh")
    assert executed[3:] == ["local, seed 0", "local, seed 1"]


def test_rows_and_cases_are_chosen_by_how_their_names_begin(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    written(monkeypatch)
    arguments = ("--seeds", "0", "--processes", 0, "--results", tmp_path)
    one = invoke(suite, "--rows", "loc", *arguments)
    assert "1 run, " in one.output
    both = invoke(suite, "--rows", "ditto", "--rows", "loc", *arguments)
    assert "2 runs, 1 finished before" in both.output
    with (tmp_path / "suite-ditto-loc-0.csv").open() as stream:
        assert list(dict.fromkeys(cell["row"] for cell in csv.DictReader(stream))) == [
            "local",
            "ditto",
        ]
    with suite.open("a") as stream:
        stream.write('\n[rows."local, again"]\nstrategy = "local"\nclient.momentum = 0.5\n')
    exact = invoke(suite, "--rows", "local", *arguments)
    assert "1 run, 1 finished before" in exact.output
    wrong = invoke(suite, "--rows", "ditto", "--rows", "fedfoo", *arguments)
    assert wrong.exit_code == 1
    assert 'there are "local", "ditto", "local, again"' in " ".join(wrong.output.split())


def test_whatever_decides_about_a_result_is_in_its_name(suite: Path, tmp_path: Path):
    run = Suite.read(suite).runs()[0]
    changed = {"seed": 5, "num_server_rounds": 4, "strategy": "fedavg"}
    others = [
        replace(run, clients=4),
        replace(run, evaluated_rounds=1),
        replace(run, superlink="site"),
        *(
            replace(run, config=run.config.model_copy(update={name: value}))
            for name, value in changed.items()
        ),
    ]
    assert len({each.file(tmp_path) for each in (run, *others)}) == 7
    # What it is called does not, nor what other strategies are set to.
    same = run.config.model_copy(update={"fedprox": FedProxConfig(mu=5.0)})
    assert replace(run, row="x", case="y", config=same).file(tmp_path) == run.file(tmp_path)


def test_a_failed_run_is_reported_and_the_others_go_on(
    suite: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    # Only in its middle does a step size turn out to be too large.
    suite.write_text(SUITE + "\n[rows.diverging]\nclient.learning-rate = 1e30\n")
    result = invoke(suite, "--seeds", "0", "--processes", 2, "--results", tmp_path / "results")
    assert result.exit_code == 1
    assert "1 of 3 runs failed" in result.output
    assert "diverging, seed 0: RuntimeError: round 1: " in result.output
    # The whole traceback is in a file, and not between the lines of the other runs.
    (file,) = (tmp_path / "results" / "runs").glob("*.traceback")
    assert f"; its traceback is in {file}" in result.output
    assert "in on_round" in file.read_text()
    assert "Traceback" not in capfd.readouterr().err
    assert len(results(tmp_path / "results")) == 2
    line = next(x for x in result.output.splitlines() if x.startswith("diverging "))
    assert line.split() == ["diverging", "failed"]
    arguments = ["bench", str(suite), "--rows", "diverging", "--processes", "0"]
    arguments += ["--results", str(tmp_path / "0")]
    assert "RuntimeError: round 1: " in CliRunner().invoke(app, arguments).stderr
    monkeypatch.setenv(DEBUG, "1")
    with pytest.raises(RuntimeError, match=r"round 1: .*nan"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.mark.parametrize("where", ["file", "file/folder"])
def test_results_that_cannot_be_written_end_with_a_line(suite: Path, tmp_path: Path, where: str):
    (tmp_path / "file").touch()
    result = invoke(suite, "--results", tmp_path / where)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"{tmp_path / where}: ")
    assert result.stderr.count("\n") == 1


def descendants(pid: int) -> set[int]:
    """Return the processes below one, as the system lists them."""
    found: set[int] = set()
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            found |= {child} | descendants(child)
    return found


def is_alive(pid: int) -> bool:
    """Return whether a process runs, and is not merely waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.processes
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_bench_that_is_terminated_leaves_no_process(
    suite: Path, tmp_path: Path, how: signal.Signals
):
    suite.write_text(SUITE.replace("num-server-rounds = 3", "num-server-rounds = 100000"))
    command = [Path(sys.executable).with_name("pfedgpa"), "bench", str(suite)]
    command += ["--processes", "2", "--results", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as bench:
        # Two runs, below the server that forked them, beside multiprocessing's own.
        wait_until(lambda: len(descendants(bench.pid)) >= 4)
        below = descendants(bench.pid)
        bench.send_signal(how)
        assert bench.wait(PATIENCE) != 0
    wait_until(lambda: not any(map(is_alive, below)))


def test_a_client_without_a_number_fails_the_run(suite: Path, tmp_path: Path):
    run = Suite.read(suite).runs()[0]
    whole = {number: rows_of(number, 0.5) for number in (1, 2, 3)}
    trained = [{"round": number, "num-clients": 3} for number in (1, 2, 3)]
    with pytest.raises(FloatingPointError, match="1 of 3 clients have no accuracy"):
        run.write(tmp_path, trained, [*whole[1], *whole[2][:2], *whole[3]], 1.0)
    idle = {"round": 2, "num-clients": 0}
    with pytest.raises(RuntimeError, match="round 2: no client could train"):
        run.write(tmp_path, [trained[0], idle, trained[2]], [*whole[2], *whole[3]], 1.0)
    assert run.result(tmp_path) is None
    run.write(tmp_path, trained, [*whole[2], *whole[3]], 1.0)
    assert run.result(tmp_path) is not None


def test_quick_lays_its_settings_over_all_others(suite: Path):
    suite.write_text(SUITE + "\n[cases.one]\nclients = 9\nnum-server-rounds = 7\n")
    quick = Suite.read(suite, quick=True)
    [run] = quick.runs()
    assert (run.clients, run.config.num_server_rounds, run.row) == (2, 1, "local")
    assert run.evaluated_rounds == 1
    assert quick.title == "Two rivals (quick)"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--seeds", "a"], '--seeds "a": right would be whole numbers from 0'),
        (["--seeds", ""], '--seeds "": right would be whole numbers from 0'),
        (["--seeds", "1,,2"], '--seeds "1,,2": right would be whole numbers from 0'),
        (["--seeds", "-1"], '--seeds "-1": right would be whole numbers from 0'),
        (["--seeds", "1.0"], '--seeds "1.0": right would be whole numbers from 0'),
        (["--seeds", "1, 1"], '--seeds "1, 1": right would be each once'),
        (["--seeds", "2147483648"], '--seeds "2147483648": right would be less than 2147483648'),
        (["--rows", ""], '--rows "": right would be the beginning of a row\'s name'),
        (["--rows", "local", "--rows", "local"], "--rows local, local: right would be each once"),
        (["--rows", "x"], 'no row begins with \'x\'; there are "local", "ditto"'),
        (["--cases", "x"], "no case begins with 'x'; there are \"one\""),
        (["--cases", ""], '--cases "": right would be the beginning of a case\'s name'),
    ],
)
def test_an_option_that_is_wrong_is_said_in_a_line_and_nothing_runs(
    suite: Path, tmp_path: Path, options: list[str], problem: str
):
    suite.write_text(SUITE + "\n[cases.one]\nnum-server-rounds = 2\n")
    result = invoke(suite, *options, "--results", tmp_path / "results")
    assert result.exit_code == 1
    assert problem in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("processes", ["-2", "a", ""])
def test_a_number_of_processes_that_is_none_is_refused(suite: Path, processes: str):
    result = invoke(suite, "--processes", processes)
    assert result.exit_code == 2
    assert "Invalid value for '--processes'" in result.stderr


@pytest.mark.parametrize("section", ["", "[quick]", "[quick]\nsettings = {}"])
def test_quick_is_refused_where_nothing_would_be_less(suite: Path, tmp_path: Path, section: str):
    suite.write_text(SUITE.partition("[quick]")[0] + section)
    result = invoke(suite, "--quick", "--results", tmp_path / "results")
    assert result.exit_code == 1
    assert f"{suite}: has no [quick] section for --quick; right would be" in result.stderr
    assert "\n[quick]\nseeds = [0]\n" in result.stderr
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("name", ["none.toml", "wrong.toml"])
def test_a_base_that_cannot_be_read_is_named(suite: Path, tmp_path: Path, name: str):
    (tmp_path / "wrong.toml").write_text("seed = ")
    suite.write_text(SUITE.replace("clients = 3", f"clients = 3\nbase = '{name}'"))
    result = invoke(suite, "--results", tmp_path / "results")
    assert result.exit_code == 1
    assert str(tmp_path / name) in result.stderr
    assert "right would be" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("title", "titel", "titel: Extra inputs are not permitted"),
        ('"bytes-up"', '"bytes"', r"measures has \['bytes'\]"),
        (
            "evaluated-rounds = 2",
            "evaluated-rounds = 4",
            "evaluated-rounds = 4: more than num-server-rounds = 3",
        ),
        ('"ditto"', '"dito"', 'ditto: .*\n.*strategy = "dito"'),
        ("[rows.ditto]", "[rows.ditto]\nclients = 4", "rows.ditto must not set clients"),
        ("[rows.ditto]", "[rows.ditto]\nseed = 4", "rows.ditto must not set seed"),
        (
            "[rows.ditto]",
            '[rows."\u00e9"]\n[rows."e\u0301"]\n[rows.ditto]',
            'rows has "\u00e9" twice, in two forms of Unicode; right would be two names',
        ),
        ("[settings]", "[settings]\nseed = 1", "settings must not set seed"),
        ("[settings]", "[settings]\nserver.fraction-evaluate = 0.5", "right would be 1.0"),
        ("[settings]", "[settings]\ntracking = 'mlflow'", "tracking"),
        ("[settings]", "[cases.a]\nclients = 'x'\n[settings]", "clients = x; right would be"),
        ('rows = ["local"]', 'rows = ["x"]', "quick.rows has"),
        ('rows = ["local"]', "rows = []", "quick.rows: List should have at least 1 item"),
        ("clients = 3", "clients = 3\ntargets = [0.5]", "right would be curve = true"),
        ("clients = 3", "clients = 3\nhorizons = [2]", "right would be curve = true"),
        ("clients = 3", "clients = 3\ncurve = true\nhorizons = [2, 1, 4]", r"has \[1, 4\]; .* = 2"),
        ('"bytes-up"', '"strategy"', r"measures has \['strategy'\]"),
        ("seeds = [0, 1]", "seeds = [0, 0]", r"seeds = \[0, 0\]; right would be each once"),
        ("clients = 3", "clients = ", "Invalid value"),
    ],
)
def test_what_is_wrong_with_a_suite_is_said_before_anything_runs(
    suite: Path, tmp_path: Path, old: str, new: str, reason: str
):
    suite.write_text(SUITE.replace(old, new))
    quick = ["--quick"] if "rows =" in old else []
    result = invoke(suite, *quick, "--results", tmp_path / "results")
    assert result.exit_code == 1
    assert str(suite) in result.stderr

    assert re.search(reason, result.stderr), result.stderr
    assert not (tmp_path / "results").exists()


def texts_of(file: Path) -> set[str]:
    """Return what is written in an SVG."""
    return set(re.findall(r"<text[^>]*>([^<]+)</text>", file.read_text()))


def test_a_table_has_rounds_bytes_and_seconds_until_a_target(suite: Path, tmp_path: Path):
    text = SUITE.replace("measures =", "curve = true\ntargets = [0.3, 0.99]\nmeasures =")
    suite.write_text(text)
    read = Suite.read(suite)
    runs = [run for run in read.runs() if run.row == "local"]
    for run, rounds in zip(runs, (2, 3), strict=True):
        rows = [
            {
                "personalized-accuracy": 0.4 if number >= rounds else 0.1,
                "bytes-up": 1_000_000,
                "bytes-down": 500_000,
                "num-clients": 3,
                "num-failures": number % 2,
                "seconds-diffusion": 0.5,
            }
            for number in (1, 2, 3)
        ]
        accuracies = [row for number in (1, 2, 3) for row in rows_of(number, 0.4)]
        run.write(tmp_path, rows, accuracies, 1.0)
    tables = bench_tables.tables(read, read.runs(), tmp_path, "suite", "command")
    reached = {table.title: table.rows["local"][0].text for table in tables}
    assert reached["Two rivals: until 0.3"] == "2.5 / 3.8 / 1.2"
    assert reached["Two rivals: until 0.99"] == "-"
    # In the first and the third round of two runs.
    assert "(4 unusable replies)" in tables[0].note
    bench_tables.draw(read, read.runs(), tmp_path, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()
    # Of ditto there is no result.
    texts = texts_of(tmp_path / "curves.svg")
    assert "local" in texts
    assert "ditto" not in texts


def test_a_run_is_evaluated_after_each_horizon(suite: Path, tmp_path: Path):
    suite.write_text(SUITE.replace("measures =", "curve = true\nhorizons = [2, 3]\nmeasures ="))
    read = Suite.read(suite)
    for run in read.runs()[:-1]:
        rows = [
            {"round": number, "num-clients": 3, "num-failures": 0, "bytes-up": 10 * number}
            for number in (1, 2, 3)
        ]
        accuracies = [row for number in (1, 2, 3) for row in rows_of(number, number / 10)]
        run.write(tmp_path, rows, accuracies, 1.0)
    evaluated, bytes_up = bench_tables.tables(read, read.runs(), tmp_path, "suite", "command")
    assert evaluated.columns == ["round 2", "round 3"]
    assert [cell.values[0] for cell in evaluated.rows["local"]] == pytest.approx([0.15, 0.25])
    assert [cell.text for cell in bytes_up.rows["local"]] == ["15 ± 0", "25 ± 0"]
    assert [cell.values for cell in bytes_up.rows["local"]] == [[15, 15], [25, 25]]
    # The last run is missing.
    assert [cell.text for cell in bytes_up.rows["ditto"]] == ["15 (1 of 2)", "25 (1 of 2)"]
    assert "mean of the last 2 rounds up to the column's" in evaluated.note


def test_measures_of_clients_are_compared_and_lead_where_the_suite_says_so(
    suite: Path, tmp_path: Path
):
    error, auroc = "personalized-calibration-error", "personalized-auroc"
    listed = ", ".join(f'"{name}"' for name in (error, auroc, "personalized-accuracy"))
    suite.write_text(SUITE.replace('"bytes-up"', listed))
    read = Suite.read(suite)
    for run in read.runs():
        rows = [{"round": n, "num-clients": 3, "num-failures": 0} for n in (1, 2, 3)]
        of_row = {error: 0.1 if run.row == "local" else 0.2}
        clients = [row for n in (2, 3) for row in rows_of(n, 0.5, **of_row)]
        run.write(tmp_path, rows, clients, 1.0)
    tables = bench_tables.tables(read, read.runs(), tmp_path, "suite", "command")
    assert [table.name for table in tables] == [f"suite-{error}", f"suite-{auroc}", "suite"]
    assert tables[0].title == "Two rivals: calibration error"
    assert tables[0].note.startswith("Calibration error of each client's personalized model")
    # The lowest is the best, and of more than two classes there is no AUROC.
    marks = {name: row[0].mark for name, row in tables[0].rows.items()}
    assert marks == {"local": "best", "ditto": ""}
    assert {row[0].text for row in tables[1].rows.values()} == {"-"}


def test_the_t_test_is_that_of_the_differences():
    left = {0: {0: 0.5, 1: 0.7}, 1: {0: 0.6, 1: 0.9}}
    right = {0: {0: 0.4, 1: 0.7}, 1: {0: 0.4, 1: 0.8, 2: 0.1}}
    differences = np.array([0.1, 0.0, 0.2, 0.1])
    t = differences.mean() / (differences.std(ddof=1) / 2)
    # Two sides of Student's distribution with 3 degrees of freedom, in closed form.
    x = t / np.sqrt(3)
    tail = 0.5 - (x / (1 + x * x) + np.arctan(x)) / np.pi
    assert p_value(left, right) == pytest.approx(2 * tail)
    assert p_value(left, left) == 1.0
    assert p_value(left, {7: {0: 0.1}}) == 1.0


def test_the_best_and_what_is_tied_are_marked():
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(3, 20, generator=generator)

    def column(shift: float, noise: float) -> dict[int, dict[int, float]]:
        values = base + shift + noise * torch.randn(3, 20, generator=generator)
        return {seed: dict(enumerate(values[seed].tolist())) for seed in range(3)}

    cells = compare(
        {
            "best": column(0.1, 0.0),
            "near": column(0.09, 0.1),
            "far": column(0.0, 0.01),
            "part": {0: dict(enumerate(base[0].tolist()))},
            "none": {},
        },
        3,
    )
    marks = {name: cell.mark for name, cell in cells.items()}
    assert marks == {"best": "best", "near": "tied", "far": "", "part": "", "none": ""}
    means = (base + 0.1).mean(dim=1).double()
    expected = f"{float(means.mean()):.4f} ± {float(means.std()):.4f}"
    assert cells["best"].text == expected
    assert cells["part"].text.endswith("(1 of 3)")
    assert cells["none"].text == "failed"


def test_tables_are_written_as_what_they_are_read_by():
    cells = [Cell("0.9 ± 0.1", "best", [0.8, 1.0]), Cell("0.8", "tied", [0.8]), Cell("-")]
    table = Table("A & B", ["x", "100 %", "c_1"], {"pfedgpa": cells}, "Note.")
    assert "0.9 ± 0.1 *  0.8 =  -" in table.text()
    assert "| pfedgpa | **0.9 ± 0.1** | *0.8* | - |" in table.markdown()
    latex = table.latex()
    assert r"pfedgpa & \textbf{0.9 $\pm$ 0.1} & \textit{0.8} & - \\" in latex
    assert r"\caption{A \& B. Note. Bold: the best; italic: not significantly different" in latex
    assert "Note. *: the best; =: not significantly different from it" in table.text()
    assert r"\label" not in latex
    assert r"& x & 100 \% & c\_1 \\" in latex
    rows = list(csv.reader(table.csv().splitlines()))
    first = ["A & B", "pfedgpa", "x", "0.9 ± 0.1", "best", "2", "0.900000", "0.141421"]
    assert rows[0] == [*first, "0.800000 1.000000", ""]
    assert len(rows[0]) == len(CSV_HEAD.split(","))
    assert rows[2] == ["A & B", "pfedgpa", "c_1", "-", "", "0", "", "", "", ""]


EVIL = r"""a & b %c_d #e $f$ {g} ~h ^i \input{j} <k> |l| "m" `n` --o [p] *q
\\ r"""


def test_latex_has_a_label_and_nothing_of_the_names_is_a_command():
    rows = {EVIL: [Cell("0.9 ± 0.1", "best"), Cell(EVIL)], "[1mm] b": [Cell("1"), Cell("2")]}
    table = Table(EVIL, [EVIL, "*"], rows, EVIL, "my suite_1-bytes", "pfedgpa bench a_b\n\\end")
    begin = [
        r"% \usepackage{booktabs}",
        r"% pfedgpa bench a_b \end",
        r"\begin{table}",
        r"\centering",
    ]
    lines = table.latex().splitlines()
    assert lines[:4] == begin
    assert lines[4].startswith(r"\caption{a \& b \%c\_d \#e \$f\$ \{g\} \textasciitilde{}h ")
    assert r"\textasciicircum{}i \textbackslash{}input\{j\} \textless{}k\textgreater{}" in lines[4]
    assert r"''m'' \textasciigrave{}n\textasciigrave{} -{}-o {[}p{]} {*}q" in lines[4]
    assert lines[5:8] == [
        r"\label{tab:my-suite-1-bytes}",
        r"\begin{tabular}{lrr}",
        r"\toprule",
    ]
    assert lines[11].startswith(r"{[}1mm{]} b & 1 & 2 \\")
    assert lines[12:] == [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    commands = r"\\(?:[&%_#${}]|text\w+\{\}|pm\b|textbf|textit)"
    caption, *cells = lines[4].removeprefix(r"\caption"), lines[8], lines[10], lines[11]
    for line, separators in ((caption, 0), *((each, 2) for each in cells)):
        bare = re.sub(commands, "", line.removesuffix(r" \\"))
        assert not set(bare) & set('\\%#~^_<>|"`')
        assert bare.count("{") == bare.count("}")
        assert bare.count("$") in (0, 2)  # about the sign of the deviation
        assert bare.count("&") == separators


def test_a_bar_is_no_column_in_markdown():
    table = Table("Title", ["a|b"], {"c\nd": [Cell("e | f")]}, "Note.", source="Command.")
    body = "| | a\\|b |\n| --- | --- |\n| c d | e \\| f |"
    assert table.markdown().replace("|  |", "| |") == f"**Title**\n\n{body}\n\nNote. Command.\n"


def test_runs_on_a_superlink_give_the_same_kind_of_result(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls: list[tuple[int, str]] = []

    def run_on_flower(config, clients: int, superlink: str) -> Run:
        calls.append((clients, superlink))
        folder = RunFolder(tmp_path / f"run-{len(calls)}", config)
        num_nodes = 2 if len(calls) == 4 else 3
        for number in (1, 2, 3):
            row = {"round": number, "num-nodes": num_nodes, "seconds-round": 1.0, "bytes-up": 5}
            row |= {"num-clients": 3, "num-failures": 0}
            clients_rows = [
                {"round": number, "client": client, "personalized-accuracy": 0.5}
                for client in range(3)
            ]
            folder.add_round(row | {"personalized-accuracy": 0.5}, clients_rows)
        return Run.read(folder.path)

    monkeypatch.setattr("server_app.commands_bench.run_on_flower", run_on_flower)
    result = invoke(suite, "--superlink", "site", "--results", tmp_path / "results")
    assert calls == [(3, "site")] * 4
    assert result.exit_code == 1
    assert "ditto, seed 1: 2 SuperNodes; right would be 3" in result.output
    assert len(results(tmp_path / "results")) == 3


def test_runs_on_a_superlink_do_not_train_as_one_graph(suite: Path, tmp_path: Path):
    suite.write_text(SUITE.replace("[rows.local]", "[rows.local]\nclient.engine = 'vmap'"))
    assert len(Suite.read(suite).runs()) == 4
    result = invoke(suite, "--superlink", "site", "--results", tmp_path / "results")
    assert result.exit_code == 1
    assert 'client.engine = "vmap": is for `pfedgpa bench`' in result.stderr
    assert not (tmp_path / "results").exists()


def test_where_the_system_lists_neither_free_memory_nor_own_cores_there_are_processes(
    monkeypatch: pytest.MonkeyPatch,
):
    def fail(file: Path) -> str:
        raise FileNotFoundError(file)

    monkeypatch.setattr(bench, "read_text", fail)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    sizes = {"SC_PHYS_PAGES": 4 * bench.BYTES_A_RUN, "SC_PAGE_SIZE": 1}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    assert bench.num_processes() == 2
