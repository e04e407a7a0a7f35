"""The folder of a run: settings, metrics, figure and the personalized models."""

import contextlib
import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from pfedgpa_app.config import Config
from pfedgpa_app.figures import Curve, draw_curves
from pfedgpa_app.parameters import StateDict
from pfedgpa_app.runs import is_going_on, name_of, register, run_folders
from pfedgpa_app.state import sync_to_disk, writing

Row = dict[str, Any]


class RowError(ValueError):
    """A line of a run's file that is no row; the message names the file."""


JUDGED = "personalized-accuracy"
ROWS = ("clients.jsonl", "method.jsonl", "metrics.jsonl")
REPORT = "report.html"
NO_REPLY = "no reply"
BUDGET_SPENT = "privacy budget spent"
CURVES = {
    "personalized-accuracy": "personalized",
    "finetuned-accuracy": "after local training",
    "received-accuracy": "as sent for training",
}
TRAINING_METRICS = (
    "num-examples",
    "accuracy-before",
    "loss-before",
    "accuracy-after",
    "loss-after",
    "seconds",
    "epsilon",
)


@dataclass
class RoundRecord:
    """What happened in one round, as a strategy sees it.

    Attributes
    ----------
    server_round
        The round, from 1.
    clients
        A row a client.
    seconds_clients
        Wall-clock seconds from sending the training messages to the last reply.
    seconds_diffusion
        Seconds the server spent on learning from the uploads.
    num_nodes
        Clients that were connected when the round began.
    bytes_down, bytes_up
        Parameters sent to and received from clients.
    """

    server_round: int
    clients: dict[int, Row] = field(default_factory=dict)
    seconds_clients: float = 0.0
    seconds_diffusion: float = 0.0
    num_nodes: int = 0
    bytes_down: int = 0
    bytes_up: int = 0

    def expect(self, clients: Iterable[int], node_ids: Iterable[int]) -> None:
        """Note who was asked to train."""
        for client, node_id in zip(clients, node_ids, strict=True):
            self._row(client).update({"node-id": str(node_id), "status": NO_REPLY})

    def trained(self, client: int, metrics: Mapping[str, float], num_bytes: int) -> None:
        """Note the metrics of an upload; of what a client sends, only those we know."""
        known = {name: metrics[name] for name in TRAINING_METRICS if name in metrics}
        self._row(client).update({"status": "ok", **known})
        self.bytes_up += num_bytes

    def spent(self, client: int, epsilon: float) -> None:
        """Note that a client did not train, since that would exceed its privacy budget."""
        self._row(client).update({"status": BUDGET_SPENT, "epsilon": epsilon})

    def unusual(self, client: int, reason: str) -> None:
        """Note why others do not learn from a client in this round."""
        self._row(client)["unusual"] = reason

    def failed(self, client: int, reason: str) -> None:
        """Note why a client is out of the round."""
        self._row(client)["status"] = reason

    def evaluated(self, client: int, metrics: Mapping[str, float]) -> None:
        """Note the metrics of a client's personalized model."""
        self._row(client).update(
            {
                f"personalized-{name}": metrics[name]
                for name in ("accuracy", "loss")
                if name in metrics
            }
        )

    @property
    def num_trained(self) -> int:
        """Number of uploads that were used."""
        return sum(row.get("status") == "ok" for row in self.clients.values())

    @property
    def num_failures(self) -> int:
        """Number of clients that were asked to train and sent no usable reply."""
        return sum(map(has_failed, self.clients.values()))

    def column(self, name: str) -> list[float]:
        """Return what the clients have under a name, by client."""
        return [row[name] for _, row in sorted(self.clients.items()) if name in row]

    def _row(self, client: int) -> Row:
        return self.clients.setdefault(client, {"round": self.server_round, "client": client})


def has_failed(row: Row) -> bool:
    """Tell whether a client was asked to train and sent no usable reply."""
    return row.get("status", "ok") not in ("ok", BUDGET_SPENT)


def summarize(record: RoundRecord, strategy: str, seconds_round: float) -> Row:
    """Return the line of a round in metrics.jsonl; a mean of no client is None."""
    accuracies = record.column("personalized-accuracy")
    return {
        "round": record.server_round,
        "strategy": strategy,
        "personalized-accuracy": _mean(accuracies),
        "personalized-loss": _mean(record.column("personalized-loss")),
        "personalized-accuracy-worst": min(accuracies, default=None),
        "personalized-accuracy-std": statistics.pstdev(accuracies) if accuracies else None,
        "received-accuracy": _mean(record.column("accuracy-before")),
        "finetuned-accuracy": _mean(record.column("accuracy-after")),
        "finetuned-loss": _mean(record.column("loss-after")),
        "num-nodes": record.num_nodes,
        "num-clients": record.num_trained,
        "num-failures": record.num_failures,
        "epsilon": max(record.column("epsilon"), default=None),
        "seconds-clients": round(record.seconds_clients, 3),
        "seconds-diffusion": round(record.seconds_diffusion, 3),
        "seconds-round": round(seconds_round, 3),
        "bytes-down": record.bytes_down,
        "bytes-up": record.bytes_up,
    }


