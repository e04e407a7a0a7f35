"""The app as users run it: `flwr run` on a SuperLink with Flower's simulation engine."""

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.network import (
    BIN,
    PATIENCE,
    PROJECT,
    Network,
    free_port,
    read_lines,
    wait_until,
    with_descendants,
)
from pfedgpa_app.config import Config
from pfedgpa_app.report import Run
from server_app.simulation import simulate

pytestmark = [
    pytest.mark.processes,
    pytest.mark.slow,
    pytest.mark.usefixtures("warm_processes"),
]

# Seconds from one look at all processes to the next.
PAUSE = 0.5


class SuperLink(Network):
    """A SuperLink in simulation mode."""

    resources = ""  # of Ray, beside CPUs

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.start_superlink("--simulation")

    def simulation_command(
        self, clients: int, workers: int | None = None, **settings: object
    ) -> list[str]:
        """Return the command that runs the app with simulated clients."""
        federation = f"num-supernodes={clients} client-resources-num-cpus=1 {self.resources}"
        if workers is not None:
            federation += f" init-args-num-cpus={workers}"
        return [*self.run_command(**settings), "--federation-config", federation]

    def run(self, clients: int, workers: int, **settings: object) -> tuple[str, list[dict], Path]:
        """Run the app to its end; return its log, its metrics and its folder."""
        before = set(self.output.glob("*"))
        done = subprocess.run(
            self.simulation_command(clients, workers, **settings),
            env=self.env,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        log = done.stdout + done.stderr
        folders = set(self.output.glob("*")) - before
        assert len(folders) == 1, log
        (folder,) = folders
        return log, read_lines(folder), folder

    def run_until_killed(self, rounds: int, clients: int, workers: int, **settings: object) -> Path:
        """Kill all processes a moment after the app has completed rounds; return its folder."""
        self.start("run", *self.simulation_command(clients, workers, **settings))
        wait_until(lambda: len(read_lines(self.run_folder())) >= rounds, PATIENCE)
        time.sleep(0.2)
        folder = self.run_folder()
        assert folder is not None
        return folder


class Cluster(SuperLink):
    """Two Ray nodes with a processor each, and a SuperLink that simulates on them."""

    def __init__(self, folder: Path, ray_folder: Path) -> None:
        self.address, self.ray_folder = f"127.0.0.1:{free_port()}", ray_folder
        super().__init__(folder)

    def start_superlink(self, *options: str | Path) -> subprocess.Popen[bytes]:
        """Start the Ray nodes, and a SuperLink that knows where they are."""
        self.env["RAY_ADDRESS"] = self.address
        node = ("ray", "start", "--block", "--num-cpus=1", "--num-gpus=0", "--disable-usage-stats")
        port = self.address.split(":")[1]
        head = (f"--port={port}", f"--temp-dir={self.ray_folder}", "--include-dashboard=false")
        self.start("head", *node, "--head", *head)
        wait_until(lambda: "Ray runtime started" in self.log("head"))
        self.start("worker", *node, f"--address={self.address}")
        wait_until(lambda: "Ray runtime started" in self.log("worker"))
        return super().start_superlink(*options)

    def clients(self) -> set[str]:
        """Return the Ray nodes on which clients are answering now or wait for a message."""
        found = set()
        for name in ("head", "worker"):
            for process in with_descendants(self.processes[name].pid):
                with contextlib.suppress(OSError):
                    if "ClientAppActor" in Path(f"/proc/{process}/cmdline").read_text():
                        found.add(name)
        return found


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    with SuperLink(tmp_path_factory.mktemp("superlink")) as started:
        yield started


QUICK = {"num-server-rounds": 3, "client.local-epochs": 2, "diffusion.train-steps": 50}


def without_seconds(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


@pytest.fixture(scope="module")
def one_worker(superlink: SuperLink) -> tuple[str, list[dict], Path]:
    """Return log, metrics and folder of a run with one worker."""
    log, rows, folder = superlink.run(4, workers=1, **QUICK)
    assert len(rows) == 3, log
    return log, rows, folder


def test_a_run_leaves_all_its_files_and_says_where(one_worker: tuple[str, list[dict], Path]):
    log, _, folder = one_worker
    names = {str(path.relative_to(folder)) for path in folder.rglob("*.*")}
    assert names == {
        "run.json",
        "config.json",
        "metrics.jsonl",
        "clients.jsonl",
        "method.jsonl",
        "report.html",
        "checkpoint.safetensors",
        "best/checkpoint.safetensors",
        *(f"models/client-{client}.safetensors" for client in range(4)),
    }
    assert f"Run digits-pfedgpa-1 ({folder.name}): {folder}" in log
    clients = [json.loads(line) for line in (folder / "clients.jsonl").read_text().splitlines()]
    assert [(row["round"], row["client"]) for row in clients] == [
        (server_round, client) for server_round in (1, 2, 3) for client in range(4)
    ]
    assert all(row["status"] == "ok" for row in clients)


def test_benchmarks_give_the_digits_of_a_run(one_worker: tuple[str, list[dict], Path]):
    _, expected, _ = one_worker
    config = Config.from_flat({"client.device": "cpu", **QUICK})
    _, rows = simulate(config, 4)
    assert without_seconds(rows) == without_seconds(expected)


def test_a_run_that_is_checked_first_gives_the_digits_of_a_run(
    one_worker: tuple[str, list[dict], Path], tmp_path: Path
):
    pairs = {**QUICK, "client.device": "cpu", "output-dir": str(tmp_path)}
    words = [word for key, value in pairs.items() for word in ("-c", f"{key}={json.dumps(value)}")]
    command = [BIN / "pfedgpa", "run", "--clients", "4", *words]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    page = Path(done.stdout.splitlines()[-1].removeprefix("The page of this run: "))
    assert page.parent.parent == tmp_path
    assert page.is_file()
    assert without_seconds(read_lines(page.parent)) == without_seconds(one_worker[1])


def test_two_workers_and_a_kill_between_give_the_same_digits(
    superlink: SuperLink,
    one_worker: tuple[str, list[dict], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    _, expected, _ = one_worker
    # Once all processes start as they do for users, and import what they need.
    monkeypatch.setenv("PATH", f"{BIN}{os.pathsep}{os.environ['PATH']}")
    with SuperLink(tmp_path) as doomed:
        killed = doomed.run_until_killed(1, clients=4, workers=2, **QUICK)
    begun = read_lines(killed)
    assert without_seconds(begun) == without_seconds(expected[: len(begun)])
    assert not (killed / "models").exists(), "the run was over before it was killed"
    log, resumed, _ = superlink.run(4, workers=1, **QUICK, **{"resume-from": str(killed)})
    assert without_seconds(resumed) == without_seconds(expected), log
    # Rows of completed rounds are taken over as they are, with the seconds they took.
    kept = [row for row in resumed if row in begun]
    assert len(kept) >= len(begun) - 1
    assert f"Going on after round {len(kept)}" in log


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    # Ray's sockets are below its folder, and their paths must be short.
    with tempfile.TemporaryDirectory() as short, Cluster(tmp_path, Path(short)) as started:
        yield started


def test_a_cluster_of_two_machines_gives_the_digits_of_one(
    cluster: Cluster, one_worker: tuple[str, list[dict], Path]
):
    _, expected, _ = one_worker
    cluster.start("run", *cluster.simulation_command(4, **QUICK))
    wait_until(lambda: cluster.clients() == {"head", "worker"}, PATIENCE, PAUSE)
    wait_until(lambda: cluster.processes["run"].poll() is not None, PATIENCE)
    assert without_seconds(read_lines(cluster.run_folder())) == without_seconds(expected)


def test_a_baseline_runs_on_the_same_settings_by_clients_that_share_a_gpu(
    superlink: SuperLink, monkeypatch: pytest.MonkeyPatch
):
    """Ray shares out the GPU that it is told of, and clients that see none use the CPU."""
    monkeypatch.setattr(
        superlink, "resources", "init-args-num-gpus=1 client-resources-num-gpus=0.5"
    )
    settings = {**QUICK, "strategy": "fedavg-ft", "client.device": "auto"}
    log, rows, _ = superlink.run(3, workers=2, **settings | {"num-server-rounds": 1})
    assert [row["strategy"] for row in rows] == ["fedavg-ft"], log
    for row in rows:  # evaluated by what came out of local training
        assert row["personalized-accuracy"] == pytest.approx(row["finetuned-accuracy"])


def last_words(log: str) -> list[str]:
    """Return the lines of the app's log up to Flower's own about the end of the run."""
    own, code, _ = log.partition("Exit Code: 700")
    assert code, log
    return own.splitlines()[:-1]


def test_why_all_clients_failed_is_the_last_line_and_stays_in_the_folder(superlink: SuperLink):
    """The data set is a function that takes no folder."""
    own = {
        "data.dataset": "benchmarks.small_images:cnn",
        "data.shape": "1x8x8",
        "data.num-classes": 2,
    }
    log, rows, folder = superlink.run(3, workers=2, **own, **{"data.partition": "iid"})
    cause = "3 clients: benchmarks.small_images:cnn: failed with AttributeError: "
    assert last_words(log)[-1].startswith(f"  {cause}")
    assert log.count("\n") < 250
    assert "RayTaskError" not in log
    assert rows == []
    assert cause in Run.read(folder).error
    assert [row["client"] for row in read_lines(folder, "clients.jsonl")] == [0, 1, 2]
    assert (folder / "report.html").exists()


def test_a_wrong_setting_is_the_last_line(superlink: SuperLink):
    done = subprocess.run(
        superlink.simulation_command(2, **{"client.learning-rate": -1.0}),
        env=superlink.env,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    said = "  - client.learning-rate = -1.0: should be greater than 0"
    assert last_words(done.stdout + done.stderr)[-1] == said


class Elsewhere(SuperLink):
    """A SuperLink that was started in a folder with another version of the app."""

    def start_superlink(self, *options: str | Path) -> subprocess.Popen[bytes]:
        """Put a faulty version into the working directory, and start it there."""
        for package in ("client_app", "pfedgpa_app"):
            shutil.copytree(PROJECT / package, self.folder / package)
        for file in ("client_app/messages.py", "pfedgpa_app/config.py"):
            (self.folder / file).write_text("raise RuntimeError('the code of another folder')\n")
        return super().start_superlink(*options)


def test_clients_run_the_code_of_the_app_wherever_the_superlink_was_started(
    tmp_path: Path, one_worker: tuple[str, list[dict], Path]
):
    _, expected, _ = one_worker
    with Elsewhere(tmp_path) as superlink:
        log, rows, _ = superlink.run(4, workers=2, **QUICK)
    assert "another folder" not in log
    assert without_seconds(rows) == without_seconds(expected)
