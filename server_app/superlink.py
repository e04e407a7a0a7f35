"""Runs of the app by `flwr run`, on Flower's simulation or a running SuperLink."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pfedgpa_app.config import Config
from pfedgpa_app.console import fail
from pfedgpa_app.report import Run

# Also if this Python's environment is not activated.
_BESIDE = Path(sys.executable).with_name("flwr")
PROGRAM = str(_BESIDE) if _BESIDE.exists() else "flwr"
_LEVEL = re.compile(r"(INFO|WARNING|ERROR)\s*:\s*(.*)")
_ENDED = {"finished:failed": "failed", "finished:stopped": "was stopped"}


@dataclass
class FlowerRun:
    """A run as reported by `flwr run`."""

    log: deque[str] = field(default_factory=lambda: deque(maxlen=60))
    """The last lines."""
    run_id: str = ""
    """Flower's id, empty if the run did not start."""
    folder: str = ""
    """The run's folder in the ServerApp's log, empty if it is not logged yet."""

    def read(self, line: str, show: Callable[[str, str], str]) -> str:
        """Read a line of the log, and return what to print of it."""
        self.log.append(line)
        found = _LEVEL.match(_plain(line))
        level, text = found.groups() if found else ("", _plain(line))
        if started := re.search(r"started run (\d+)", text):
            self.run_id = started[1]
        if begun := re.fullmatch(r"Run \S+ \(\d+\) begins: (.+)", text):
            self.folder = begun[1]
        # With too few nodes it waits forever, which is printed.
        is_progress = text.startswith("Waiting for nodes") or (
            text.startswith("Round ") and "personalized" in text
        )
        return f"  {text}" if is_progress else show(level, text)

    def problem(self, superlink: str, env: Mapping[str, str] | None = None) -> str:
        """Return why the SuperLink does not list the run as completed, in one line; else empty."""
        if not self.run_id:
            output = " ".join(_plain(line) for line in self.log)
            return f"flwr did not start the run: {output[-500:].strip() or 'it printed nothing'}"
        command = [PROGRAM, "ls", superlink, "--run-id", self.run_id, "--format", "json"]
        listing = subprocess.run(
            command, env=env, capture_output=True, text=True, encoding="utf-8", check=False
        )
        try:
            run = json.loads(listing.stdout)["runs"][0]
            status, details = str(run["status"]), str(run["status-details"])
        except (ValueError, LookupError, TypeError):
            output = " ".join((listing.stdout + listing.stderr).split())
            return f"how run {self.run_id} ended is unknown: flwr ls printed {output[-500:]}"
        if status == "finished:completed":
            return ""
        cause = " ".join(details.rpartition("exception: ")[2].split())
        ended = _ENDED.get(status, f"is {status}")
        return f"run {self.run_id} {ended}" + (f": {cause}" if cause not in ("", "N/A") else "")


def run_on_flower(config: Config, clients: int, superlink: str) -> Run:
    """Return the run of `flwr_run`; on the SuperLink ``local``, ``clients`` are simulated."""
    # Absolute, since the app's environment may differ.
    config = config.model_copy(update={"output_dir": str(config.output_path)})
    flower_run = flwr_run(config, superlink, clients if superlink == "local" else None)
    problem = "flwr run did not finish the run"
    if flower_run.run_id:
        try:
            run = Run.read(config.output_path / flower_run.run_id)
            if run.is_complete and run.is_of(config):
                return run
        except ValueError as error:
            problem = f"{problem} {flower_run.run_id}: {error}"
    fail(f"{problem}. The end of its log:\n{''.join(flower_run.log)}")


def flwr_run(
    config: Config,
    superlink: str,
    clients: int | None,
    *,
    env: Mapping[str, str] = os.environ,
    show: Callable[[str, str], str] = lambda level, text: "",
) -> FlowerRun:
    """Run the app of the current folder by `flwr run`, and print its rounds.

    ``clients`` is the number of simulated clients; None if the SuperLink has SuperNodes. ``show``
    is called with level and text of other log lines, and returns what to print.
    """
    run = FlowerRun()
    # A new SuperLink need not install this environment's packages again. Unbuffered, so that the
    # run's id is known when an interrupt comes.
    env = {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", **env}
    env |= {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    with tempfile.NamedTemporaryFile("w", suffix=".toml", encoding="utf-8") as overrides:
        overrides.writelines(f"{key} = {_toml(v)}\n" for key, v in config.to_flat().items())
        overrides.flush()
        command = [PROGRAM, "run", ".", superlink, "--stream", "--run-config", overrides.name]
        if clients is not None:
            federation = f"num-supernodes={clients} client-resources-num-cpus=1"
            command += ["--federation-config", federation]
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            env=env,
        ) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    if shown := run.read(line, show):
                        print(shown, flush=True)
            except KeyboardInterrupt:
                process.terminate()
                if run.run_id:  # it would go on at the SuperLink
                    print(f"\nStopping run {run.run_id}", file=sys.stderr, flush=True)
                    command = [command[0], "stop", run.run_id, superlink]
                    subprocess.run(command, env=env, check=False)
                raise
    return run


def _plain(line: str) -> str:
    """Return a log line without terminal colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", line).strip()


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    # A JSON string is a TOML string too.
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
