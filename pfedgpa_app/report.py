"""The folder of a run: settings, metrics and the personalized models."""

import contextlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pfedgpa_app.config import Config
from pfedgpa_app.divergence import best_kept, warnings_in
from pfedgpa_app.files import read_bytes, read_json
from pfedgpa_app.rounds import Row, names_in, parse_rows
from pfedgpa_app.runs import (
    RUN_FILE,
    field_of,
    is_going_on,
    name_of,
    note_end,
    register,
    run_folders,
)
from pfedgpa_app.state import sync_to_disk, writing

# torch takes seconds to import, which whoever only reads runs is spared.
if TYPE_CHECKING:
    from torch import Tensor

    from pfedgpa_app.parameters import StateDict

ROWS = ("clients.jsonl", "method.jsonl", "metrics.jsonl")
REPORT = "report.html"
BASELINES = ("local", "fedavg")
"""The strategies that the page of a run compares it with."""

# Of a file of rows: of a thousand rounds of a hundred clients, method.jsonl has a tenth of it.
_MAX_ROWS_BYTES = 2**30


class RunFolder:
    """Writes ``<output-dir>/<run id>/`` while a run goes on, which is until it is closed.

    Raises `WriteError` if the folder cannot be made, or is one of a run already.
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
            with (path / "config.json").open("x", encoding="utf-8") as file:
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

        ``method`` is what the server learned, if anything, for method.jsonl. What cannot be written
        is kept, and written with the next round. Raises `WriteError` if some of it cannot be
        written now.
        """
        self._unwritten["clients.jsonl"] += clients
        self._unwritten["metrics.jsonl"].append(row)
        if method:
            self._unwritten["method.jsonl"].append({"round": row["round"], **method})
        for name, rows in self._unwritten.items():
            _append(self.path / name, rows)
            rows.clear()

    def add_clients(self, clients: Iterable[Row]) -> None:
        """Append the clients of a round that will not be complete to clients.jsonl.

        Raises `WriteError` if they cannot be written.
        """
        _append(self.path / "clients.jsonl", list(clients))

    def note(self, key: Literal["error", "ended"], reason: str) -> None:
        """Write why the run ends before its last round: an error, or what it was to reach.

        Raises `WriteError` if it cannot be written.
        """
        with writing(self.path / RUN_FILE):
            note_end(self.path, self._lock, key, reason)

    def go_on_from(self, run: "Run", completed_rounds: int) -> None:
        """Begin with an earlier run's rows, as far as its checkpoint has their rounds."""
        for name in ROWS:
            rows, _ = read_rows(run.path / name)
            _append(self.path / name, [row for row in rows if row["round"] <= completed_rounds])

    def save_model(
        self, client: int, state: "StateDict", server_round: int, site: Mapping[str, "Tensor"]
    ) -> None:
        """Write a client's personalized model, ``models/client-<number>.safetensors``.

        ``site`` is what the client reported of its data, if anything: ``image-stats``, ``(2,
        channels)``, mean and standard deviation; ``partition``, ``(2,)``, its number of how many.
        """
        # They import torch, and only the end of a run needs models.
        from pfedgpa_app.data import ImageStats
        from pfedgpa_app.exported import ExportedModel

        stats = ImageStats(*site["image-stats"]) if "image-stats" in site else None
        partition = None
        if "partition" in site:
            number, total = site["partition"].tolist()
            partition = (number, total)
        folder = self.path / "models"
        with writing(folder):
            folder.mkdir(exist_ok=True)
        model = ExportedModel(
            state, self.config, client, server_round, stats, partition, run=self.path.name
        )
        model.save(folder / f"client-{client}.safetensors")


