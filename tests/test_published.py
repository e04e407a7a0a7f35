"""Every command that is published runs: here in a short form, or in the test that is named here.

Settings, options, files and names are those of the command; rounds, data and training are less.
`flwr run` is the ServerApp and the ClientApp in this process, as test_flower_run.py has them in
Flower's. What `pfedgpa bench` would compute is left out: test_suites.py runs the quick version of
every suite. test_benchmarks.py and test_benchmark_processes.py run the benchmarks.
"""

import re
import shlex
import shutil
import sys
import tomllib
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digit_sites import write_pictures
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.config import parse_config_args
from PIL import Image
from published import PROJECT, Words, benchmarks, commands, lay_out, noise
from simulated_grid import Answer, SimulatedGrid
from torch import nn
from typer.main import get_command
from typer.testing import CliRunner, Result

from client_app.app import app as client_app
from client_app.messages import load_data
from pfedgpa_app import models
from pfedgpa_app.config import DATASETS, Config, DataConfig, DatasetInfo, flatten
from pfedgpa_app.data import client_data, sources
from pfedgpa_app.report import Run
from pfedgpa_app.runs import RUN_FILE, name_of
from server_app import app as server_app
from server_app import bench, bench_tables, cli, commands_bench, commands_config, commands_run
from server_app.bench import BenchRun
from server_app.superlink import FlowerRun

COMMANDS = commands()
(OWN,) = (words[-1] for words in COMMANDS if words[0] == "docker" and "/app" in words)
"""The run config of the run in containers."""
BENCHES = [words for words in COMMANDS if words[:2] == ("pfedgpa", "bench")]
CHECKED_RUNS = [words for words in COMMANDS if words[:2] == ("pfedgpa", "run")]
OTHERS = [
    words for words in COMMANDS if words[0] == "pfedgpa" and words not in (*BENCHES, *CHECKED_RUNS)
]
NOT_HERE = "tracking='tensorboard'"  # whose package is not installed
RUNS = [words for words in COMMANDS if words[:2] == ("flwr", "run") and NOT_HERE not in words]

