"""Suites: whole runs of strategies, seeds and settings, and the tables that come of them."""

import hashlib
import json
import multiprocessing
import os
import platform
import sys
import threading
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import flwr
import torch
from pydantic import Field, ValidationError

from pfedgpa_app.config import Config, ConfigError, flatten
from pfedgpa_app.figures import BANDS, Curve, draw_curves, draw_dots
from pfedgpa_app.preflight import preflight
from pfedgpa_app.rounds import JUDGED, RoundRecord, mean_and_spread, summarize
from pfedgpa_app.section import Count, Section
from pfedgpa_app.state import writing
from pfedgpa_app.tables import INDEX_KIND, Cell, Table, compare, partial_cell
from server_app.simulation import simulate

BYTES_A_RUN = 2 * 2**30
"""What a run with a small model takes, torch included."""

Settings = dict[str, Any]
Result = dict[str, Any]
Seeds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


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
    rows: list[str] | None = None
    cases: list[str] | None = None
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
        base = _read_toml(file.parent / suite.base) if suite.base else {}
        if (suite.targets or suite.horizons) and not suite.curve:
            raise SuiteError(
                f"{file}: targets and horizons need every round; right would be curve = true"
            )
        known = summarize(RoundRecord(0), "", 0.0).keys() - {"strategy"}
        if unknown := [name for name in suite.measures if name not in known]:
            right = ", ".join(sorted(known))
            raise SuiteError(f"{file}: measures has {unknown}; right would be some of {right}")
        for name, each in (("cases", suite.cases), ("rows", suite.rows)):
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
                            preflight(config, one_process=True)
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
        return tomllib.loads(file.read_text())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SuiteError(f"{file} is not TOML: {error}; right would be as in conf/") from error


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
            result: Result = json.loads(self.file(folder).read_text())
        except (OSError, ValueError):
            return None
        return result

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
        part = file.with_suffix(f".{os.getpid()}.part")
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                part.write_text(json.dumps(result))
                part.replace(file)
            finally:
                part.unlink(missing_ok=True)

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


def num_processes() -> int:
    """Return how many runs at a time cores and free memory allow."""
    try:  # with what the system would give back of its cache
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable"))
        free = int(available.split()[1]) * 1024
    except (OSError, StopIteration):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), free // BYTES_A_RUN))


def execute(
    runs: list[BenchRun], folder: Path, processes: int, advance: Callable[[BenchRun], None]
) -> dict[str, str]:
    """Run what has no result yet, each in a process of its own, and return why runs failed.

    Without processes they run here, one after the other, and an error is raised as it is.
    ``advance`` is called after each run.
    """
    failed: dict[str, str] = {}
    if not processes:
        for run in runs:
            run.execute(folder)
            advance(run)
        return failed
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["server_app.bench", "client_app.messages"])
    waiting = list(reversed(runs))
    alive: dict[int, tuple[Any, BenchRun]] = {}
    try:
        while waiting or alive:
            while waiting and len(alive) < processes:
                run = waiting.pop()
                process = context.Process(target=_execute, args=(run, folder))
                process.start()
                alive[process.sentinel] = (process, run)
            for sentinel in wait(list(alive)):
                assert isinstance(sentinel, int)
                process, run = alive.pop(sentinel)
                process.join()
                if process.exitcode:
                    failed[run.name] = _why(process.exitcode, run.traceback_file(folder))
                advance(run)
    finally:
        for process, _ in alive.values():
            process.terminate()
            process.join()
    return failed


def _end_with(parent: Any) -> None:
    """End this process when the bench does, which may be killed, even while it starts this one."""
    wait([parent.sentinel])
    os._exit(1)


