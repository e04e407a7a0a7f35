"""The effect of faults on a run, compared with an undisturbed one.

    python -m benchmarks.reliability --figure docs/reliability.png

Every case is a federation of four clients on loopback that train on the digits for six rounds, with
a fault in round 3 and a newcomer in round 5. Finished cases in --results are not repeated.
"""

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, NamedTuple

import typer

from benchmarks.faults import (
    FAULTY_CLIENT,
    PATIENCE,
    Federation,
    SecureFederation,
    connect_unregistered,
    copy_app,
)
from benchmarks.network import read_lines, wait_until
from benchmarks.options import Quick, output_file, tenth
from pfedgpa_app.figures import ACCURACY, COLOURS, drawing
from pfedgpa_app.files import read_text

Result = dict[str, Any]
Settings = dict[str, object]

CLIENTS = 4
ROUNDS = 6
FAULT = 3
JOIN = 5
LAST = f"client-{CLIENTS - 1}"
SETTINGS: Settings = {
    "num-server-rounds": ROUNDS,
    "server.min-available-nodes": CLIENTS,
    "data.train-samples": 50,
    "data.uniform-fraction": 0.2,
}
FAULTS = "nan,shape,names,size,record"


def undisturbed(federation: Federation, settings: Settings) -> list[Path]:
    """Let nothing happen."""
    federation.start_run(**settings)
    return [federation.wait_for_end()]


def killed_supernode(federation: Federation, settings: Settings) -> list[Path]:
    """Kill a SuperNode while it trains, and start it until it is accepted again."""
    start_until_fault(federation, settings)
    federation.kill(LAST)
    federation.restart_client(CLIENTS - 1)
    return [federation.wait_for_end()]


def killed_client_app(federation: Federation, settings: Settings) -> list[Path]:
    """Kill the training process, as when memory runs out."""
    start_until_fault(federation, settings)
    federation.kill_below(LAST, "flwr-clientapp")
    return [federation.wait_for_end()]


def frozen_supernode(federation: Federation, settings: Settings) -> list[Path]:
    """Freeze a SuperNode while it trains, until the next round is over."""
    start_until_fault(federation, settings | {"server.min-available-nodes": CLIENTS - 1})
    with federation.frozen(LAST):
        federation.wait_for_rounds(FAULT + 1)
    return [federation.wait_for_end()]


def falsified_replies(federation: Federation, settings: Settings) -> list[Path]:
    """Add a client with another faulty upload in every round."""
    federation.num_partitions = CLIENTS + 1
    federation.start_client(CLIENTS, f"fault='{FAULTS}'")
    federation.start_run(**settings | {"server.min-available-nodes": CLIENTS + 1})
    return [federation.wait_for_end()]


def killed_server_app(federation: Federation, settings: Settings) -> list[Path]:
    """Kill the ServerApp while clients train, and resume its run."""
    start_until_fault(federation, settings)
    federation.kill_below("superlink", "flwr-serverapp")
    return resumed(federation, settings)


def killed_superlink(federation: Federation, settings: Settings) -> list[Path]:
    """Kill the SuperLink and all below it while clients train, and resume the run on a new one."""
    start_until_fault(federation, settings)
    federation.kill("superlink")
    federation.start_superlink()
    return resumed(federation, settings)


def unregistered(federation: SecureFederation, settings: Settings) -> list[Path]:
    """Start unregistered SuperNodes, and one without TLS."""
    federation.start_run(**settings)
    federation.wait_for_rounds(FAULT - 1)
    connect_unregistered(federation)
    return [federation.wait_for_end()]


def newcomer(federation: Federation, settings: Settings) -> list[Path]:
    """Start another SuperNode in the round before the one that it joins in."""
    federation.start_run(**settings)
    federation.wait_for_rounds(JOIN - 2)
    federation.num_partitions = CLIENTS + 1
    federation.start_client(CLIENTS)
    return [federation.wait_for_end()]


def start_until_fault(federation: Federation, settings: Settings) -> None:
    """Start a run and wait until the last client trains in the round of the fault."""
    federation.start_run(**settings)
    federation.wait_for_rounds(FAULT - 1)
    federation.wait_for_training(CLIENTS - 1)


def resumed(federation: Federation, settings: Settings) -> list[Path]:
    """Resume the run that was killed; return its folder and that of the run that goes on."""
    killed = federation.run_folder()
    assert killed is not None
    federation.start_run("resumed", **settings, **{"resume-from": killed.name})
    folders = [killed, federation.wait_for_end("resumed")]
    # The SuperLink gives a ServerApp a minute to report again.
    wait_until(lambda: federation.status(killed) != "running", PATIENCE)
    return folders


class Case(NamedTuple):
    """A fault, its kind of federation, and its round."""

    happens: Callable[[Any, Settings], list[Path]]
    kind: type[Federation] = SecureFederation
    round: int = FAULT


UNDISTURBED = "undisturbed"
CASES = {
    UNDISTURBED: Case(undisturbed),
    "SuperNode killed, registered": Case(killed_supernode),
    "SuperNode killed, not registered": Case(killed_supernode, Federation),
    "ClientApp killed": Case(killed_client_app),
    "SuperNode frozen": Case(frozen_supernode),
    "falsified replies": Case(falsified_replies),
    "ServerApp killed": Case(killed_server_app),
    "SuperLink killed": Case(killed_superlink),
    "unregistered SuperNodes": Case(unregistered),
    "newcomer": Case(newcomer, round=JOIN),
}
QUICK = (UNDISTURBED, "falsified replies")
"""Cases without a fixed round."""