# What is not run here, with the test that does or that comes nearest, or with the reason.
INSTALLS = "downloads packages; .ci/run does so in a new environment"
TESTS = "these tests"
SETS = "sets a variable"
DEPLOYED = "test_deployment.py::test_the_smallest_network_finishes_a_run"
CONTAINERS = "test_docker.py::test_the_services_bring_a_run_to_its_end"
PACK = "test_docker.py::test_what_runs_for_months_is_bounded_and_tells_its_health"
SERVER, SITE = (f"docker compose -f docker/compose.{name}.yaml" for name in ("server", "site"))
CLUSTER = "test_flower_run.py::test_a_cluster_of_two_machines_gives_the_digits_of_one"
TRACKED = "test_tracking.py::test_tensorboard_has_the_settings_and_the_numbers_of_a_run"
ELSEWHERE = {
    "python3 -m venv .venv": INSTALLS,
    ". .venv/bin/activate": INSTALLS,
    "pip install .": INSTALLS,
    "pip install -e '.[test]'": INSTALLS,
    "pip install -e '.[dev]'": INSTALLS,
    "pip install '.[tensorboard]'": INSTALLS,
    "pytest": TESTS,
    "pytest -m 'not processes'": TESTS,
    "pytest -m cuda": TESTS,
    "pytest -n 0 tests/test_guard.py": TESTS,
    "pytest tests/test_faults.py": TESTS,
    "ruff check .": ".ci/run",
    "ruff format --check .": ".ci/run",
    "mypy": ".ci/run",
    "bash .ci/run": "runs all of this",
    "export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1": SETS,
    "export FLWR_HOME=/shared/flwr FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1": SETS,
    "flower-superlink --insecure --port 18000": DEPLOYED,
    "flower-supernode --insecure --superlink 127.0.0.1:18000 --port 19094 --node-config "
    "'partition-id=0 num-partitions=3'": DEPLOYED,
    "flower-supernode --insecure --superlink 127.0.0.1:18000 --port 19095 --node-config "
    "'partition-id=1 num-partitions=3'": DEPLOYED,
    "flower-supernode --insecure --superlink 127.0.0.1:18000 --port 19096 --node-config "
    "'partition-id=2 num-partitions=3'": DEPLOYED,
    "printf '\\n[superlink.here]\\naddress = \"127.0.0.1:18000\"\\ninsecure = true\\n'": DEPLOYED,
    "flower-supernode --insecure --superlink 127.0.0.1:18000 --node-config "
    "'data-path=\"/srv/scans\"'": DEPLOYED,
    "docker build -f docker/Dockerfile -t pfedgpa .": CONTAINERS,
    "docker build -f docker/Dockerfile -t pfedgpa --build-arg TORCH=cuda .": CONTAINERS,
    "docker build -f docker/Dockerfile -t pfedgpa-site --build-arg ROLE=site .": PACK,
    "docker buildx imagetools inspect debian:trixie-slim --format "
    "'BASE=debian@{{.Manifest.Digest}}'": "asks a registry",
    f"{SERVER} run --rm --build certificates": PACK,
    f"{SERVER} up -d superlink": PACK,
    f"{SERVER} cp superlink:/tls/authority/ca.pem ca.pem": PACK,
    f"{SERVER} run --rm -v '$PWD/site-1.pub:/tmp/site-1.pub:ro' flwr supernode register "
    "/tmp/site-1.pub tls --name site-1": PACK,
    f"{SERVER} run --rm flwr run /app tls --stream --run-config {shlex.quote(OWN)}": (
        "test_published.py::test_the_run_of_the_server_trains_on_the_data_of_sites"
    ),
    f"{SITE} run --rm --build key": PACK,
    f"{SITE} run --rm key cat /tls/supernode/key.pub": PACK,
    f"{SITE} up -d supernode": PACK,
    f"{SITE} ps": PACK,
    f"{SITE} cp supernode:/model/model.safetensors model.safetensors": PACK,
    f"{SITE} -f docker/compose.gpu.yaml run --rm --build key": PACK,
    f"{SITE} -f docker/compose.gpu.yaml up -d supernode": PACK,
    "docker compose -f docker/compose.yaml up --build run": CONTAINERS,
    "docker compose -f docker/compose.yaml -f docker/compose.tls.yaml up --build run": CONTAINERS,
    "docker compose -f docker/compose.yaml exec superlink pfedgpa runs": CONTAINERS,
    "docker compose -f docker/compose.yaml cp superlink:/data/pfedgpa/runs runs": CONTAINERS,
    "docker compose -f docker/compose.yaml down": CONTAINERS,
    "ray start --head --port=6379": CLUSTER,
    "ray start --address=FIRST-MACHINE:6379": CLUSTER,
    "flower-superlink --simulation --insecure --host 127.0.0.1 --port 18000": CLUSTER,
    "pkill -f 'flower-superlink.*--simulation'": "ends what others may have started",
    "flwr stop RUN cluster": "test_deployment.py::test_a_stopped_run_is_over",
    "flwr run . --stream --run-config 'tracking='\"'\"'tensorboard'\"'\"'' --federation-config "
    "'num-supernodes=10 client-resources-num-cpus=1'": TRACKED,
    "tensorboard --logdir '~/.local/share/pfedgpa/runs'": TRACKED,
}
DEFAULTS = dict(
    flatten(
        tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    )
)
SHORT = {
    "num-server-rounds": 1,
    "client.local-epochs": 1,
    "client.device": "cpu",
    "diffusion.device": "cpu",
    "diffusion.train-steps": 5,
}
FEW = 10
"""Images of each client."""
CLIENTS = 5


def test_every_command_is_run_by_a_test():
    run_here = [*BENCHES, *RUNS, *CHECKED_RUNS, *OTHERS]
    run_here += [words for kind in (True, False) for words in benchmarks(have_processes=kind)]
    assert {shlex.join(words) for words in COMMANDS if words not in run_here} == set(ELSEWHERE)


