"""The ServerApp: one run, from its settings to its folder."""

import contextlib
import secrets
import time
from collections.abc import Iterable, Sequence
from functools import partial
from logging import ERROR, INFO, WARNING
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Context, MetricRecord, RecordDict
from flwr.common import log
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from flwr.superlink.grid import HttpGrid, InMemoryGrid

from pfedgpa_app import protocol
from pfedgpa_app.config import Config, ConfigError, PrivacyConfig
from pfedgpa_app.cross_site import write_matrix
from pfedgpa_app.divergence import (
    DIVERGED,
    best_in,
    best_kept,
    help_of,
    is_best,
    reason_to_end,
    warnings_in,
)
from pfedgpa_app.files import count_of
from pfedgpa_app.model_spec import ModelSpec
from pfedgpa_app.preflight import preflight
from pfedgpa_app.report import REPORT, Run, RunFolder
from pfedgpa_app.rounds import (
    BELOW_FLOOR,
    EVALUATED,
    NO_REPLY,
    READING,
    RowError,
    causes_of,
    describe,
    summarize,
)
from pfedgpa_app.runs import BANK, BEST, CHECKPOINT
from pfedgpa_app.section import listed
from pfedgpa_app.sharing import unshared_in, unshared_now
from pfedgpa_app.state import WriteError, write_text
from pfedgpa_app.vault import DiskVault
from server_app.checkpoint import ResumeError, keep_best, resolve_resume, resume, write_checkpoint
from server_app.cross_site import evaluate_across
from server_app.grid import GuardedGrid
from server_app.replies import max_bytes, metric_ranges
from server_app.roster import JoinTimeoutError, PartitionRoster, SourceError
from server_app.strategies import STRATEGIES, ClientwiseFedAvg
from server_app.tracking import Tracking