def measure(case: Case, settings: Settings) -> Result:
    """Run a case in a federation of its own; return what its last run wrote."""
    with tempfile.TemporaryDirectory() as name:
        app = copy_app(Path(name, "app"), FAULTY_CLIENT)
        with case.kind(Path(name), CLIENTS, app) as federation:
            federation.start_superlink()
            federation.start_clients(*range(CLIENTS))
            folders = case.happens(federation, settings)
            return {
                "runs": [federation.status(folder) for folder in folders],
                "metrics": read_lines(folders[-1]),
                "clients": read_lines(folders[-1], "clients.jsonl"),
            }


def main(
    results: Path = Path("build/reliability.jsonl"),
    cases: Annotated[str, typer.Option(help="Only undisturbed and what begins so.")] = "",
    figure: Annotated[Path | None, typer.Option(help="Draw the accuracies there.")] = None,
    quick: Quick = False,
) -> None:
    """Run the cases and print a table of them."""
    results, settings = output_file(results, quick), SETTINGS
    if quick:
        settings = settings | {"num-server-rounds": tenth(ROUNDS)}
    results.parent.mkdir(parents=True, exist_ok=True)
    for name, case in CASES.items():
        chosen = name in QUICK if quick else name.startswith((cases, UNDISTURBED))
        if chosen and name not in read(results):
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"case": name, **measure(case, settings)}) + "\n")
            print(f"{name}: done", flush=True)
    done = read(results)
    print_table(done)
    if figure:
        draw(done, output_file(figure, quick))


def read(results: Path) -> dict[str, Result]:
    """Return the results so far by case."""
    lines = read_text(results).splitlines() if results.exists() else []
    found = [json.loads(line) for line in lines]
    return {
        each["case"]: each for each in sorted(found, key=lambda each: [*CASES].index(each["case"]))
    }


def print_table(done: dict[str, Result]) -> None:
    """Print one line per case."""
    print(
        "| case | runs | no usable reply, and why | clients a round | accuracy | "
        "rounds with the digits of the undisturbed run |"
    )
    print("| --- " * 6 + "|")
    for name, result in done.items():
        cells = [
            name,
            ", ".join(result["runs"]),
            "; ".join(failures(result)) or "-",
            ", ".join(str(row["num-clients"]) for row in result["metrics"]),
            f"{accuracies(result)[-1]:.4f}",
            f"{num_equal_rounds(result, done[UNDISTURBED])} of {len(result['metrics'])}",
        ]
        print("| " + " | ".join(cells) + " |")


def failures(result: Result) -> list[str]:
    """Return the statuses of clients without a usable reply, with their rounds."""
    rounds: dict[str, list[str]] = {}
    for row in result["clients"]:
        if row.get("status", "ok") != "ok":
            who = f"client {row['client']}: {row['status'].split(' — ')[0]}"
            rounds.setdefault(who, []).append(str(row["round"]))
    return [f"{who} ({', '.join(numbers)})" for who, numbers in rounds.items()]


def accuracies(result: Result) -> list[float]:
    """Return the mean accuracy of the models of clients with a usable reply in the run, a round."""
    rows = result["clients"]
    usable = {row["client"] for row in rows if row.get("status") == "ok"}
    return [
        fmean(
            row["personalized-accuracy"]
            for row in rows
            if row["round"] == number and row["client"] in usable and "personalized-accuracy" in row
        )
        for number in rounds_of(result)
    ]


def num_equal_rounds(result: Result, other: Result) -> int:
    """Return in how many rounds the four clients have the same results in both."""

    def digits(each: Result, number: int) -> list[Result]:
        ours = [
            row for row in each["clients"] if row["round"] == number and row["client"] < CLIENTS
        ]
        return [{k: v for k, v in row.items() if k not in ("seconds", "node-id")} for row in ours]

    return sum(digits(result, n) == digits(other, n) for n in rounds_of(result))


def rounds_of(result: Result) -> range:
    """Return the numbers of the rounds."""
    return range(1, len(result["metrics"]) + 1)


def draw(done: dict[str, Result], file: Path) -> None:
    """Draw the accuracies of each case over those of the undisturbed run, as PNG and as SVG."""
    names = [name for name in done if name != UNDISTURBED]
    rounds, without = rounds_of(done[UNDISTURBED]), accuracies(done[UNDISTURBED])
    note = (
        "Blue: the run; grey: the undisturbed run. What a title says happens in the shaded round. "
        "Numbers: clients whose uploads counted."
    )
    with drawing(file, (7, 5.6), "A run in which something fails", note) as figure:
        across = min(3, len(names))
        down = math.ceil(len(names) / 3)
        panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flat
        for axes in panels[len(names) :]:
            axes.remove()
        for name, axes in zip(names, panels, strict=False):
            axes.axvspan(CASES[name].round - 0.5, CASES[name].round + 0.5, color="0.93", zorder=0)
            axes.plot(rounds, without, color="0.7", linewidth=5)
            axes.plot(rounds, accuracies(done[name]), "o-", color=COLOURS[0])
            for row in done[name]["metrics"]:
                place = (row["round"], 0.03)
                axes.text(
                    *place, row["num-clients"], ha="center", transform=axes.get_xaxis_transform()
                )
            axes.set_title(name)
            axes.set_xticks(rounds)
        # Room for the numbers, on the scale that all panels share.
        lowest = min(value for result in done.values() for value in accuracies(result))
        figure.axes[0].set_ylim(bottom=lowest - 0.1)
        for axes in figure.axes[-across:]:
            axes.set_xlabel("round")
        figure.supylabel(ACCURACY)


if __name__ == "__main__":
    typer.run(main)
