"""The app as users run it: `flwr run` on a SuperLink with Flower's simulation engine."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.federation import simulate
from pfedgpa_app.config import Config

PROJECT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent

pytestmark = pytest.mark.processes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class SuperLink:
    """A SuperLink in simulation mode on ports and in folders of its own."""

    folder: Path | None = None  # of the last run

    def __init__(self, folder: Path) -> None:
        self.output = folder / "runs"
        port, control_port = free_port(), free_port()
        self.env = {
            **os.environ,
            "HOME": str(folder),
            "FLWR_HOME": str(folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }
        (folder / "flwr").mkdir()
        (folder / "flwr" / "config.toml").write_text(
            f'[superlink.test]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        command = [BIN / "flower-superlink", "--insecure", "--simulation"]
        command += ["--isolation", "subprocess", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--control-api-address", f"127.0.0.1:{control_port}"]
        command += ["--database", folder / "state.db"]
        self.log = (folder / "superlink.log").open("w")
        self.process = subprocess.Popen(
            command, env=self.env, stdout=self.log, stderr=subprocess.STDOUT, cwd=folder
        )
        self._wait_for(port)

    def command(self, clients: int, workers: int, **settings: object) -> list[str | Path]:
        """Return the command that runs the app."""
        pairs = {"output-dir": str(self.output), "client.device": "cpu", **settings}
        config = " ".join(f"{key}={json.dumps(value)}" for key, value in pairs.items())
        federation = f"num-supernodes={clients} client-resources-num-cpus=1"
        federation += f" init-args-num-cpus={workers}"
        command = [BIN / "flwr", "run", PROJECT, "test", "--stream", "--run-config", config]
        return [*command, "--federation-config", federation]

    def run(self, clients: int, workers: int, **settings: object) -> tuple[str, list[dict]]:
        """Run the app to its end; return its log and metrics."""
        before = set(self.output.glob("*"))
        done = subprocess.run(
            self.command(clients, workers, **settings),
            env=self.env,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        log = done.stdout + done.stderr
        folders = set(self.output.glob("*")) - before
        assert len(folders) <= 1
        self.folder = next(iter(folders), None)
        return log, read_metrics(self.folder)

    def run_until_killed(self, rounds: int, clients: int, workers: int, **settings: object) -> Path:
        """Kill all processes a moment after the app has completed rounds; return its folder."""
        command = self.command(clients, workers, **settings)
        deadline = time.monotonic() + 240
        with subprocess.Popen(command, env=self.env, stdout=self.log, stderr=self.log) as started:
            try:
                while len(read_metrics(folder := next(self.output.glob("*"), None))) < rounds:
                    assert time.monotonic() < deadline, "no round was completed"
                    time.sleep(0.02)
                time.sleep(0.2)
            finally:
                kill_with_descendants(started.pid, self.process.pid)
        self.process.wait()
        assert folder is not None
        return folder

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()

    def _wait_for(self, port: int) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            assert self.process.poll() is None, "the SuperLink ended"
            time.sleep(0.2)
        raise TimeoutError(f"no SuperLink on port {port}")


def read_metrics(folder: Path | None) -> list[dict]:
    """Return the whole lines of metrics.jsonl."""
    file = folder and folder / "metrics.jsonl"
    text = file.read_text() if file and file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def kill_with_descendants(*processes: int) -> None:
    """Send SIGKILL to processes and all that they started, Ray's daemons and workers included."""
    listing = subprocess.check_output(["ps", "-e", "-o", "pid=,ppid="], text=True)
    parents = dict(map(int, line.split()) for line in listing.splitlines())
    doomed = list(processes)
    for process in doomed:  # which grows on the way
        doomed += [child for child, parent in parents.items() if parent == process]
    for process in doomed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    started = SuperLink(tmp_path_factory.mktemp("superlink"))
    yield started
    started.stop()


QUICK = {"num-server-rounds": 3, "client.local-epochs": 2, "diffusion.train-steps": 50}


def without_seconds(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


@pytest.fixture(scope="module")
def one_worker(superlink: SuperLink) -> tuple[str, list[dict], Path]:
    """Return log, metrics and folder of a run with one worker."""
    log, rows = superlink.run(4, workers=1, **QUICK)
    assert len(rows) == 3, log
    return log, rows, superlink.folder


def test_a_run_leaves_all_its_files_and_says_where(one_worker: tuple[str, list[dict], Path]):
    log, _, folder = one_worker
    names = {str(path.relative_to(folder)) for path in folder.rglob("*.*")}
    assert names == {
        "config.json",
        "metrics.jsonl",
        "clients.jsonl",
        "accuracy.png",
        "checkpoint.safetensors",
        *(f"models/client-{client}.safetensors" for client in range(4)),
    }
    assert str(folder) in log
    clients = [json.loads(line) for line in (folder / "clients.jsonl").read_text().splitlines()]
    assert [(row["round"], row["client"]) for row in clients] == [
        (server_round, client) for server_round in (1, 2, 3) for client in range(4)
    ]
    assert all(row["status"] == "ok" for row in clients)


def test_one_worker_or_two_and_a_stop_between_give_the_same_digits(
    superlink: SuperLink, one_worker: tuple[str, list[dict], Path]
):
    _, expected, _ = one_worker
    log, begun = superlink.run(4, workers=2, **{**QUICK, "num-server-rounds": 2})
    assert without_seconds(begun) == without_seconds(expected[:2]), log
    assert superlink.folder is not None
    log, resumed = superlink.run(4, workers=2, **QUICK, **{"resume-from": superlink.folder.name})
    assert without_seconds(resumed) == without_seconds(expected), log


def test_benchmarks_give_the_digits_of_a_run(one_worker: tuple[str, list[dict], Path]):
    _, expected, _ = one_worker
    config = Config.from_flat({"client.device": "cpu", **QUICK})
    _, rows = simulate(config, 4)
    assert without_seconds(rows) == without_seconds(expected)


def test_a_run_killed_in_a_round_loses_that_round_at_most(
    superlink: SuperLink, one_worker: tuple[str, list[dict], Path], tmp_path: Path
):
    _, expected, _ = one_worker
    killed = SuperLink(tmp_path).run_until_killed(1, clients=4, workers=2, **QUICK)
    begun = read_metrics(killed)
    assert without_seconds(begun) == without_seconds(expected[: len(begun)])
    assert not (killed / "models").exists(), "the run was over before it was killed"
    log, resumed = superlink.run(4, workers=2, **QUICK, **{"resume-from": str(killed)})
    assert without_seconds(resumed) == without_seconds(expected), log
    # Rows of completed rounds are taken over as they are, with the seconds they took.
    kept = [row for row in resumed if row in begun]
    assert len(kept) >= len(begun) - 1
    assert f"Going on after round {len(kept)}" in log


def test_a_baseline_runs_on_the_same_settings(superlink: SuperLink):
    log, rows = superlink.run(3, workers=2, **{**QUICK, "strategy": "fedavg-ft"})
    assert [row["strategy"] for row in rows] == ["fedavg-ft"] * 3, log
    for row in rows:  # judged by what came out of local training
        assert row["personalized-accuracy"] == pytest.approx(row["finetuned-accuracy"])


def test_wrong_settings_stop_the_run_before_training_and_all_are_named(superlink: SuperLink):
    wrong = {"diffusion.start": 5000, "server.fraction-train": 0.0, "data.dominant-classes": 11}
    log, rows = superlink.run(2, workers=2, **wrong)
    assert rows == []
    assert superlink.folder is None
    for key, value in wrong.items():
        assert f"{key} = {value}" in log
