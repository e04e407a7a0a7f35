"""What happened in a round, as rows of a run's files and as lines to read."""

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pfedgpa_app import protocol
from pfedgpa_app.files import count_of, parse_json

Row = dict[str, Any]

EVALUATED = "personalized-accuracy"
STANDARD_ERROR = f"{EVALUATED}-error"
READING = (
    "The result is the personalized accuracy: the mean over clients, each with its own model on "
    "its own test set. As sent: before the local training of the round; after local training: "
    "before the server has learned from it"
)
"""Which accuracy of `describe` counts."""
NO_REPLY = "no reply"
CLIENT_FAILED = "the client failed"
BUDGET_SPENT = "privacy budget spent"
BELOW_FLOOR = "the run is less private than the site demands"
TRAINING_METRICS = (
    protocol.NUM_EXAMPLES,
    protocol.ACCURACY_BEFORE,
    protocol.LOSS_BEFORE,
    protocol.ACCURACY_AFTER,
    protocol.LOSS_AFTER,
    protocol.SECONDS,
    protocol.EPSILON,
)
EVALUATION_METRICS = (protocol.ACCURACY, protocol.LOSS, *protocol.SCORES)
RECALL = re.compile(rf"personalized-{protocol.RECALL}(\d{{1,6}})")
"""The column of a class, with its number."""
SCORES = {
    EVALUATED: "accuracy",
    f"personalized-{protocol.BALANCED_ACCURACY}": "balanced accuracy",
    f"personalized-{protocol.MACRO_F1}": "macro F1",
    f"personalized-{protocol.AUROC}": "AUROC",
    f"personalized-{protocol.CALIBRATION_ERROR}": "calibration error",
}
"""What clients' personalized models are evaluated by, as a reader knows it, by column."""


class RowError(ValueError):
    """A line of a run's file that is no row; the message names the file."""


@dataclass
class RoundRecord:
    """What happened in one round, as a strategy sees it.

    Attributes
    ----------
    clients
        A row a client.
    seconds_waiting, seconds_clients, seconds_diffusion
        Wall-clock seconds until enough clients were connected and known, from the first training
        message to the last reply, and of learning from the uploads.
    num_nodes
        Clients that were connected when the round began.
    bytes_down, bytes_up
        Parameters sent to and received from clients.
    names
        The names of clients that have one.
    """

    server_round: int
    clients: dict[int, Row] = field(default_factory=dict)
    seconds_waiting: float = 0.0
    seconds_clients: float = 0.0
    seconds_diffusion: float = 0.0
    num_nodes: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    names: Mapping[int, str] = field(default_factory=dict)

    def note(self, client: int, **columns: object) -> None:
        """Set columns of a client's row, such as ``status``; ``node_id`` is that of ``node-id``."""
        if client not in self.clients:
            named = {"name": self.names[client]} if client in self.names else {}
            self.clients[client] = {"round": self.server_round, "client": client, **named}
        self.clients[client] |= {name.replace("_", "-"): each for name, each in columns.items()}

    def trained(self, client: int, metrics: Mapping[str, float], num_bytes: int) -> None:
        """Note the metrics of an upload that are among `TRAINING_METRICS`."""
        known = {name: metrics[name] for name in TRAINING_METRICS if name in metrics}
        self.note(client, status="ok", **known)
        self.bytes_up += num_bytes

    def evaluated(self, client: int, metrics: Mapping[str, float]) -> None:
        """Note the metrics of a client's personalized model."""
        for name, value in metrics.items():
            if name in EVALUATION_METRICS or name.startswith(protocol.RECALL):
                self.note(client, **{f"personalized-{name}": value})
        if protocol.NUM_EXAMPLES in metrics:
            self.note(client, num_test_examples=int(metrics[protocol.NUM_EXAMPLES]))

    @property
    def num_trained(self) -> int:
        """Number of uploads that were used."""
        return sum(row.get("status") == "ok" for row in self.clients.values())

    @property
    def num_failures(self) -> int:
        """Number of clients that sent no usable reply to their training message."""
        return sum(map(has_failed, self.clients.values()))

    def column(self, name: str) -> list[float]:
        """Return the values of a column, by client, of those that have one."""
        return [row[name] for _, row in sorted(self.clients.items()) if name in row]