def describe(row: Row, num_rounds: int) -> str:
    """Say in a line what a line of metrics.jsonl has of a round."""
    judged, worst, received, trained = accuracies(row)
    epsilon = "" if row.get("epsilon") is None else f"; epsilon {row['epsilon']:.3g}"
    parts = ("seconds-round", "seconds-clients", "seconds-diffusion")
    whole, clients, diffusion = (f"{value_of(row, name):.1f}" for name in parts)
    return (
        f"Round {row['round']}/{num_rounds}: personalized accuracy {judged} (worst client "
        f"{worst}), as sent {received}, after local training {trained}; "
        f"{value_of(row, 'num-clients')} clients, {whole} s (clients {clients}, diffusion "
        f"{diffusion}){epsilon}"
    )


def value_of(row: Row, name: str) -> float:
    """Return a number of a round, 0 where it is not known, as in files of older versions."""
    value: float = row.get(name) or 0
    return value


def accuracies(row: Row) -> list[str]:
    """Return personalized accuracy, worst client, as sent and after training; a dash for none."""
    names = (JUDGED, f"{JUDGED}-worst", "received-accuracy", "finetuned-accuracy")
    return ["-" if row.get(name) is None else f"{row[name]:.4f}" for name in names]


class RunFolder:
    """Writes ``<output-dir>/<run id>/`` while a run goes on, which is until it is closed.

    Attributes
    ----------
    name
        What the run is called, as no other below the output folder.

    Raises
    ------
    WriteError
        If the folder cannot be made, or is one of a run already.
    """

    def __init__(self, path: Path, config: Config) -> None:
        self.path = path
        self.config = config
        # metrics.jsonl comes last: a round that is in it is complete.
        self._unwritten: dict[str, list[Row]] = {name: [] for name in ROWS}
        with writing(path), contextlib.ExitStack() as undone:
            # What a run goes on with from an earlier one may be there already.
            path.mkdir(parents=True, exist_ok=True)
            # First of all: a folder with settings is a run, and then has its name and its lock.
            self.name, self._lock = register(path, config)
            undone.callback(self._lock.close)
            with (path / "config.json").open("x") as file:
                undone.callback((path / "config.json").unlink)
                file.write(json.dumps(config.to_flat(), indent=2) + "\n")
            sync_to_disk(path / "config.json")
            undone.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.close()

    def add_round(self, row: Row, clients: Iterable[Row], method: Row | None = None) -> None:
        """Append a round to metrics.jsonl and its clients to clients.jsonl.

        ``method`` is what the server learned, for method.jsonl, where there is something to tell.
        What cannot be written is kept, and written with the next round.

        Raises
        ------
        WriteError
            If some of it cannot be written now.
        """
        self._unwritten["clients.jsonl"] += clients
        self._unwritten["metrics.jsonl"].append(row)
        if method:
            self._unwritten["method.jsonl"].append({"round": row["round"], **method})
        for name, rows in self._unwritten.items():
            _append(self.path / name, rows)
            rows.clear()

    def go_on_from(self, run: "Run", completed_rounds: int) -> None:
        """Begin with the rows of an earlier run, as far as its checkpoint knows of them."""
        for name in ROWS:
            rows = _read_rows(run.path / name)
            _append(self.path / name, [row for row in rows if row["round"] <= completed_rounds])

    def save_model(
        self, client: int, state: StateDict, server_round: int, site: Mapping[str, Tensor]
    ) -> None:
        """Write a client's personalized model, ``models/client-<number>.safetensors``.

        ``site`` is what the client told of its data, if anything: ``image-stats``, ``(2,
        channels)``, mean and standard deviation; ``partition``, ``(2,)``, its number and that of
        all.
        """
        # Partitioners take seconds to import, and only the end of a run needs models.
        from pfedgpa_app.data import ImageStats
        from pfedgpa_app.exported import ExportedModel

        stats = partition = None
        if "image-stats" in site:
            stats = ImageStats(*site["image-stats"])
        if "partition" in site:
            partition_id, num_partitions = site["partition"].tolist()
            partition = (partition_id, num_partitions)
        folder = self.path / "models"
        with writing(folder):
            folder.mkdir(exist_ok=True)
        model = ExportedModel(state, self.config, client, server_round, stats, partition)
        model.save(folder / f"client-{client}.safetensors")

    def draw(self) -> None:
        """Draw accuracy.png, and accuracy.svg, from the metrics so far."""
        file = self.path / "accuracy.png"
        with writing(file):
            draw_accuracy(Run.read(self.path), file)


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it."""

    path: Path
    config: Config
    metrics: list[Row]

    @classmethod
    def read(cls, path: Path) -> "Run":
        """Read a run's settings and metrics.

        Raises
        ------
        ValueError
            If the folder is not one of a run.
        """
        try:
            flat = json.loads((path / "config.json").read_text())
            if "strategy" not in flat:
                raise ValueError("config.json names no strategy")
            config = Config.from_older(flat)
            return cls(path, config, _read_rows(path / "metrics.jsonl"))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not the folder of a run: {error}") from error

    @property
    def name(self) -> str:
        """What it is called; its id, if an older version wrote it."""
        return name_of(self.path)

    @property
    def state(self) -> str:
        """``running``, ``complete`` or ``stopped``: over, with rounds missing."""
        if is_going_on(self.path):
            return "running"
        return "complete" if self.is_complete else "stopped"

    @property
    def clients(self) -> list[Row]:
        """The rows of the clients in all rounds."""
        return _read_rows(self.path / "clients.jsonl")

    @property
    def method(self) -> list[Row]:
        """What the server learned, by round; not every strategy tells."""
        return _read_rows(self.path / "method.jsonl")

    def model_file(self, client: int) -> Path:
        """Return the file of a client's personalized model.

        Raises
        ------
        ValueError
            If there is none, with the clients that have one.
        """
        folder = self.path / "models"
        numbers = [
            file.stem.removeprefix("client-") for file in folder.glob("client-*.safetensors")
        ]
        clients = sorted(int(number) for number in numbers if number.isdecimal())
        if not clients:
            raise ValueError(
                f"{self.path} has no models: they are written after the last round, and "
                f"{len(self.metrics)} of {self.config.num_server_rounds} are complete"
            )
        if client not in clients:
            raise ValueError(
                f"{self.path} has no model of client {client}; there are those of "
                f"{', '.join(map(str, clients))}"
            )
        return folder / f"client-{client}.safetensors"

    @property
    def num_nodes(self) -> int:
        """Number of clients that were connected in the last round."""
        return int(self.last("num-nodes") or 0)

    @property
    def is_complete(self) -> bool:
        """Whether all rounds are there."""
        return len(self.metrics) == self.config.num_server_rounds

    def is_of(self, config: Config) -> bool:
        """Whether the run had these settings, wherever it was written to, interrupted or not."""
        same_length = self.config.num_server_rounds == config.num_server_rounds
        return same_length and not self.config.differences(config)

    def last(self, name: str) -> float | None:
        """Return a metric of the last round that has it, None if none has."""
        return next(
            (row[name] for row in reversed(self.metrics) if row.get(name) is not None), None
        )


def read_runs(folder: Path) -> list[Run]:
    """Return the runs below an output folder, oldest first; other folders are passed over."""
    runs = []
    for path in run_folders(folder):
        with contextlib.suppress(ValueError):
            runs.append(Run.read(path))
    return runs


def mean_and_spread(values: Sequence[float], digits: int = 4) -> str:
    """Write mean ± standard deviation; one value has no deviation, and none is a dash."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def draw_accuracy(run: Run, file: Path) -> None:
    """Draw a run's mean accuracies over rounds as PNG, and as SVG beside it.

    Where not every round was judged, a curve has the models of the round before, as they were
    sent.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    names = dict(CURVES)
    if run.config.server.evaluate_every == 1:
        del names["received-accuracy"]
    curves = []
    for metric, name in names.items():
        rows = [row for row in run.metrics if row.get(metric) is not None]
        if rows:
            rounds = [row["round"] for row in rows]
            curves.append(Curve.over(name, rounds, [[row[metric] for row in rows]]))
    draw_curves(file, {"": curves}, run.name, "Mean over clients.")


def parse_rows(file: Path, lines: bytes) -> list[Row]:
    """Return the rows in whole lines of a file.

    Raises
    ------
    RowError
        If a line is not a JSON object with a round.
    """
    rows = []
    for line in lines.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("round"), int):
            raise RowError(
                f"{file} is damaged: {line[:60]!r}; right would be a JSON object with a round"
            )
        rows.append(row)
    return rows


def _read_rows(file: Path) -> list[Row]:
    """Read JSON lines; the last one of a run that was killed may be cut off."""
    content = file.read_bytes() if file.exists() else b""
    return parse_rows(file, content[: content.rfind(b"\n") + 1])


def _append(file: Path, rows: Sequence[Row]) -> None:
    """Append rows, all of them or none.

    Raises
    ------
    WriteError
        If they cannot be written.
    """
    if not rows:
        return
    with writing(file):
        size = file.stat().st_size if file.exists() else 0
        try:
            with file.open("a") as stream:
                stream.writelines(json.dumps(row) + "\n" for row in rows)
            # A checkpoint must not outlast the rows of its rounds.
            sync_to_disk(file)
        except OSError:
            if file.exists():
                os.truncate(file, size)
            raise


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None
