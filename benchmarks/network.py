"""Flower's processes on loopback, with separate ports and folders."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

PROJECT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
INSECURE = ("--insecure",)
PATIENCE = 900.0
"""Seconds to wait for what takes some on an idle machine."""


class Network:
    """A SuperLink, the SuperNodes that connect to it, and the `flwr` commands of its users.

    Everything that the processes write is below ``folder``: the log of each under its name.
    """

    def __init__(self, folder: Path, app: Path = PROJECT, security: Sequence[str] = INSECURE):
        self.folder, self.app, self.output = folder, app, folder / "runs"
        self.security = security
        self.port = free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.env = flower_environment(folder)
        configure_connection(folder, self.port, "insecure = true")

    def start_superlink(self, *options: str | Path) -> subprocess.Popen[bytes]:
        """Start the SuperLink, or start it again on the same port and database."""
        command = ["flower-superlink", *self.security, "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--database", str(self.folder / "state.db")]
        process = self.start("superlink", *command, *options)
        wait_for_port(self.port, process)
        return process

    def start_supernode(
        self, name: str, node_config: str, *options: str | Path, env: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a SuperNode; it appends to the log of its name."""
        command = ["flower-supernode", *self.security, "--superlink", f"127.0.0.1:{self.port}"]
        command += ["--host", "127.0.0.1", "--port", str(free_port()), "--node-config", node_config]
        return self.start(name, *command, *options, env=env)

    def start_run(self, name: str = "run", **settings: object) -> subprocess.Popen[bytes]:
        """Start `flwr run`, which streams the ServerApp's log into its own."""
        return self.start(name, *self.run_command(**settings))

    def run_command(self, **settings: object) -> list[str]:
        """Return the command that runs the app."""
        pairs = {"output-dir": str(self.output), "client.device": "cpu", **settings}
        config = " ".join(f"{key}={json.dumps(value)}" for key, value in pairs.items())
        return ["flwr", "run", str(self.app), "test", "--stream", "--run-config", config]

    def start(
        self, name: str, program: str, *arguments: str | Path, env: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a program of this environment; its output goes to the end of ``<name>.log``."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [program, *arguments],
                env=self.env | (env or {}),
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.processes[name] = process
        return process

    def log(self, name: str) -> str:
        """Return the log of a process."""
        return (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def run_folder(self) -> Path | None:
        """Return the folder of the latest run."""
        folders = [path for path in self.output.glob("*") if path.is_dir()]
        return max(folders, key=lambda path: path.stat().st_ctime, default=None)

    def kill(self, name: str) -> None:
        """Send SIGKILL to a process and all that it started, and wait until they have ended."""
        killed = kill_with_descendants(self.processes[name].pid)
        self.processes.pop(name).wait()
        wait_until(lambda: parents().keys().isdisjoint(killed))

    def __enter__(self) -> "Network":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        end_all(self.processes.values(), self.folder, show_logs=error is not None)


def flower_environment(folder: Path) -> dict[str, str]:
    """Return an environment that confines processes to ``folder`` and this machine."""
    path = os.environ["PATH"]
    return {
        **os.environ,
        "HOME": str(folder),
        "FLWR_HOME": str(folder / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PYTHONUNBUFFERED": "1",
        "PATH": path if str(BIN) in path.split(os.pathsep) else f"{BIN}{os.pathsep}{path}",
    }


def configure_connection(folder: Path, port: int, security: str) -> None:
    """Write the configuration for `flwr run . test`."""
    file = folder / "flwr" / "config.toml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(
        f'[superlink.test]\naddress = "127.0.0.1:{port}"\n{security}\n', encoding="utf-8"
    )


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until a process listens on a port."""

    def answers() -> bool:
        assert process.poll() is None, f"the process for port {port} ended"
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_until(answers)


def wait_until(holds: Callable[[], bool], timeout: float = PATIENCE, pause: float = 0.05) -> None:
    """Poll a condition until it holds."""
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline, f"not so within {timeout:.0f} s"
        time.sleep(pause)


def read_lines(folder: Path | None, name: str = "metrics.jsonl") -> list[dict]:
    """Return the whole lines of a file of JSON lines."""
    file = folder and folder / name
    text = file.read_text(encoding="utf-8") if file and file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def end_all(processes: Iterable[subprocess.Popen[bytes]], folder: Path, *, show_logs: bool) -> None:
    """Kill processes and their descendants; print the end of each log in a folder."""
    processes = list(processes)
    kill_with_descendants(*(process.pid for process in processes))
    for process in processes:
        process.wait()
    if show_logs:
        for file in sorted(folder.glob("*.log")):
            print(f"--- {file.name}\n{file.read_text(encoding='utf-8', errors='replace')[-3000:]}")


def kill_with_descendants(*processes: int) -> list[int]:
    """Send SIGKILL to processes and their descendants, Ray's included."""
    killed = with_descendants(*processes)
    for process in killed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    return killed


def with_descendants(*processes: int) -> list[int]:
    """Return process ids and those of all descendants."""
    parent_of = parents()
    found = list(processes)
    for process in found:  # which grows during the loop
        found += [child for child, parent in parent_of.items() if parent == process]
    return found


def parents() -> dict[int, int]:
    """Return the parent of every running process."""
    listing = subprocess.check_output(
        ["ps", "-e", "-o", "pid=,ppid=,state=,nlwp="], text=True, encoding="utf-8"
    )
    rows = (line.split() for line in listing.splitlines())
    return {int(row[0]): int(row[1]) for row in rows if row[2] != "Z" or int(row[3]) > 1}
