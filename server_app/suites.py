"""Suites: files that define the runs of a comparison, and their results."""

import hashlib
import json
import platform
import time
import tomllib
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import flwr
import torch
from pydantic import Field, ValidationError

from pfedgpa_app.config import Config, ConfigError, flatten
from pfedgpa_app.files import composed, native_path, quoted, read_json, read_toml
from pfedgpa_app.preflight import preflight, preflight_key
from pfedgpa_app.rounds import EVALUATED, RECALL, SCORES, RoundRecord, Row, summarize
from pfedgpa_app.section import Count, Section, Seed
from pfedgpa_app.state import write_text, writing
from server_app.simulation import simulate

Settings = dict[str, Any]
Result = dict[str, Any]
Seeds = Annotated[list[Seed], Field(min_length=1)]

Names = Annotated[list[str], Field(min_length=1)]


def _one_case() -> dict[str, Settings]:
    return {"": {}}


# Settings that the bench sets itself.
RESERVED = {"seed", "resume-from", "output-dir"}


class SuiteError(ValueError):
    """A wrong suite; the message lists the problems."""


class Quick(Section):
    """Overrides of a suite for a quick check that it works."""

    seeds: Seeds | None = None
    clients: Count | None = None
    rows: Names | None = None
    cases: Names | None = None
    evaluated_rounds: Count | None = None
    horizons: list[Count] | None = None
    settings: Settings = Field(default_factory=dict)