# The most frequent causes, if all clients failed.
_MAX_CAUSES = 10

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the configured strategy, and write its results to the folder of the run."""
    try:
        config = resolve_resume(Config.from_flat(context.run_config))
        spec, earlier = preflight(config), None
        path = config.output_path / str(context.run_id)
        strategy = make_strategy(config, spec, path)
        strategy.roster.ids_stay = not isinstance(grid, InMemoryGrid)
        if isinstance(grid, HttpGrid):
            strategy.sampling_seed = secrets.randbits(63)
        if config.resume_from:
            earlier = resume(config, strategy)
    except (ConfigError, ResumeError) as error:
        log(ERROR, "%s", error)
        raise
    if spec.idle:
        log(
            WARNING,
            'model.name = "%s": no gradient reached %s. If they are not to train, right would be '
            "requires_grad = False; as it is, they are parameters as all others",
            config.model.name,
            ", ".join(spec.idle[:5]) + (f" and {len(spec.idle) - 5} more" * (len(spec.idle) > 5)),
        )
    if config.privacy.is_on and config.privacy.seeded_noise:
        log(
            WARNING,
            "privacy.seeded-noise = true: the noise follows from the seed and protects nobody; "
            "right would be false, outside of experiments",
        )
    try:
        with RunFolder(path, config) as folder, Tracking(folder) as tracking:
            name = f"{folder.name} ({context.run_id})"
            log(INFO, "Run %s begins: %s", name, path)
            log(INFO, "%s", READING)
            try:
                if earlier is not None:
                    folder.go_on_from(earlier, strategy.completed_rounds)
                    if (earlier.path / BEST / CHECKPOINT).exists():
                        _keep_best(earlier.path / BEST, path)
                    for row in Run.read(path).metrics:
                        tracking.add_round(row)
                _run(grid, strategy, folder, tracking)
            except Exception as error:
                _note(folder, error)
                raise
            finally:
                log(INFO, "Run %s: %s", name, path)
    except (WriteError, JoinTimeoutError, RowError) as error:
        go_on = f'. Then resume-from="{context.run_id}" goes on from its last checkpoint'
        log(ERROR, "%s%s", error, go_on if (path / CHECKPOINT).exists() else "")
        raise


def _run(grid: Grid, strategy: ClientwiseFedAvg, folder: RunFolder, tracking: Tracking) -> None:
    """Run the remaining rounds, and write models and page."""
    config = folder.config
    layouts = (strategy.global_model.layout, strategy.extras_layout)
    guarded: Any = GuardedGrid(grid, max_bytes(*layouts))
    round_end = RoundEnd(strategy, folder, tracking)
    with contextlib.suppress(EarlyEnd):
        strategy.start(
            guarded,
            initial_arrays=ArrayRecord(strategy.average),
            num_rounds=config.num_server_rounds - strategy.completed_rounds,
            timeout=config.server.round_timeout,
            evaluate_fn=round_end,
        )
    clients = [] if strategy.clients_keep_parts else sorted(strategy.roster.clients.values())
    for client, state in zip(clients, strategy.evaluation_states(clients), strict=True):
        site = strategy.sites.get(client, {})
        folder.save_model(client, state, strategy.record.server_round, site)
    if config.server.cross_site:
        rows = evaluate_across(strategy, guarded, config.server.round_timeout)
        write_matrix(folder.path, rows, strategy.roster.client_names())
        log(INFO, "Cross-site matrix: %s, of the clients that consent", count_of(len(rows), "pair"))
    if unshared := unshared_in(round_end.rows):
        log(WARNING, "%s", unshared)
    if round_end.ended:
        log(INFO, "%s", round_end.ended)
        folder.note("ended", round_end.ended)
    _write_report(folder.path)


def _note(folder: RunFolder, error: Exception) -> None:
    """Write to the folder of a run why it ended, and the page."""
    own = isinstance(error, (WriteError, JoinTimeoutError, RowError, RunError, SourceError))
    reason = str(error) if own else f"{type(error).__name__}: {error}"
    try:
        folder.note("error", reason)
    except WriteError as problem:
        log(ERROR, "%s", problem)
    _write_report(folder.path)


def _keep_best(run: Path, target: Path) -> None:
    """Keep the checkpoint of the best round; an error does not end the run."""
    try:
        keep_best(run, target)
    except WriteError as error:
        log(WARNING, "The checkpoint of the best round is not kept: %s", error)


def _write_report(path: Path) -> None:
    """Write the page of the run; an error does not end the run."""
    try:
        # Only the end of a run needs plotly.
        from pfedgpa_app.page.runs import page_of

        write_text(path / REPORT, page_of([Run.read(path)]))
    except Exception as error:
        # As text: an error has the frames of the run, and with them all its models.
        log(WARNING, "There is no %s: %s", REPORT, str(error))


def make_strategy(config: Config, spec: ModelSpec, folder: Path | None = None) -> ClientwiseFedAvg:
    """Return the strategy of a run; with ``server.bank = "disk"`` it has files in ``folder``."""
    vault = None
    if config.server.bank == "disk" and folder is not None:
        earlier = config.earlier_path
        vault = DiskVault(folder / BANK, earlier and earlier / BANK)
    strategy_class = STRATEGIES[config.strategy]
    if config.server.cross_site and strategy_class.clients_keep_parts:
        raise ConfigError(
            [
                f'server.cross-site = true: with strategy = "{config.strategy}" clients keep parts '
                "of their models, which the server cannot send to others; right would be false"
            ]
        )
    return strategy_class.of(
        config,
        spec,
        vault=vault,
        roster=PartitionRoster(),
        fraction_train=config.server.fraction_train,
        fraction_evaluate=config.server.fraction_evaluate,
        include=listed(config.server.include),
        exclude=listed(config.server.exclude),
        required=listed(config.server.required),
        evaluate_every=config.server.evaluate_every,
        min_train_nodes=1,
        min_evaluate_nodes=1,
        min_available_nodes=config.server.min_available_nodes,
        join_timeout=config.server.join_timeout,
        metric_ranges=metric_ranges(config.privacy, config.data.info.num_classes),
        evaluate_metrics_aggr_fn=partial(_named_average, config.data.classes),
    )


def _named_average(
    classes: Sequence[str], records: list[RecordDict], weighted_by: str
) -> MetricRecord:
    """Average metrics as Flower does, with names of classes, for its log."""
    names = {f"{protocol.RECALL}{label}": f"recall of {each}" for label, each in enumerate(classes)}
    found = aggregate_metricrecords(records, weighted_by)
    return MetricRecord({names.get(name, name): value for name, value in found.items()})


class RunError(RuntimeError):
    """A run in whose first round no client trained."""


class EarlyEnd(Exception):  # noqa: N818
    """Leaves Flower's loop over the rounds, by ``server.stop-at`` or ``server.patience``."""


