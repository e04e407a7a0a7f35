"""Suites: files that say which runs are compared, and these runs with their results."""

import hashlib
import json
import platform
import time
import tomllib
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import flwr
import torch
from pydantic import Field, ValidationError

from pfedgpa_app.config import Config, ConfigError, flatten
from pfedgpa_app.files import composed, native_path, quoted, read_json, read_toml
from pfedgpa_app.preflight import decides, preflight
from pfedgpa_app.rounds import JUDGED, RoundRecord, summarize
from pfedgpa_app.section import Count, Section, Seed
from pfedgpa_app.state import write_text, writing
from server_app.simulation import simulate

Settings = dict[str, Any]
Result = dict[str, Any]
Seeds = Annotated[list[Seed], Field(min_length=1)]

Names = Annotated[list[str], Field(min_length=1)]


def _one_case() -> dict[str, Settings]:
    return {"": {}}


# What the bench itself decides about.
RESERVED = {"seed", "resume-from", "output-dir"}


class SuiteError(ValueError):
    """A suite that cannot be run as it is; the message says what is wrong with it."""


class Quick(Section):
    """What is different when a suite only has to show that it works."""

    seeds: Seeds | None = None
    clients: Count | None = None
    rows: Names | None = None
    cases: Names | None = None
    judged_rounds: Count | None = None
    horizons: list[Count] | None = None
    settings: Settings = Field(default_factory=dict)