def test_every_file_of_settings_has_a_command():
    files = {str(file.relative_to(PROJECT)) for file in (PROJECT / "conf").rglob("*.toml")}
    assert files <= {word for words in COMMANDS for word in words}


@pytest.mark.parametrize("where", sorted(set(ELSEWHERE.values())))
def test_what_runs_a_command_elsewhere_exists(where: str):
    file, _, test = where.partition("::")
    if test:
        assert f"def {test}(" in (PROJECT / "tests" / file).read_text()
    elif where == ".ci/run":
        text = (PROJECT / ".ci" / "run").read_text()
        commands_there = [one for one, place in ELSEWHERE.items() if place == where]
        assert all(f".venv/bin/{command}\n" in text for command in commands_there)


def small_in_place_of_resnet18(info: DatasetInfo) -> nn.Module:
    """Return a small model with batch normalization: 11 million parameters take 15 seconds."""
    return nn.Sequential(
        nn.Conv2d(info.shape[0], 4, 3),
        nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, info.num_classes),
    )


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Type in the project's folder, with the modules and the suite of the documents in it."""
    lay_out(tmp_path)
    documents = PROJECT / "docs"
    (suite,) = re.findall(
        r"```toml\n(# mine.toml.+?)```", (documents / "comparing.md").read_text(), flags=re.DOTALL
    )
    for name in ("mine.toml", "SUITE.toml"):
        (tmp_path / name).write_text(suite)
    for module, name in re.findall(
        r"```python\n(# (\w+\.py)\n.+?)```",
        (documents / "data-and-models.md").read_text(),
        flags=re.DOTALL,
    ):
        (tmp_path / name).write_text(module)
        # Another test has its own in another folder, which would be nobody's here.
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sources, "_torchvision", noise)
    monkeypatch.setitem(models.MODELS, "resnet18", small_in_place_of_resnet18)
    return tmp_path