class Suite(Section):
    """A file of conf/suites: one run for every row, case and seed.

    Attributes
    ----------
    title
        Of the table.
    base
        A file of settings, relative to the suite's; without one, the defaults.
    clients
        Number of clients; cases may override it.
    evaluated_rounds
        The tables have the mean accuracy of this many last rounds.
    measures
        Columns of metrics.jsonl to tabulate, such as ``bytes-up``, a table each, beside the
        accuracy. That comes first, if it is not among them.
    curve
        Whether every round is evaluated, and drawn in the figure.
    horizons
        Rounds after which accuracies are tabulated, one column each; they need ``curve``.
    targets
        Accuracies whose rounds, bytes and server seconds are tabulated; they need ``curve``.
    settings
        Of all runs, on top of ``base``.
    cases, rows
        Settings of each column and each row of the table, by name.
    """

    title: str
    base: str = ""
    clients: Count = 10
    seeds: Seeds
    evaluated_rounds: Count = 1
    measures: list[str] = Field(default_factory=list)
    curve: bool = False
    horizons: list[Count] = Field(default_factory=list)
    targets: list[float] = Field(default_factory=list)
    settings: Settings = Field(default_factory=dict)
    cases: dict[str, Settings] = Field(default_factory=_one_case)
    rows: dict[str, Settings]
    quick: Quick = Quick()

    @classmethod
    def read(cls, file: Path, *, quick: bool = False) -> "Suite":
        """Read a suite's file, with ``base`` merged into ``settings``.

        Raises
        ------
        SuiteError
            If it is wrong, with all problems.
        OSError
            If it, or ``base``, cannot be read.
        """
        try:
            suite = cls.model_validate(_read_toml(file))
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            raise SuiteError("\n  ".join([f"{file} is no suite:", *wrong])) from error
        base = _read_toml(file.parent / native_path(suite.base)) if suite.base else {}
        if (suite.targets or suite.horizons) and not suite.curve:
            raise SuiteError(
                f"{file}: targets and horizons need every round; right would be curve = true"
            )
        known = summarize(RoundRecord(0), "", 0.0).keys() - {"strategy"}
        measures = [name for name in suite.measures if not RECALL.fullmatch(name)]
        if unknown := [name for name in measures if name not in known]:
            right = ", ".join([*sorted(known), "personalized-recall-0"])
            raise SuiteError(f"{file}: measures has {unknown}; right would be some of {right}")
        for name, each in (("cases", suite.cases), ("rows", suite.rows)):
            look_alike = [key for key, n in Counter(map(composed, each)).items() if n > 1]
            if look_alike:
                raise SuiteError(
                    f"{file}: {name} has {quoted(look_alike[0])} twice, in two forms of Unicode; "
                    "right would be two names"
                )
            for key, of_key in each.items():
                for setting in RESERVED | ({"clients"} if name == "rows" else set()):
                    if setting in dict(flatten(of_key)):
                        raise SuiteError(f"{file}: {name}.{key} must not set {setting}")
        settings = dict(flatten(base)) | dict(flatten(suite.settings))
        if RESERVED & settings.keys():
            raise SuiteError(f"{file}: settings must not have any of {sorted(RESERVED)}")
        suite = suite.model_copy(update={"settings": settings})
        return suite._quick(file) if quick else suite

    def _quick(self, file: Path) -> "Suite":
        quick = self.quick
        if quick == Quick():  # nothing would be quicker
            raise SuiteError(
                f"{file}: has no [quick] section for --quick; right would be, for example,\n"
                "[quick]\nseeds = [0]\nsettings = { num-server-rounds = 2 }"
            )
        for name, known in (("rows", self.rows), ("cases", self.cases)):
            if unknown := set(getattr(quick, name) or ()) - known.keys():
                raise SuiteError(f"{file}: quick.{name} has unknown {sorted(unknown)}")
        changed: dict[str, Any] = {
            "rows": {name: self.rows[name] for name in quick.rows or self.rows},
            "cases": {name: self.cases[name] for name in quick.cases or self.cases},
            "seeds": quick.seeds or self.seeds,
            "clients": quick.clients or self.clients,
            "evaluated_rounds": quick.evaluated_rounds or self.evaluated_rounds,
            "horizons": self.horizons if quick.horizons is None else quick.horizons,
            "title": f"{self.title} (quick)",
        }
        over = dict(flatten(quick.settings))
        for name in ("rows", "cases"):
            changed[name] = {
                key: {k: v for k, v in flatten(each) if k not in over}
                for key, each in changed[name].items()
            }
        if quick.clients:
            for case in changed["cases"].values():
                case.pop("clients", None)
        return self.model_copy(update={**changed, "settings": self.settings | over})

    def runs(self) -> list["BenchRun"]:
        """Return all runs, seed by seed.

        Raises
        ------
        SuiteError
            If settings are wrong, with all problems.
        """
        if len(self.seeds) > len(set(self.seeds)):
            raise SuiteError(f"seeds = {self.seeds}; right would be each once")
        runs, problems = [], []
        tried: set[Hashable] = set()
        for seed in self.seeds:
            for case, in_case in self.cases.items():
                for row, in_row in self.rows.items():
                    flat = self.settings | dict(flatten(in_case)) | dict(flatten(in_row))
                    clients = flat.pop("clients", self.clients)
                    name = " / ".join(filter(None, (case, row)))
                    if type(clients) is not int or clients < 2:
                        problems.append(f"{name}: clients = {clients}; right would be 2 or more")
                        continue
                    flat |= {"seed": seed, "server.min-available-nodes": clients}
                    try:
                        config = Config.from_flat(flat)
                        if seed == self.seeds[0]:
                            if (what := preflight_key(config)) not in tried:
                                preflight(config, one_process=True)
                                tried.add(what)
                            problems += [f"{name}: {each}" for each in self._contradictions(config)]
                        runs.append(BenchRun(case, row, config, clients, self._evaluated(config)))
                    except ConfigError as error:
                        problems.append(f"{name}: {error}")
        if problems:
            raise SuiteError("\n".join(dict.fromkeys(problems)))
        return runs

    def _contradictions(self, config: Config) -> Iterator[str]:
        if self.evaluated_rounds > config.num_server_rounds:
            yield (
                f"evaluated-rounds = {self.evaluated_rounds}: more than num-server-rounds = "
                f"{config.num_server_rounds}; right would be as many or less"
            )
        if wrong := [
            horizon
            for horizon in self.horizons
            if not self.evaluated_rounds <= horizon <= config.num_server_rounds
        ]:
            yield (
                f"horizons has {wrong}; right would be evaluated-rounds = {self.evaluated_rounds} "
                f"to num-server-rounds = {config.num_server_rounds}"
            )
        if config.server.fraction_evaluate < 1:
            yield "server.fraction-evaluate: a bench evaluates all clients; right would be 1.0"
        if config.server.evaluate_every != 1:
            yield "server.evaluate-every: a bench evaluates the last rounds; right would be 1"
        if config.server.stop_at or config.server.patience:
            yield "server.stop-at, server.patience: runs of a bench are as long; right would be 0"
        if config.server.bank != "memory":
            yield 'server.bank: a bench has no folders for it; right would be "memory"'
        if config.tracking:
            yield 'tracking: the results of a bench are its tables; right would be ""'

    def _evaluated(self, config: Config) -> int:
        return config.num_server_rounds if self.curve else self.evaluated_rounds

    @property
    def columns(self) -> dict[str, tuple[str, slice]]:
        """The case and the slice of evaluated rounds of each column, by name."""
        last = self.evaluated_rounds
        if not self.horizons:
            return {case or "mean ± std": (case, slice(-last, None)) for case in self.cases}
        return {
            ", ".join(filter(None, (case, f"round {end}"))): (case, slice(end - last, end))
            for case in self.cases
            for end in self.horizons
        }