def _execute(run: BenchRun, folder: Path) -> None:
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    file = run.traceback_file(folder)
    file.unlink(missing_ok=True)
    try:
        run.execute(folder)
    except Exception as error:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(traceback.format_exc())
        except OSError:  # as on a full disk
            file.unlink(missing_ok=True)
            print(f"{run.name}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None


def _why(exit_code: int, file: Path) -> str:
    if exit_code < 0:
        return f"its process ended with {exit_code}; -9 may be a lack of memory"
    if not file.exists():
        return "see its error above; its traceback could not be written"
    return f"{file.read_text().strip().splitlines()[-1]}\n    (traceback: {file})"


def tables(suite: Suite, runs: list[BenchRun], folder: Path, command: str) -> list[Table]:
    """Return the tables of a suite: the judged number, further measures and rounds to targets."""
    results = _results(runs, folder)
    found = [result for each in results.values() for result in each.values()]
    rounds = {run.config.num_server_rounds for run in runs}
    last = suite.judged_rounds
    judged = "last round" if last == 1 else f"mean of the last {last} rounds"
    if suite.horizons:
        judged += " up to the column's"
    elif len(rounds) == 1:
        judged += f" of {rounds.pop()}"
    note = (
        f"Accuracy of everyone's personalized model on its own test set, {judged}; mean ± standard "
        f"deviation over seeds {', '.join(map(str, suite.seeds))}. Marked: the best, and what a "
        "paired t-test over seeds and clients does not tell from it (5 %). Clients of a seed are "
        "not independent, so what is not marked may still be as good on other seeds. "
        f"{len(found)} of {len(runs)} runs, {sum(each['seconds'] for each in found):.0f} seconds "
        f"of computing: {command}"
    )
    if failures := sum(row["num-failures"] for each in found for row in each["rounds"]):
        note += f" ({failures} times a client's training was of no use)"
    compared = {
        column: compare(
            {
                row: {
                    seed: _per_client(result["accuracies"][judged_rounds])
                    for seed, result in results[case, row].items()
                }
                for row in suite.rows
            },
            len(suite.seeds),
        )
        for column, (case, judged_rounds) in suite.columns.items()
    }
    made = [
        _table(
            suite,
            suite.title,
            [*suite.columns],
            lambda column, row: compared[column][row],
            note,
        )
    ]
    for measure in suite.measures:

        def mean(column: str, row: str, measure: str = measure) -> Cell:
            case, judged_rounds = suite.columns[column]
            each = results[case, row].values()
            means = [fmean(r[measure] for r in result["rounds"][judged_rounds]) for result in each]
            text = mean_and_spread(means, 0 if measure.startswith("bytes") else 4)
            return partial_cell(Cell(text, values=means), len(suite.seeds))

        title, what = f"{suite.title}: {measure}", f"A round, {judged}."
        if measure == "bytes-down":
            what += " Models that are sent to be judged are counted in."
        made.append(_table(suite, title, [*suite.columns], mean, what))
    for target in suite.targets:

        def reached(case: str, row: str, target: float = target) -> Cell:
            cell = Cell(_to_target(list(results[case, row].values()), target))
            return cell if len(results[case, row]) == len(suite.seeds) else Cell("failed")

        note = (
            "Rounds / megabytes up and down, models that are sent to be judged among them / server "
            "seconds of learning until the mean accuracy is reached, mean over seeds; a dash where "
            "a seed never did."
        )
        made.append(_table(suite, f"{suite.title}: until {target}", [*suite.cases], reached, note))
    return made


def index_of(suite: Suite, runs: list[BenchRun], folder: Path, found: list[Table]) -> Result:
    """Return what `pfedgpa report` reads of a bench: its tables, and where its results are."""
    where = [
        {
            "case": run.case,
            "row": run.row,
            "seed": run.config.seed,
            "file": str(run.file(folder).relative_to(folder)),
        }
        for run in runs
    ]
    tables = [table.facts() for table in found]
    return {"kind": INDEX_KIND, "title": suite.title, "tables": tables, "runs": where}


def _results(runs: list[BenchRun], folder: Path) -> dict[tuple[str, str], dict[int, Result]]:
    """Return what is finished, by case and row and then by seed."""
    results: dict[tuple[str, str], dict[int, Result]] = {}
    for run in runs:
        seeds = results.setdefault((run.case, run.row), {})
        if (result := run.result(folder)) is not None:
            seeds[run.config.seed] = result
    return results


def _table(
    suite: Suite,
    title: str,
    columns: list[str],
    cell: Callable[[str, str], Cell],
    note: str,
) -> Table:
    rows = {row: [cell(column, row) for column in columns] for row in suite.rows}
    return Table(title, [column or "all" for column in columns], rows, note)


def _per_client(rounds: list[dict[str, float]]) -> dict[int, float]:
    """Return each client's mean over rounds that give accuracies by client."""
    return {int(client): fmean(each[client] for each in rounds) for client in rounds[0]}


def _to_target(results: list[Result], target: float) -> str:
    reached = [list(_until(result["rounds"], target)) for result in results]
    if not reached or any(rows[-1][JUDGED] < target for rows in reached):
        return "-"
    rounds = fmean(len(rows) for rows in reached)
    up_and_down = (sum(row["bytes-up"] + row["bytes-down"] for row in rows) for rows in reached)
    seconds = (sum(row["seconds-diffusion"] for row in rows) for rows in reached)
    return f"{rounds:.1f} / {fmean(up_and_down) / 1e6:.1f} / {fmean(seconds):.1f}"


def _until(rows: list[dict[str, Any]], target: float) -> Iterator[dict[str, Any]]:
    for row in rows:
        yield row
        if row[JUDGED] >= target:
            return


def draw(suite: Suite, runs: list[BenchRun], folder: Path, file: Path) -> None:
    """Draw every run's judged number, or its curve, a panel a case, as PNG and SVG beside it.

    Raises
    ------
    OSError
        If they cannot be written.
    """
    if suite.curve:
        draw_curves(file, curves(suite, runs, folder), suite.title, BANDS)
        return
    results, judged = _results(runs, folder), slice(-suite.judged_rounds, None)

    def over_seeds(case: str, row: str) -> list[float]:
        found = results[case, row].values()
        return [fmean(_per_client(each["accuracies"][judged]).values()) for each in found]

    panels = {case: {row: over_seeds(case, row) for row in suite.rows} for case in suite.cases}
    draw_dots(file, panels, suite.title)


def curves(suite: Suite, runs: list[BenchRun], folder: Path) -> dict[str, list[Curve]]:
    """Return the accuracies over rounds of each row that has a result, by case."""
    found: dict[str, list[Curve]] = {case: [] for case in suite.cases}
    for (case, row), results in _results(runs, folder).items():
        if repeats := [[each[JUDGED] for each in result["rounds"]] for result in results.values()]:
            found[case].append(Curve.over(row, range(1, len(repeats[0]) + 1), repeats))
    return found