def type_in(words: Words, answer: str = "") -> Result:
    """Type a command of pfedgpa, which must succeed."""
    result = CliRunner().invoke(cli.app, words[1:], input=answer, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


TUNING_SEEDS = 100


@pytest.mark.parametrize("words", BENCHES, ids=shlex.join)
def test_a_bench_has_runs_with_right_settings(
    words: Words, project: Path, monkeypatch: pytest.MonkeyPatch
):
    planned: list[BenchRun] = []

    def plan(pending: list[BenchRun], folder: Path, *arguments: Any) -> dict[str, str]:
        planned.extend(pending)
        for run in pending:
            if run.config.seed >= TUNING_SEEDS:  # the rest of a tuned bench follows from them
                run.file(folder).parent.mkdir(exist_ok=True)
                run.file(folder).write_text('{"accuracies": [{"0": 0.5}]}')
        return {}

    def plan_on_flower(superlink: str, run: BenchRun, folder: Path) -> dict[str, str]:
        return plan([run], folder)

    monkeypatch.setattr(bench, "execute", plan)
    monkeypatch.setattr(bench_tables, "draw", lambda *arguments: None)
    monkeypatch.setattr(commands_bench, "_on", plan_on_flower)
    said = type_in(words).stdout
    assert planned
    if "--tuned" not in words:
        assert len({run.name for run in planned}) == len(planned)
    assert sum(map(int, re.findall(r"(\d+) to go", said))) == len(planned)


def test_the_suite_of_the_documents_is_run_and_made_a_page(project: Path):
    quick = "\n[quick]\nseeds = [0]\nclients = 4\nevaluated-rounds = 1\nsettings = "
    settings = {"num-server-rounds": 2, "data.train-samples": 20, "data.test-samples": 10}
    pairs = ", ".join(f"{key} = {value}" for key, value in {**SHORT, **settings}.items())
    with (project / "mine.toml").open("a") as file:
        file.write(quick + "{ " + pairs.replace("= cpu", '= "cpu"') + " }\n")
    results = ("--quick", "--results", "build/bench/mine")
    type_in(("pfedgpa", "bench", "mine.toml", "--processes", "0", *results))
    for words in OTHERS:
        if words[1] == "report" and "build/bench/mine" in words:
            type_in(words)
            page = Path(words[words.index("-o") + 1] if "-o" in words else "report.html")
            assert page.stat().st_size > 1000


RUN_IDS = count(1)


def run_app(settings: dict[str, Any], clients: int, output: Path, data_path: str = "") -> Path:
    """Do a run, as `flwr run` would; return its folder."""
    config = {**DEFAULTS, **settings, "output-dir": str(output)}
    number = next(RUN_IDS)

    def answer_of(node: int) -> Answer:
        node_config = {"partition-id": node, "num-partitions": clients}
        node_config |= {"data-path": data_path} if data_path else {}
        context = Context(number, node, node_config, RecordDict(), config)

        def answer(message: Message) -> RecordDict | Error:
            reply = client_app(message, context)
            return reply.content if reply.has_content() else reply.error

        return answer

    nodes = {node: answer_of(node) for node in range(clients)}
    grid = SimulatedGrid(nodes, {node: node for node in nodes})
    server_app.main(grid, Context(number, 1, {}, RecordDict(), config))
    return output / str(number)


def shortened(given: dict[str, Any], clients: int) -> dict[str, Any]:
    """Return the settings of a command with fewer rounds, and less of everything."""
    short = {**given, **SHORT, "server.min-available-nodes": clients}
    config = Config.from_flat({**DEFAULTS, **given})
    if config.data.dataset in DATASETS:
        short["data.train-samples"] = min(config.data.train_samples, FEW)
        short["data.test-samples"] = FEW
    return short


@pytest.fixture
def scans(project: Path, own_home: Path) -> None:
    """Leave the scans of the documents where they say."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (60, 1, 64, 64), dtype=np.uint8)
    for folder in (own_home / "scans", DataConfig().root_path):
        folder.mkdir(parents=True, exist_ok=True)
        clinic, year = np.arange(60) // 20, 2021 + np.arange(60) % 5
        np.savez(folder / "scans.npz", x=images, y=np.arange(60) % 3, clinic=clinic, year=year)
    for number, image in enumerate(images[:6, 0]):
        file = project / "site" / ("benign", "malignant")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    named = 'shape = "1x64x64"\nclass-names = "benign,malignant"\n'
    (project / "sites.toml").write_text(f"[data]\n{named}")


def test_the_run_of_the_server_trains_on_the_data_of_sites(project: Path, scans: None):
    config = Config.from_flat({**DEFAULTS, **parse_config_args([OWN])})
    node = Context(1, 1, {"data-path": str(project / "site")}, RecordDict(), {})
    assert len(load_data(config, node).train_labels) > 0


def earlier_run(name: str, clients: int, output: Path) -> None:
    """Leave a run of a name that a command goes on from."""
    dataset, _, number = name.partition("-pfedgpa-")
    given = parse_config_args(["conf/fashion-mnist-20.toml"]) if "mnist" in dataset else {}
    run = run_app(shortened(given, clients), clients, output)
    if number:  # as if there had been others before
        file = run / RUN_FILE
        file.write_text(file.read_text().replace(f'"{name_of(run)}"', f'"{name}"'))


DONE: dict[object, Path] = {}
"""The runs, by what decides about them: commands for other machines have the same."""


@pytest.mark.slow
@pytest.mark.parametrize("words", RUNS, ids=shlex.join)
def test_a_run_goes_to_its_end(words: Words, project: Path, tmp_path: Path, scans: None):
    from flwr.cli.app import app as flwr  # imported here, as other workers need it not

    command = get_command(flwr).commands["run"]
    options = command.make_context("run", [*words[2:]]).params
    (override,) = options["federation_config_overrides"] or ("num-supernodes=2",)
    given = parse_config_args([*(options["run_config_overrides"] or ())])
    clients = max(CLIENTS, given.get("data.num-groups", 0))
    clients = min(clients, parse_config_args([override])["num-supernodes"])
    assert given.keys() <= DEFAULTS.keys()
    settings, output = shortened(given, clients), tmp_path / "runs"
    if name := given.get("resume-from"):
        earlier_run(name, clients, output)
        settings |= {"num-server-rounds": 2}
        settings["resume-from"] = name.replace("RUN", "latest")
    data_path = str(project / "site") if settings.get("data.dataset") == "sites" else ""
    what = (tuple(sorted(settings.items())), clients, data_path)
    if what not in DONE:
        DONE[what] = run_app(settings, clients, output, data_path)
    run = Run.read(DONE[what])
    assert [row["round"] for row in run.metrics] == [*range(1, settings["num-server-rounds"] + 1)]
    assert all(row["num-failures"] == 0 and row["num-clients"] for row in run.metrics)
    assert (run.path / "report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("words", CHECKED_RUNS, ids=shlex.join)
def test_a_run_that_is_checked_first_goes_to_its_end(
    words: Words, project: Path, tmp_path: Path, scans: None, monkeypatch: pytest.MonkeyPatch
):
    """All but Flower's programs, which test_command_run.py plays and test_flower_run.py runs."""

    def play(config: Config, superlink: str, clients: int, **options: Any) -> FlowerRun:
        few, output = min(CLIENTS, clients), tmp_path / "runs"
        settings = shortened(config.changed, few)
        if name := config.resume_from:
            earlier_run(name, few, output)
            settings |= {"num-server-rounds": 2}
        return FlowerRun(run_id="1", folder=str(run_app(settings, few, output)))

    monkeypatch.setattr(commands_run, "own_superlink", lambda: nullcontext({}))
    monkeypatch.setattr(commands_run, "flwr_run", play)
    monkeypatch.setattr(FlowerRun, "problem", lambda *arguments: "")
    if "resume-from" in str(words):  # of a run that is not there yet
        monkeypatch.setattr(commands_config, "_problems", lambda *arguments: iter(()))
    page = type_in(words).stdout.splitlines()[-1].removeprefix("The page of this run: ")
    run = Run.read(Path(page).parent)
    assert run.is_complete
    assert all(row["num-failures"] == 0 and row["num-clients"] for row in run.metrics)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do a run of digits."""
    return run_app(shortened({}, 4), 4, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def finished(project: Path, finished_run: Path) -> None:
    """Leave a run of digits where runs are, and pictures for its models."""
    for name in (finished_run.name, *SAME):  # some commands compare runs
        shutil.copytree(finished_run, Config().output_path / name)
    images = client_data(DataConfig(), 0, 0, 4).test_inputs[:4]
    Image.fromarray(images[0, 0].numpy()).save(project / "scan.png")
    write_pictures(project, images, torch.zeros(4, dtype=torch.int64))
    (project / "0").rename(project / "photos")
    np.savez(project / "more.npz", x=images.numpy())


SAME = ("4711", "4712", "4713")
SITE = {"/srv/scans": "site", "run.toml": "sites.toml"}
SHORTER = {"demo": ("--rounds", "1")}
MODEL = ("pfedgpa", "export", "latest", "--client", "3", "-o", "model.safetensors")


@pytest.mark.parametrize(
    "words", [words for words in OTHERS if "build/bench/mine" not in words], ids=shlex.join
)
def test_a_command_does_what_it_should(words: Words, project: Path, finished: None, scans: None):
    if "predict" in words:
        type_in(MODEL)
    runs, here = iter(SAME), {"/srv/models/mine.safetensors": "model.safetensors", **SITE}
    typed = (next(runs) if word == "RUN" else here.get(word, word) for word in words)
    said = type_in((*typed, *SHORTER.get(words[1], ())), answer="y\n").stdout
    assert said
    if "-o" in words:
        assert Path(words[words.index("-o") + 1]).stat().st_size > 1000