def _read_toml(file: Path) -> Settings:
    try:
        return read_toml(file)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SuiteError(
            f"{file} is not TOML: {error}; right would be as in conf/, in UTF-8"
        ) from error


@dataclass(frozen=True)
class BenchRun:
    """A run of a suite, of which the last ``evaluated_rounds`` are evaluated."""

    case: str
    row: str
    config: Config
    clients: int
    evaluated_rounds: int
    superlink: str = ""
    """Its SuperLink; empty for simulations, whose results do not depend on it."""

    @property
    def name(self) -> str:
        """The run's name in messages; names with a comma are in quotes."""
        names = (quoted(name) if "," in name else name for name in (self.case, self.row) if name)
        return ", ".join([*names, f"seed {self.config.seed}"])

    def file(self, folder: Path) -> Path:
        """Return the path of its result, which runs of equal settings share."""
        config = self.config
        what = [config.decisive, config.num_server_rounds, self.clients, self.evaluated_rounds]
        if self.superlink:
            what.append(self.superlink)
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
        return folder / "runs" / f"{key}.json"

    def result(self, folder: Path) -> Result | None:
        """Return the stored result; None if there is none or it is damaged."""
        try:
            result: Result = read_json(self.file(folder))
        except (OSError, ValueError):
            return None
        return result if isinstance(result, dict) else None

    def execute(self, folder: Path) -> None:
        """Run in this process and write the result.

        Raises
        ------
        FloatingPointError
            If an accuracy is missing.
        RuntimeError
            If no client could train in a round, with the reasons.
        """
        torch.set_num_threads(1)
        begin = time.monotonic()
        clients: list[Row] = []

        def on_round(record: RoundRecord) -> None:
            if not record.num_trained:
                statuses = {str(row.get("status", "ok")) for row in record.clients.values()}
                raise RuntimeError(f"round {record.server_round}: {'; '.join(sorted(statuses))}")
            clients.extend(record.clients.values())

        _, rows = simulate(
            self.config,
            self.clients,
            evaluated_rounds=self.evaluated_rounds,
            num_processes=0,
            on_round=on_round,
        )
        self.write(folder, rows, clients, time.monotonic() - begin)

    def write(
        self,
        folder: Path,
        rows: list[Row],
        clients: Sequence[Row],
        seconds: float,
    ) -> None:
        """Write a result atomically: the rows of all rounds, and each client's accuracies.

        ``clients`` are the rows of all clients in all rounds.

        Raises
        ------
        FloatingPointError
            If a client has none in an evaluated round, as when its loss was not finite.
        RuntimeError
            If no client could train in a round.
        WriteError
            If the result cannot be written.
        """
        for row in rows:
            if not row["num-clients"]:
                raise RuntimeError(f"round {row['round']}: no client could train")
        end = self.config.num_server_rounds + 1
        first = end - self.evaluated_rounds

        def by_client(name: str) -> list[dict[int, float]]:
            found: list[dict[int, float]] = [{} for _ in range(self.evaluated_rounds)]
            for row in clients:
                if name in row and row["round"] >= first:
                    found[row["round"] - first][row["client"]] = row[name]
            return found

        evaluated = by_client(EVALUATED)
        scores = {
            name for row in clients for name in row if name in SCORES or RECALL.fullmatch(name)
        }
        missing = [self.clients - len(each) for each in evaluated]
        if any(missing):
            raise FloatingPointError(
                f"{max(missing)} of {self.clients} clients have no accuracy in an evaluated "
                "round: their losses may not be finite; their messages are in the log"
            )
        result = {
            "name": self.name,
            "config": self.config.to_flat(),
            "clients": self.clients,
            "rounds": rows,
            "accuracies": evaluated,
            "scores": {name: by_client(name) for name in sorted(scores - {EVALUATED})},
            "seconds": round(seconds, 1),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "flwr": flwr.__version__,
            },
        }
        file = self.file(folder)
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(result))

    def outcome(self, folder: Path) -> str:
        """Return a line with its last accuracy and its seconds."""
        result = self.result(folder)
        if result is None:
            return f"{self.name}: failed"
        accuracy = fmean(result["accuracies"][-1].values())
        return f"{self.name}: {accuracy:.4f} in the last round, {result['seconds']:.0f} s"

    def traceback_file(self, folder: Path) -> Path:
        """Return the path of the traceback of a failed run."""
        return self.file(folder).with_suffix(".txt")