def called(row: Row) -> str:
    """Return the number of a row's client and, if it has one, its name."""
    return f"client {row['client']}" + (f" ({row['name']})" if row.get("name") else "")


def names_in(rows: Iterable[Row]) -> dict[int, str]:
    """Return the names that clients last had, of those that have one, by client."""
    return {row["client"]: row["name"] for row in rows if row.get("name")}


# Columns that have a reason why something of a client was not used, and what was not.
_REASONS = {
    "status": "",
    "unusual": "others did not learn from it: ",
    "not-evaluated": "its evaluation cannot be used: ",
}


def failures_in(rows: Sequence[Row]) -> list[Row]:
    """Return ``clients``, their ``names``, ``rounds`` and ``reason`` of what was not used.

    Clients with the same rounds and reason are together; those of the most rounds come first.
    """
    failed: dict[tuple[int, str], list[int]] = {}
    for row in rows:
        for column, what in _REASONS.items():
            if row.get(column, "ok") != "ok":
                failed.setdefault((row["client"], f"{what}{row[column]}"), []).append(row["round"])
    alike: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for (client, reason), rounds in sorted(failed.items(), key=lambda each: -len(each[1])):
        alike.setdefault((reason, tuple(rounds)), []).append(client)
    names = names_in(rows)
    return [
        {
            "clients": sorted(clients),
            "names": [names[client] for client in sorted(clients) if client in names],
            "rounds": list(rounds),
            "reason": reason,
        }
        for (reason, rounds), clients in alike.items()
    ]


def has_failed(row: Row) -> bool:
    """Return whether a client sent no usable reply to its training message."""
    return not row.get("status", "ok").startswith(("ok", BUDGET_SPENT, BELOW_FLOOR))


def causes_of(statuses: Iterable[str]) -> list[str]:
    """Return why clients sent no usable reply: each cause once, after the number of its clients.

    The most frequent one comes last, where a log ends.
    """
    counts = Counter(status.removeprefix(f"{CLIENT_FAILED}: ") for status in statuses)
    return [
        f"{count_of(number, 'client')}: {cause}"
        for cause, number in sorted(counts.items(), key=lambda each: (each[1], each[0]))
    ]


def summarize(record: RoundRecord, strategy: str, seconds_round: float) -> Row:
    """Return the line of a round in metrics.jsonl; a mean of no client is None."""
    accuracies = record.column(EVALUATED)
    means = [f"personalized-{name}" for name in EVALUATION_METRICS]
    recalls = {name for row in record.clients.values() for name in row if RECALL.fullmatch(name)}
    means += sorted(recalls, key=lambda name: (len(name), name))
    # Local training sends models only since Flower's messages need some.
    is_charged = strategy != "local"
    return {
        "round": record.server_round,
        "strategy": strategy,
        **{name: _mean(record.column(name)) for name in means},
        f"{EVALUATED}-worst": min(accuracies, default=None),
        f"{EVALUATED}-std": statistics.pstdev(accuracies) if accuracies else None,
        STANDARD_ERROR: standard_error(record),
        "received-accuracy": _mean(record.column("accuracy-before")),
        "finetuned-accuracy": _mean(record.column("accuracy-after")),
        "finetuned-loss": _mean(record.column("loss-after")),
        "num-nodes": record.num_nodes,
        "num-clients": record.num_trained,
        "num-failures": record.num_failures,
        "num-evaluated": len(accuracies),
        "num-alone": len(record.column("alone")),
        "num-not-finite": len(record.column("not-finite")),
        "epsilon": max(record.column("epsilon"), default=None),
        "seconds-waiting": round(record.seconds_waiting, 3),
        "seconds-clients": round(record.seconds_clients, 3),
        "seconds-diffusion": round(record.seconds_diffusion, 3),
        "seconds-round": round(seconds_round, 3),
        "bytes-down": record.bytes_down * is_charged,
        "bytes-up": record.bytes_up * is_charged,
    }


