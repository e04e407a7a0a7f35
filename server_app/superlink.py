"""Whole runs of the app by `flwr run`, on Flower's simulation or a SuperLink that is there."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

from pfedgpa_app.config import Config
from pfedgpa_app.console import fail
from pfedgpa_app.report import Run


def run_on_flower(config: Config, clients: int, superlink: str) -> Run:
    """Run the app of the current folder by `flwr run`, showing its rounds.

    On the SuperLink ``local`` it is simulated with ``clients``; any other has SuperNodes.
    """
    # The app's environment need not be this one.
    config = config.model_copy(update={"output_dir": str(config.output_path)})
    with tempfile.NamedTemporaryFile("w", suffix=".toml", encoding="utf-8") as overrides:
        overrides.writelines(f"{key} = {_toml(v)}\n" for key, v in config.to_flat().items())
        overrides.flush()
        command = [_flwr(), "run", ".", superlink, "--stream", "--run-config", overrides.name]
        if superlink == "local":
            federation = f"num-supernodes={clients} client-resources-num-cpus=1"
            command += ["--federation-config", federation]
        log, run_id = _follow(command, superlink)
    problem = "flwr run did not finish the run"
    if run_id:
        try:
            run = Run.read(config.output_path / run_id)
            if run.is_complete and run.is_of(config):
                return run
        except ValueError as error:
            problem = f"{problem} {run_id}: {error}"
    fail(f"{problem}. The end of its log:\n{''.join(log)}")


def _follow(command: list[str], superlink: str) -> tuple[deque[str], str]:
    """Run `flwr run`, print what it says of rounds, return its last lines and the id of its run.

    The run is the SuperLink's, and would go on after an interrupt: it is stopped.
    """
    log: deque[str] = deque(maxlen=60)
    run_id = ""
    # A SuperLink that is started for it need not install what this command runs in already, and
    # what flwr prints must come at once, or an interrupt would not know what to stop.
    env = {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", **os.environ}
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
            for line in process.stdout:
                log.append(line)
                if started := re.search(r"started run (\d+)", line):
                    run_id = started[1]
                if "Waiting for nodes" in line:  # for ever, if there are too few
                    print(f"  {line.partition(': ')[2].strip() or line.strip()}", flush=True)
                _, found, rest = line.partition("Round ")
                if found and "personalized" in rest:
                    print(f"  Round {rest}", end="", flush=True)
    except KeyboardInterrupt:
        if run_id:
            print(f"\nStopping run {run_id}", file=sys.stderr, flush=True)
            subprocess.run([command[0], "stop", run_id, superlink], check=False)
        raise
    return log, run_id


def _flwr() -> str:
    """Return flwr's command, also where the environment of this Python is not activated."""
    beside = Path(sys.executable).with_name("flwr")
    return str(beside) if beside.exists() else "flwr"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    # A JSON string is a TOML string too.
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