class Suite(Section):
    """A file of conf/suites: every row in every case with every seed is a run.

    Attributes
    ----------
    title
        Of the table.
    base
        A file of settings, relative to the suite's; without one, the defaults.
    clients
        How many there are; a case may say otherwise.
    judged_rounds
        The judged number is the mean of so many last rounds.
    measures
        Further columns of metrics.jsonl to tabulate, such as ``bytes-up``.
    curve
        Whether every round is judged, and the figure shows all of them.
    horizons
        Rounds after which it is judged, a column each; they need ``curve``.
    targets
        Accuracies for which rounds, bytes and server seconds are told; they need ``curve``.
    settings
        Of all runs, on top of ``base``.
    cases, rows
        By name, what is different in a column and in a line of the table.
    """

    title: str
    base: str = ""
    clients: Count = 10
    seeds: Seeds
    judged_rounds: Count = 1
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
        """Read a suite's file, whose ``base`` becomes a part of ``settings``.

        Raises
        ------
        SuiteError
            If it is not one, with everything that is wrong.
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
        if unknown := [name for name in suite.measures if name not in known]:
            right = ", ".join(sorted(known))
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
        if quick == Quick():  # it would be all of it
            raise SuiteError(
                f"{file}: no [quick] says what is less with --quick; right would be, for example,\n"
                "[quick]\nseeds = [0]\nsettings = { num-server-rounds = 2 }"
            )
        for name, known in (("rows", self.rows), ("cases", self.cases)):
            if unknown := set(getattr(quick, name) or ()) - known.keys():
                raise SuiteError(f"{file}: quick.{name} has {sorted(unknown)}, which is none of it")
        changed: dict[str, Any] = {
            "rows": {name: self.rows[name] for name in quick.rows or self.rows},
            "cases": {name: self.cases[name] for name in quick.cases or self.cases},
            "seeds": quick.seeds or self.seeds,
            "clients": quick.clients or self.clients,
            "judged_rounds": quick.judged_rounds or self.judged_rounds,
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
            If settings are wrong, with all that is.
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
                            if (what := decides(config)) not in tried:
                                preflight(config, one_process=True)
                                tried.add(what)
                            problems += [f"{name}: {each}" for each in self._contradictions(config)]
                        runs.append(BenchRun(case, row, config, clients, self._judged(config)))
                    except ConfigError as error:
                        problems.append(f"{name}: {error}")
        if problems:
            raise SuiteError("\n".join(dict.fromkeys(problems)))
        return runs

    def _contradictions(self, config: Config) -> Iterator[str]:
        if self.judged_rounds > config.num_server_rounds:
            yield (
                f"judged-rounds = {self.judged_rounds}: there are {config.num_server_rounds}; "
                "right would be as many or less"
            )
        if wrong := [
            horizon
            for horizon in self.horizons
            if not self.judged_rounds <= horizon <= config.num_server_rounds
        ]:
            yield (
                f"horizons has {wrong}; right would be judged-rounds = {self.judged_rounds} to "
                f"num-server-rounds = {config.num_server_rounds}"
            )
        if config.server.fraction_evaluate < 1:
            yield "server.fraction-evaluate: a judged number is of all clients; right would be 1.0"
        if config.server.evaluate_every != 1:
            yield "server.evaluate-every: the judged rounds are the last ones; right would be 1"
        if config.server.stop_at or config.server.patience:
            yield "server.stop-at, server.patience: runs of a bench are as long; right would be 0"
        if config.server.bank != "memory":
            yield 'server.bank: a bench has no folders for it; right would be "memory"'
        if config.tracking:
            yield 'tracking: the results of a bench are its tables; right would be ""'

    def _judged(self, config: Config) -> int:
        return config.num_server_rounds if self.curve else self.judged_rounds

    @property
    def columns(self) -> dict[str, tuple[str, slice]]:
        """Cases and the judged ones of a run's rounds, by the names of the columns."""
        last = self.judged_rounds
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
    """A run of a suite; ``judged_rounds`` is how many last rounds are judged in it."""

    case: str
    row: str
    config: Config
    clients: int
    judged_rounds: int
    superlink: str = ""
    """That it runs on; empty for simulations, whose digits are the same wherever they run."""

    @property
    def name(self) -> str:
        """What a run is called in messages."""
        return ", ".join(filter(None, (self.case, self.row, f"seed {self.config.seed}")))

    def file(self, folder: Path) -> Path:
        """Return where its result is: the same settings, however they are named, share it."""
        config = self.config
        what = [config.decisive, config.num_server_rounds, self.clients, self.judged_rounds]
        if self.superlink:
            what.append(self.superlink)
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
        return folder / "runs" / f"{key}.json"

    def result(self, folder: Path) -> Result | None:
        """Return what an earlier call found, None if there is nothing whole."""
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
            If no client could train in a round, with the reasons as soon as they are there.
        """
        torch.set_num_threads(1)
        begin = time.monotonic()
        accuracies: dict[int, dict[int, float]] = {}

        def on_round(record: RoundRecord) -> None:
            if not record.num_trained:
                statuses = {str(row.get("status", "ok")) for row in record.clients.values()}
                raise RuntimeError(f"round {record.server_round}: {'; '.join(sorted(statuses))}")
            accuracies[record.server_round] = {
                client: row[JUDGED] for client, row in record.clients.items() if JUDGED in row
            }

        _, rows = simulate(
            self.config,
            self.clients,
            judged_rounds=self.judged_rounds,
            num_processes=0,
            on_round=on_round,
        )
        self.write(folder, rows, accuracies, time.monotonic() - begin)

    def write(
        self,
        folder: Path,
        rows: list[dict[str, Any]],
        accuracies: Mapping[int, Mapping[int, float]],
        seconds: float,
    ) -> None:
        """Write a result in one step: the rows of all rounds, and each client's accuracies.

        ``accuracies`` are by round, from 1, and client.

        Raises
        ------
        FloatingPointError
            If a client has none in a round that is judged, as when its loss was not finite.
        RuntimeError
            If no client could train in a round.
        WriteError
            If the result cannot be written.
        """
        for row in rows:
            if not row["num-clients"]:
                raise RuntimeError(f"round {row['round']}: no client could train")
        end = self.config.num_server_rounds + 1
        judged = [accuracies.get(each, {}) for each in range(end - self.judged_rounds, end)]
        missing = [self.clients - len(each) for each in judged]
        if any(missing):
            raise FloatingPointError(
                f"{max(missing)} of {self.clients} clients have no accuracy in a round that is "
                "judged: their losses may not be finite; their messages are in the log"
            )
        result = {
            "name": self.name,
            "config": self.config.to_flat(),
            "clients": self.clients,
            "rounds": rows,
            "accuracies": judged,
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
        """Say how it ended: its last accuracy and its seconds."""
        result = self.result(folder)
        if result is None:
            return f"{self.name}: failed"
        accuracy = fmean(result["accuracies"][-1].values())
        return f"{self.name}: {accuracy:.4f} in the last round, {result['seconds']:.0f} s"

    def traceback_file(self, folder: Path) -> Path:
        """Return where the traceback of a failed run is."""
        return self.file(folder).with_suffix(".txt")
