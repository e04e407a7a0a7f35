"""The app as users run it: `flwr run` on a SuperLink with Flower's simulation engine."""

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

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
        self.start_superlink("--simulation", "--database", ":flwr-in-memory:")

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

    def run_until_killed(self, clients: int, workers: int, **settings: object) -> Path:
        """Kill all processes once the app has completed a round; return its folder."""
        self.start("run", *self.simulation_command(clients, workers, **settings))

        def can_be_resumed() -> bool:
            folder = self.run_folder()
            return bool(read_lines(folder)) and (folder / "checkpoint.safetensors").exists()

        wait_until(can_be_resumed, PATIENCE)
        folder = self.run_folder()
        assert folder is not None
        return folder


class Cluster(SuperLink):
    """Two Ray nodes with a processor each, and a SuperLink that simulates on them.

    All were started in a folder with another version of the app.
    """

    def __init__(self, folder: Path, ray_folder: Path) -> None:
        self.address, self.ray_folder = f"127.0.0.1:{free_port()}", ray_folder
        for package in ("client_app", "pfedgpa_app"):
            shutil.copytree(PROJECT / package, folder / package)
        for file in ("client_app/messages.py", "pfedgpa_app/config.py"):
            (folder / file).write_text("raise RuntimeError('the code of another folder')\n")
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
def expected() -> list[dict]:
    """Return the metrics of a run in this process, as benchmarks have them."""
    _, rows = simulate(Config.from_flat({"client.device": "cpu", **QUICK}), 4, num_processes=0)
    return without_seconds(rows)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """Return a cluster that has run the app on both of its machines, and has ended."""
    folder = tmp_path_factory.mktemp("cluster")
    # Ray's sockets are below its folder, and their paths must be short.
    with tempfile.TemporaryDirectory() as short, Cluster(folder, Path(short)) as started:
        started.start("run", *started.simulation_command(4, **QUICK))
        wait_until(lambda: started.clients() == {"head", "worker"}, PATIENCE, PAUSE)
        wait_until(lambda: started.processes["run"].poll() is not None, PATIENCE)
    return started


def test_a_cluster_of_two_machines_gives_the_digits_of_one(cluster: Cluster, expected: list[dict]):
    assert without_seconds(read_lines(cluster.run_folder())) == expected


def test_clients_run_the_code_of_the_app_wherever_the_superlink_was_started(cluster: Cluster):
    log = cluster.log("run")
    assert "[ROUND 3/3]" in log
    assert "another folder" not in log


def test_a_run_leaves_all_its_files_and_says_where(cluster: Cluster):
    folder = cluster.run_folder()
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
    assert f"Run digits-pfedgpa-1 ({folder.name}): {folder}" in cluster.log("run")
    clients = read_lines(folder, "clients.jsonl")
    assert [(row["round"], row["client"]) for row in clients] == [
        (server_round, client) for server_round in (1, 2, 3) for client in range(4)
    ]
    assert all(row["status"] == "ok" for row in clients)


def test_killed_and_resumed_a_run_gives_the_same_digits(
    expected: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Ray shares out the GPU that it is told of, and clients that see none use the CPU.

    The run is resumed by `pfedgpa run`, with settings that are checked first.
    """
    settings = {**QUICK, "client.device": "cpu" if torch.cuda.is_available() else "auto"}
    doomed = tmp_path / "doomed"
    doomed.mkdir()
    with SuperLink(doomed) as superlink:
        superlink.resources = "init-args-num-gpus=1 client-resources-num-gpus=0.5"
        killed = superlink.run_until_killed(clients=4, workers=2, **settings)
    begun = read_lines(killed)
    assert without_seconds(begun) == expected[: len(begun)]
    assert not (killed / "models").exists(), "the run was over before it was killed"

    # Once all processes start as they do for users, and import what they need.
    monkeypatch.setenv("PATH", f"{BIN}{os.pathsep}{os.environ['PATH']}")
    pairs = {**settings, "output-dir": str(tmp_path / "runs"), "resume-from": str(killed)}
    words = [word for key, value in pairs.items() for word in ("-c", f"{key}={json.dumps(value)}")]
    command = [BIN / "pfedgpa", "run", "--clients", "4", *words]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    page = Path(done.stdout.splitlines()[-1].removeprefix("The page of this run: "))
    assert page.parent.parent == tmp_path / "runs"
    assert page.is_file()
    resumed = read_lines(page.parent)
    assert without_seconds(resumed) == expected
    # Rows of completed rounds are taken over as they are, with the seconds they took.
    assert resumed[0] == begun[0]


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
