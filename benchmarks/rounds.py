"""The time of a simulated round, with evaluation in every round or only in the last.

    python -m benchmarks.rounds --rounds 5

Runs conf/fashion-mnist-20.toml on its own SuperLink, two clients at a time. The fraction of a round
in which clients train is the sum of their seconds, from message to reply, by twice those of the
round. The first round, in which Ray starts, and the last, in which all are evaluated, do not count.
"""

import subprocess
import tempfile
from pathlib import Path
from statistics import fmean

import typer

from benchmarks.network import PROJECT, Network, read_lines
from benchmarks.options import Quick
from benchmarks.small_runs import LESS
from pfedgpa_app.config import flatten
from pfedgpa_app.files import read_toml

CLIENTS, WORKERS = 20, 2
FEW = 5


def main(rounds: int = 7, quick: Quick = False) -> None:
    """Print the table."""
    rounds = 3 if quick else rounds  # only the second counts
    print(
        "| `server.evaluate-every` | seconds a round | clients train | MB down | MB up | "
        "accuracy in the last round |\n| --- | --- | --- | --- | --- | --- |"
    )
    with tempfile.TemporaryDirectory() as folder, Network(Path(folder)) as network:
        network.start_superlink("--simulation")
        for every in (0,) if quick else (1, 0):
            print(measure(network, rounds, every, quick), flush=True)


def measure(network: Network, rounds: int, every: int, quick: bool) -> str:
    """Return the row of a run."""
    file, clients = PROJECT / "conf" / "fashion-mnist-20.toml", FEW if quick else CLIENTS
    settings = {
        **dict(flatten(read_toml(file))),
        "num-server-rounds": rounds,
        "server.evaluate-every": every,
        "server.min-available-nodes": clients,
        # Halves are measured in the first round alone.
        "diffusion.measure-every": rounds,
        **(LESS if quick else {}),
    }
    federation = f"num-supernodes={clients} client-resources-num-cpus=1 "
    federation += f"init-args-num-cpus={WORKERS}"
    command = [*network.run_command(**settings), "--federation-config", federation]
    subprocess.run(command, env=network.env, check=True, capture_output=True)
    folder = network.run_folder()
    last = read_lines(folder)[-1]["personalized-accuracy"]
    rows = [row for row in read_lines(folder) if 1 < row["round"] < rounds]
    answers = read_lines(folder, "clients.jsonl")
    parts = []
    for row in rows:
        busy = sum(each["seconds"] for each in answers if each["round"] == row["round"])
        parts.append(busy / (WORKERS * row["seconds-round"]))
    seconds, down, up = (
        fmean(row[name] for row in rows) for name in ("seconds-round", "bytes-down", "bytes-up")
    )
    return (
        f"| {every} | {seconds:.1f} | {fmean(parts):.2f} | {down / 1e6:.1f} | {up / 1e6:.1f} | "
        f"{last:.4f} |"
    )


if __name__ == "__main__":
    typer.run(main)
