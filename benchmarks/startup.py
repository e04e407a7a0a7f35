"""The time from `flwr run` to the end of the first round, by step.

    python -m benchmarks.startup

The README's first run, ten simulated clients, on a running SuperLink. Seconds are those of log
lines, to a tenth. Further tables have the processor seconds of a SuperNode's process before it
trains, with and without a cached partition, and of commands that compute nothing.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import typer

from benchmarks.network import Network
from benchmarks.options import Quick

# Log lines, and the steps that they end.
LINES = {
    "Successfully started run": "the app is packed and sent to the SuperLink",
    "Starting Flower": "the ServerApp's process has imported what it needs",
    "[ROUND 1/": "Ray and the simulation are up, the clients are counted",
    "aggregate_train: Received": "clients have imported what they need, and trained",
    "configure_evaluate": "the server has learned",
    "Round 1/": "the models are evaluated",
}

# Commands that compute nothing.
COMMANDS = ("--version", "--help", "runs")

CLIENT = """
import client_app.messages
from pfedgpa_app.config import Config
from pfedgpa_app.data import client_data
client_data(Config().data, 0, 0, 10)
"""
CALL = """
from server_app.cli import app
app()
"""


def main(quick: Quick = False) -> None:
    """Print the tables."""
    print("| processor seconds of a command | |\n| --- | --- |")
    for name in COMMANDS:
        print(f"| {seconds_of(CALL, name):.2f} | pfedgpa {name} |", flush=True)
    print()
    with tempfile.TemporaryDirectory() as folder:
        first, later = (seconds_of(CLIENT, cache=folder) for _ in range(2))
    print("| processor seconds before a client trains | |\n| --- | --- |")
    print(f"| {first:.1f} | for the first time |\n| {later:.1f} | later |\n")
    with tempfile.TemporaryDirectory() as folder, Network(Path(folder)) as network:
        begin = time.monotonic()
        network.start_superlink("--simulation")
        print("| seconds | since the step before | |\n| --- | --- | --- |")
        print(f"| | {time.monotonic() - begin:.1f} | the SuperLink is up |")
        before = 0.0
        for seconds, done in steps(network, quick):
            print(f"| {seconds:.1f} | {seconds - before:.1f} | {done} |", flush=True)
            before = seconds


def seconds_of(script: str, *arguments: str, cache: str = "") -> float:
    """Return the processor seconds of a Python process, with a folder for its cache."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = {**os.environ, "XDG_CACHE_HOME": cache}
    command = [sys.executable, "-c", script, *arguments]
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def steps(network: Network, quick: bool) -> Iterator[tuple[float, str]]:
    """Run the app, and yield its steps with their seconds."""
    begin = time.monotonic()
    clients = 2 if quick else 10
    federation = f"num-supernodes={clients} client-resources-num-cpus=1"
    settings = {"num-server-rounds": 1} if quick else {}
    command = [*network.run_command(**settings), "--federation-config", federation]
    process = network.start("run", *command)
    expected = dict(LINES)
    while process.poll() is None:
        log = network.log("run")
        while expected and next(iter(expected)) in log:
            line = next(iter(expected))
            yield time.monotonic() - begin, expected.pop(line)
        time.sleep(0.05)
    yield time.monotonic() - begin, "the run is over: all rounds, models and figure"


if __name__ == "__main__":
    typer.run(main)