class RoundEnd:
    """Called by Flower after each round: writes and logs its results."""

    def __init__(self, strategy: ClientwiseFedAvg, folder: RunFolder, tracking: Tracking) -> None:
        self.strategy = strategy
        self.folder = folder
        self.tracking = tracking
        self.config = folder.config
        self.clock = time.monotonic()
        self.checkpointed: int | None = None
        self.rows = Run.read(folder.path).metrics
        self.warned = warnings_in(self.rows, self.config)
        self.best = best_in(self.rows)
        self.ended = ""  # why the run ends before its last round

    def __call__(self, server_round: int, arrays: ArrayRecord) -> None:
        """Write the round's rows and then, if one is due, a checkpoint that counts them.

        Flower's round 0 is before the first: its checkpoint is for a run that is killed in the
        first. An error of writing ends the run there and after the last round. In between it is
        tried again after the next round. Raises `WriteError` or `RunError` if the run cannot begin
        or end well. Raises `EarlyEnd` if ``server.stop-at`` or ``server.patience`` ends it.
        """
        now = time.monotonic()
        seconds, self.clock = now - self.clock, now
        completed = self.strategy.record.server_round
        is_last = completed == self.config.num_server_rounds
        if server_round > 0:
            self._stop_if_all_failed()
        try:
            if server_round > 0:
                self._write_rows(seconds)
                if not is_last:
                    since = self.strategy.completed_rounds
                    self.ended = reason_to_end(self.rows, self.config.server, since)
                    is_last = bool(self.ended)
            self._write_checkpoint(completed, is_last)
        except WriteError as error:
            if server_round == 0 or is_last:
                raise
            log(
                ERROR,
                "Round %d is not on the disk: %s. The run goes on, and tries again after the next "
                "round",
                completed,
                error,
            )
        if self.ended:
            raise EarlyEnd

    def _write_rows(self, seconds: float) -> None:
        """Write and log the rows of a round, and log warnings that are new."""
        record = self.strategy.record
        row = summarize(record, self.config.strategy, seconds)
        log(INFO, "%s", describe(row, self.config.num_server_rounds))
        self.tracking.add_round(row)
        self.rows.append(row)
        warnings = warnings_in(self.rows, self.config)
        for new in warnings.keys() - self.warned.keys():
            log(WARNING, "%s%s", warnings[new], best_kept(self.folder.path, self.folder.name))
        self.warned |= warnings
        clients = [record.clients[client] for client in sorted(record.clients)]
        if unshared := unshared_now(clients):
            log(WARNING, "%s", unshared)
        self.folder.add_round(row, clients, self.strategy.trace())

    def _write_checkpoint(self, completed: int, is_last: bool) -> None:
        """Write a checkpoint if one is due, or could not be written, and keep that of the best."""
        every, last = self.config.checkpoint.every, self.checkpointed
        # The state of the server alone cannot be resumed.
        has_all = not self.strategy.clients_keep_parts and not self.config.privacy.is_on
        if every and has_all and (last is None or is_last or completed // every > last // every):
            write_checkpoint(self.folder.path, self.strategy)
            last = self.checkpointed = completed
        if last in (None, completed):
            self.strategy.vault.prune()
        row = self.rows[-1] if self.rows else {}
        is_evaluated = row.get("round") == completed and row.get(EVALUATED) is not None
        if last == completed and is_evaluated and is_best(row, self.best):
            self.best = row
            _keep_best(self.folder.path, self.folder.path)

    def _stop_if_all_failed(self) -> None:
        """Raise a `RunError` if no client trained in the first round, as by wrong settings."""
        record = self.strategy.record
        statuses = [str(row.get("status", "ok")) for row in record.clients.values()]
        is_first = record.server_round == self.strategy.completed_rounds + 1
        if is_first and statuses and not any(one.startswith(("ok", NO_REPLY)) for one in statuses):
            with contextlib.suppress(WriteError):  # the RunError says what is wrong
                self.folder.add_clients(record.clients.values())
            causes = "\n  ".join(causes_of(statuses)[-_MAX_CAUSES:])
            diverged = (
                f"\n{DIVERGED}. {help_of(self.config)}" if record.column("not-finite") else ""
            )
            refused = [status for status in statuses if status.startswith(BELOW_FLOOR)]
            right = f"\n{_what_meets(self.config.privacy, refused)}" if refused else ""
            raise RunError(f"No client trained in the first round:\n  {causes}{diverged}{right}")


def _what_meets(privacy: PrivacyConfig, refused: Iterable[str]) -> str:
    """Say which privacy a run has, and what would be right for sites that refused it."""
    has = f'privacy.mode = "{privacy.mode}"'
    mode = "update" if any(f"{BELOW_FLOOR}: update" in each for each in refused) else "example"
    if privacy.mode not in (mode, "update"):
        right = f'privacy.mode = "{mode}"'
    elif privacy.seeded_noise:
        has, right = "privacy.seeded-noise = true", "false"
    elif privacy.mode == "update":
        has += f", privacy.epsilon = {privacy.epsilon:g}"
        right = "a smaller privacy.epsilon"
    else:
        has += f", privacy.noise-multiplier = {privacy.noise_multiplier:g}"
        right = "a larger privacy.noise-multiplier"
    return f"The run has {has}; right would be {right}"
