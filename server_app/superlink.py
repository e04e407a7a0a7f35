"""Whole runs of the app by `flwr run`, on Flower's simulation or a SuperLink that is there."""

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

_LEVEL = re.compile(r"(INFO|WARNING|ERROR)\s*:\s*(.*)")
_ENDED = {"finished:failed": "failed", "finished:stopped": "was stopped"}


@dataclass
class FlowerRun:
    """A run as `flwr run` tells of it.

    Attributes
    ----------
    log
        The last lines.
    run_id
        Flower's id, empty if it did not begin.
    folder
        Where the ServerApp says that it writes, empty if it has not come so far.
    """

    log: deque[str] = field(default_factory=lambda: deque(maxlen=60))
    run_id: str = ""
    folder: str = ""

    def problem(self, superlink: str, env: Mapping[str, str] | None = None) -> str:
        """Return, in a line, why the SuperLink does not have it finished; empty if it has."""
        if not self.run_id:
            said = " ".join(_plain(line) for line in self.log)
            return f"flwr did not start the run: {said[-500:].strip() or 'it said nothing'}"
        command = [_flwr(), "ls", superlink, "--run-id", self.run_id, "--format", "json"]
        told = subprocess.run(
            command, env=env, capture_output=True, text=True, encoding="utf-8", check=False
        )
        try:
            run = json.loads(told.stdout)["runs"][0]
            status, details = str(run["status"]), str(run["status-details"])
        except (ValueError, LookupError, TypeError):
            said = " ".join((told.stdout + told.stderr).split())
            return f"how run {self.run_id} ended is not known: flwr ls says {said[-500:]}"
        if status == "finished:completed":
            return ""
        cause = " ".join(details.rpartition("exception: ")[2].split())
        ended = _ENDED.get(status, f"is {status}")
        return f"run {self.run_id} {ended}" + (f": {cause}" if cause not in ("", "N/A") else "")


def run_on_flower(config: Config, clients: int, superlink: str) -> Run:
    """Run the app of the current folder by `flwr run`, showing its rounds.

    On the SuperLink ``local`` it is simulated with ``clients``; any other has SuperNodes.
    """
    # The app's environment need not be this one.
    config = config.model_copy(update={"output_dir": str(config.output_path)})
    told = flwr_run(config, superlink, clients if superlink == "local" else None)
    problem = "flwr run did not finish the run"
    if told.run_id:
        try:
            run = Run.read(config.output_path / told.run_id)
            if run.is_complete and run.is_of(config):
                return run
        except ValueError as error:
            problem = f"{problem} {told.run_id}: {error}"
    fail(f"{problem}. The end of its log:\n{''.join(told.log)}")


def flwr_run(
    config: Config,
    superlink: str,
    clients: int | None,
    *,
    env: Mapping[str, str] = os.environ,
    show: Callable[[str, str], str] = lambda level, text: "",
) -> FlowerRun:
    """Run the app of the current folder by `flwr run`, and print its rounds.

    Parameters
    ----------
    clients
        How many are simulated; None where the SuperLink has SuperNodes.
    env
        The environment of `flwr`.
    show
        What else to print of a line of the log, which has a level and a text.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".toml", encoding="utf-8") as overrides:
        overrides.writelines(f"{key} = {_toml(v)}\n" for key, v in config.to_flat().items())
        overrides.flush()
        command = [_flwr(), "run", ".", superlink, "--stream", "--run-config", overrides.name]
        if clients is not None:
            federation = f"num-supernodes={clients} client-resources-num-cpus=1"
            command += ["--federation-config", federation]
        return _follow(command, superlink, env, show)


def _follow(
    command: list[str],
    superlink: str,
    env: Mapping[str, str],
    show: Callable[[str, str], str],
) -> FlowerRun:
    """Run `flwr run` and print what it says of rounds.

    The run is the SuperLink's, and would go on after an interrupt: it is stopped.
    """
    run = FlowerRun()
    # A SuperLink that is started for it need not install what this command runs in already, and
    # what flwr prints must come at once, or an interrupt would not know what to stop.
    env = {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", **env}
    env |= {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    try:
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=env,
        ) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    run.log.append(line)
                    found = _LEVEL.match(_plain(line))
                    level, text = found.groups() if found else ("", _plain(line))
                    if started := re.search(r"started run (\d+)", text):
                        run.run_id = started[1]
                    if begun := re.fullmatch(r"Run \S+ \(\d+\) begins: (.+)", text):
                        run.folder = begun[1]
                    # For nodes it may wait for ever, if there are too few.
                    is_told = text.startswith("Waiting for nodes") or (
                        text.startswith("Round ") and "personalized" in text
                    )
                    if shown := f"  {text}" if is_told else show(level, text):
                        print(shown, flush=True)
            except KeyboardInterrupt:
                process.terminate()
                raise
    except KeyboardInterrupt:
        if run.run_id:
            print(f"\nStopping run {run.run_id}", file=sys.stderr, flush=True)
            subprocess.run([command[0], "stop", run.run_id, superlink], env=env, check=False)
        raise
    return run


def _plain(line: str) -> str:
    """Return a line of a log without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", line).strip()


def _flwr() -> str:
    """Return flwr's command, also where the environment of this Python is not activated."""
    beside = Path(sys.executable).with_name("flwr")
    return str(beside) if beside.exists() else "flwr"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    # A JSON string is a TOML string too.
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