@dataclass(frozen=True)
class Run:
    """A run, as its folder has it."""

    path: Path
    config: Config
    metrics: list[Row]

    @classmethod
    def read(cls, path: Path) -> "Run":
        """Read a run's settings and metrics.

        Raises `ValueError` if the folder is not one of a run.
        """
        try:
            flat = read_json(path / "config.json")
            if "strategy" not in flat:
                raise ValueError("config.json names no strategy")
            config = Config.from_flat(flat)
            return cls(path, config, read_rows(path / "metrics.jsonl")[0])
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not the folder of a run: {error}") from error

    @property
    def name(self) -> str:
        """What it is called; its id, if an older version wrote it."""
        return name_of(self.path)

    @property
    def error(self) -> str:
        """Why it ended before its last round; empty if it did not, or was killed."""
        return field_of(self.path, "error")

    @property
    def ended(self) -> str:
        """Why it was complete before its last round; empty if it was not."""
        return field_of(self.path, "ended")

    @property
    def warnings(self) -> list[str]:
        """What goes, or went, wrong in its rounds, and what may help."""
        kept = best_kept(self.path, self.name)
        return [f"{each}{kept}" for each in warnings_in(self.metrics, self.config).values()]

    @property
    def state(self) -> str:
        """``running``, ``complete`` or ``stopped``: over, with rounds missing."""
        if is_going_on(self.path):
            return "running"
        return "complete" if self.is_complete else "stopped"

    @property
    def clients(self) -> list[Row]:
        """The rows of the clients in all rounds."""
        return read_rows(self.path / "clients.jsonl")[0]

    @property
    def method(self) -> list[Row]:
        """What the server learned, by round; few strategies have such rows."""
        return read_rows(self.path / "method.jsonl")[0]

    def client_called(self, client: str) -> int:
        """Return the number of a client from its number or the name that it last had.

        Raises `ValueError` if no client is called so, or more than one.
        """
        if client.isdecimal():
            return int(client)
        names = names_in(self.clients)
        found = [number for number, name in names.items() if name == client]
        if len(found) == 1:
            return found[0]
        if found:
            numbers = " and ".join(map(str, sorted(found)))
            raise ValueError(f"clients {numbers} are called {client!r}; right would be a number")
        known = ", ".join(sorted(map(repr, names.values()))) or "none, since no client has one"
        raise ValueError(
            f"{self.path} has no client called {client!r}; right would be a number, or a name of "
            f"{known}"
        )

    def model_file(self, client: int) -> Path:
        """Return the file of a client's personalized model.

        Raises `ValueError` if there is none, with the clients that have one.
        """
        folder = self.path / "models"
        files = folder.glob("client-*.safetensors")
        numbers = [file.stem.removeprefix("client-") for file in files]
        clients = sorted(int(number) for number in numbers if number.isdecimal())
        if client in clients:
            return folder / f"client-{client}.safetensors"
        if clients:
            there = ", ".join(map(str, clients))
            raise ValueError(
                f"{self.path} has no model of client {client}; there are those of {there}"
            )
        raise ValueError(
            f"{self.path} has no models: they are written after the last round, and "
            f"{len(self.metrics)} of {self.config.num_server_rounds} are complete"
        )

    @property
    def num_nodes(self) -> int:
        """Number of clients that were connected in the last round."""
        return int(self.last("num-nodes") or 0)

    @property
    def is_complete(self) -> bool:
        """Whether all rounds are there, or it ended early as its settings say."""
        return len(self.metrics) == self.config.num_server_rounds or bool(self.ended)

    def is_of(self, config: Config) -> bool:
        """Whether the run had these settings, wherever it was written to, interrupted or not."""
        same_length = self.config.num_server_rounds == config.num_server_rounds
        return same_length and not self.config.differences(config)

    def last(self, name: str) -> float | None:
        """Return a metric of the last round that has it, None if none has."""
        known = (row[name] for row in reversed(self.metrics) if row.get(name) is not None)
        return next(known, None)


def baselines_of(config: Config, folder: Path, num_clients: int | None) -> dict[str, Run]:
    """Return the last complete run of each of `BASELINES` below a folder, by its strategy.

    They have the settings of ``config``, but for its strategy, and as many clients; any number if
    that is None.
    """
    runs, _ = read_runs(folder)
    found = {}
    for name in BASELINES:
        like = config.model_copy(update={"strategy": name})
        for run in runs if name != config.strategy else ():
            if run.is_complete and run.is_of(like) and num_clients in (None, run.num_nodes):
                found[name] = run
    return found


def read_runs(folder: Path) -> tuple[list[Run], list[str]]:
    """Return the runs below an output folder, oldest first, and what is wrong with damaged ones.

    Folders that never were those of a run are passed over.
    """
    runs, damaged = [], []
    for path in run_folders(folder):
        try:
            runs.append(Run.read(path))
        except ValueError as error:
            if os.path.lexists(path / RUN_FILE):
                damaged.append(str(error))
    return runs, damaged


def read_rows(file: Path, begin: int = 0) -> tuple[list[Row], int]:
    """Return the rows in whole lines from a byte of a file on, and the byte where they end.

    A line may be cut off where a run goes on or was killed. Lines that a full disk made their
    writer take back come a second time. Raises `RowError` if one is damaged.
    """
    if not file.exists():
        return [], 0
    begin = min(begin, file.stat().st_size)
    content = read_bytes(file, _MAX_ROWS_BYTES, begin)
    whole = content[: content.rfind(b"\n") + 1]
    return parse_rows(file, whole), begin + len(whole)


def _append(file: Path, rows: Sequence[Row]) -> None:
    """Append rows, all of them or none; raises `WriteError` if they cannot be written."""
    if not rows:
        return
    with writing(file):
        size = file.stat().st_size if file.exists() else 0
        try:
            with file.open("a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(row) + "\n" for row in rows)
            # A checkpoint must not outlast the rows of its rounds.
            sync_to_disk(file)
        except OSError:
            if file.exists():
                os.truncate(file, size)
            raise
