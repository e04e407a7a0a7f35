"""Suites: files that define the runs of a comparison."""

import json
import tomllib
from collections import Counter
from collections.abc import Hashable, Iterator
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from pfedgpa_app.config import Config, ConfigError, flatten
from pfedgpa_app.files import composed, native_path, quoted, read_toml
from pfedgpa_app.preflight import preflight, preflight_key
from pfedgpa_app.rounds import RECALL, RoundRecord, summarize
from pfedgpa_app.section import Count, Section, Seed
from server_app.bench import BenchRun

Settings = dict[str, Any]
Seeds = Annotated[list[Seed], Field(min_length=1)]
Names = Annotated[list[str], Field(min_length=1)]

# Settings that the bench sets itself.
RESERVED = {"seed", "resume-from", "output-dir"}
# Settings that it needs, and why.
_OF_A_BENCH: tuple[tuple[str, object, str], ...] = (
    ("server.fraction-evaluate", 1.0, "a bench evaluates all clients"),
    ("server.evaluate-every", 1, "a bench evaluates the last rounds"),
    ("server.stop-at", 0, "all runs of a bench have the same length"),
    ("server.patience", 0, "all runs of a bench have the same length"),
    ("server.bank", "memory", "a bench has no folders for it"),
    ("tracking", "", "the results of a bench are its tables"),
)


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


class Tune(Section):
    """The search for the best settings of every row, on other seeds than those of the tables.

    Attributes
    ----------
    grid
        Values of settings, of which all combinations are tried with every row.
    rows
        The same of single rows, tried at the best point of ``grid``.
    """

    seeds: Seeds
    grid: Settings = Field(default_factory=dict)
    rows: dict[str, Settings] = Field(default_factory=dict)


class Suite(Section):
    """A file of conf/suites: one run for every row, case and seed.

    Attributes
    ----------
    base
        A file of settings, relative to the suite's; without one, the defaults.
    clients
        Number of clients; cases may override it.
    evaluated_rounds
        The tables have the mean accuracy of this many last rounds.
    measures
        Columns of metrics.jsonl, a table each; accuracy comes first, if it is not among them.
    curve
        Whether every round is evaluated, and drawn in the figure.
    horizons, targets
        Rounds that have a column each, and accuracies to reach; both need ``curve``.
    settings, cases, rows
        Settings of all runs, on top of ``base``, and of each column and row by name.
    cells
        Settings of single cells, by case and row, on top of both.
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
    cases: dict[str, Settings] = Field(default={"": {}})
    rows: dict[str, Settings]
    cells: dict[str, dict[str, Settings]] = Field(default_factory=dict)
    tune: Tune | None = None
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
        settings = dict(flatten(base)) | dict(flatten(suite.settings))
        sections = {"settings": settings}
        for name, each in (("cases", suite.cases), ("rows", suite.rows)):
            for look_alike in [key for key, n in Counter(map(composed, each)).items() if n > 1]:
                raise SuiteError(
                    f"{file}: {name} has {quoted(look_alike)} twice, in two forms of Unicode; "
                    "right would be two names"
                )
            sections |= {f"{name}.{key}": dict(flatten(of_key)) for key, of_key in each.items()}
        for where, section in sections.items():
            reserved = RESERVED | ({"clients"} if where.startswith("rows.") else set())
            if wrong := sorted(reserved & section.keys()):
                raise SuiteError(f"{file}: {where} must not set {', '.join(wrong)}")
        if suite.tune:
            suite._check_tune(file, suite.tune)
        suite = suite.model_copy(update={"settings": settings})
        return suite._quick(file) if quick else suite

    def _check_tune(self, file: Path, tune: Tune) -> None:
        if both := sorted({*self.seeds} & {*tune.seeds}):
            raise SuiteError(
                f"{file}: tune.seeds has {both}, which the tables have; right would be others"
            )
        if unknown := sorted(tune.rows.keys() - self.rows.keys()):
            raise SuiteError(f"{file}: tune.rows has unknown {unknown}")
        for grid in (tune.grid, *tune.rows.values()):
            for key, values in flatten(grid):
                if not isinstance(values, list) or not values or key in RESERVED | {"clients"}:
                    raise SuiteError(
                        f"{file}: tune has {key} = {json.dumps(values)}; right would be a list of "
                        "values of a setting"
                    )

    def _quick(self, file: Path) -> "Suite":
        quick = self.quick
        if quick == Quick():  # nothing would be quicker
            raise SuiteError(
                f"{file}: has no [quick] section for --quick; right would be, for example,\n"
                "[quick]\nseeds = [0]\nsettings = { num-server-rounds = 2 }"
            )
        over = dict(flatten(quick.settings))
        changed = quick.model_dump(exclude_none=True)
        changed |= {"title": f"{self.title} (quick)", "settings": self.settings | over}
        if self.tune:
            grid = {key: values[:2] for key, values in list(flatten(self.tune.grid))[:1]}
            changed["tune"] = Tune(seeds=self.tune.seeds[:1], grid=grid)
        hidden = over.keys() | ({"clients"} if quick.clients else set())
        for name, known in (("rows", self.rows), ("cases", self.cases)):
            chosen = changed.get(name, known)
            if unknown := set(chosen) - known.keys():
                raise SuiteError(f"{file}: quick.{name} has unknown {sorted(unknown)}")
            changed[name] = {
                key: {k: v for k, v in flatten(known[key]) if k not in hidden} for key in chosen
            }
        return self.model_copy(update=changed)

    def runs(self) -> list[BenchRun]:
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
        cells = product(self.seeds, self.cases.items(), self.rows.items())
        for seed, (case, in_case), (row, in_row) in cells:
            in_cell = self.cells.get(case, {}).get(row, {})
            flat = self.settings | dict(flatten(in_case)) | dict(flatten(in_row))
            flat |= dict(flatten(in_cell))
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
                evaluated = config.num_server_rounds if self.curve else self.evaluated_rounds
                runs.append(BenchRun(case, row, config, clients, evaluated))
            except ConfigError as error:
                problems.append(f"{name}: {error}")
        if problems:
            raise SuiteError("\n".join(dict.fromkeys(problems)))
        return runs

    def _contradictions(self, config: Config) -> Iterator[str]:
        last, rounds = self.evaluated_rounds, config.num_server_rounds
        if last > rounds:
            yield (
                f"evaluated-rounds = {last}: more than num-server-rounds = {rounds}; right would "
                "be as many or less"
            )
        if wrong := [horizon for horizon in self.horizons if not last <= horizon <= rounds]:
            yield (
                f"horizons has {wrong}; right would be evaluated-rounds = {last} to "
                f"num-server-rounds = {rounds}"
            )
        flat = config.to_flat()
        for name, right, why in _OF_A_BENCH:
            if flat[name] != right:
                yield f"{name}: {why}; right would be {json.dumps(right)}"

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


def described(settings: Settings) -> str:
    """Return settings in a line."""
    return ", ".join(f"{key} = {json.dumps(value)}" for key, value in flatten(settings))


def _read_toml(file: Path) -> Settings:
    try:
        return read_toml(file)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SuiteError(
            f"{file} is not TOML: {error}; right would be as in conf/, in UTF-8"
        ) from error