def standard_error(record: RoundRecord) -> float | None:
    """Return the standard error of a round's mean personalized accuracy; None if it has none.

    Each accuracy is that of a finite test set, and where not all clients were evaluated the mean
    depends on who was: of ``k`` of ``N`` clients its variance is ``(1 - k / N) / k`` times theirs.
    """
    rows = [row for row in record.clients.values() if EVALUATED in row]
    if not rows:
        return None
    sampling = sum(
        row[EVALUATED] * (1 - row[EVALUATED]) / max(1, row.get("num-test-examples", 1))
        for row in rows
    )
    left_out = max(0.0, 1 - len(rows) / max(1, record.num_nodes))
    between = left_out * statistics.pvariance(row[EVALUATED] for row in rows) / len(rows)
    return math.sqrt(max(0.0, sampling) / len(rows) ** 2 + between)


def describe(row: Row, num_rounds: int) -> str:
    """Return a line of what a line of metrics.jsonl has of a round; a dash is no number."""
    names = (EVALUATED, f"{EVALUATED}-worst", "received-accuracy", "finetuned-accuracy")
    evaluated, worst, received, trained = (
        "-" if row.get(name) is None else f"{row[name]:.4f}" for name in names
    )
    num_clients = count_of(value_of(row, "num-clients"), "client")
    parts = ("seconds-round", "seconds-clients", "seconds-diffusion")
    whole, clients, diffusion = (f"{value_of(row, name):.1f}" for name in parts)
    epsilon = "" if row.get("epsilon") is None else f"; epsilon {row['epsilon']:.3g}"
    num_alone = value_of(row, "num-alone")
    alone = f"; {num_alone} of them train alone" if num_alone else ""
    num_failures = value_of(row, "num-failures")
    failed = f"; {num_failures} failed" if num_failures else ""
    return (
        f"Round {row['round']}/{num_rounds}: personalized accuracy {evaluated} (worst client "
        f"{worst}), as sent {received}, after local training {trained}; "
        f"{num_clients}, {whole} s (clients {clients}, diffusion "
        f"{diffusion}){epsilon}{alone}{failed}"
    )


def value_of(row: Row, name: str) -> float:
    """Return a number of a round, 0 where it is not known, as in files of older versions."""
    value: float = row.get(name) or 0
    return value


def mean_and_spread(values: Sequence[float], digits: int = 4) -> str:
    """Write mean ± standard deviation; one value has no deviation, and none is a dash."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def parse_rows(file: Path, lines: bytes) -> list[Row]:
    """Return the rows in whole lines of a file.

    Raises
    ------
    RowError
        If a line is not a JSON object with a round, or a value is not of the kind of its column.
    """
    rows = []
    for line in lines.splitlines():
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not _is_count(row.get("round")):
            raise RowError(
                f"{file} is damaged: {line[:60]!r}; right would be a JSON object with a round"
            )
        for name, value in row.items():
            is_right, right = _KINDS.get(RECALL.sub(EVALUATED, name), _ANY)
            if value is not None and not is_right(value):
                raise RowError(
                    f"{file} is damaged: {name} is {str(value)[:30]!r} in round {row['round']}; "
                    f"right would be {right}"
                )
        rows.append(row)
    return rows


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e18  # type: ignore[arg-type]


_Kind = tuple[Callable[[object], bool], str]
_ANY: _Kind = (lambda value: True, "")
_TEXT: _Kind = (lambda value: isinstance(value, str), "a text")
_NUMBER: _Kind = (_is_number, "a number")
_TEXTS = ("strategy", "node-id", "name", "status", "unusual", "not-evaluated")
# What readers of rows rely on, by column: a check of its values, and what would be right.
_KINDS: dict[str, _Kind] = {
    **dict.fromkeys((*summarize(RoundRecord(0), "", 0.0), *TRAINING_METRICS), _NUMBER),
    "client": (_is_count, "a whole number from 0"),
    **dict.fromkeys(_TEXTS, _TEXT),
}
