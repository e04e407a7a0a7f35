"""Trackers of experiments, which get the settings of a run and the numbers of metrics.jsonl."""

import os
from collections.abc import Callable
from logging import ERROR
from typing import Any, Protocol, Self

from flwr.common import log

from pfedgpa_app.files import count_of
from pfedgpa_app.report import RunFolder
from pfedgpa_app.rounds import EVALUATED, Row
from server_app.replies import one_line

EXPERIMENT = "pfedgpa"
# By MLflow's defaults, a server that is down delays each round by minutes.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


class Tracker(Protocol):
    """A tracker, whose constructor writes the settings. Calls that fail are repeated."""

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Write the numbers of a round."""

    def close(self, is_complete: bool) -> None:
        """Set how the run ended."""


class Tracking:
    """Writes rounds to the tracker of the setting ``tracking``, if any.

    Errors are logged and do not end the run. Rounds that could not be written are written with the
    next.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._setting = folder.config.tracking
        self._tracker: Tracker | None = None
        self._unwritten: list[Row] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._tracker is None:
            return
        try:
            self._tracker.close(kind is None)
        except Exception as problem:
            log(
                ERROR,
                'tracking = "%s": the end of the run could not be written: %s',
                self._setting,
                one_line(str(problem)),
            )

    def add_round(self, row: Row) -> None:
        """Write a round, and those before it that could not be written."""
        if not self._setting:
            return
        self._unwritten.append(row)
        try:
            self._tracker = self._tracker or _TRACKERS[self._setting](self._folder)
            while self._unwritten:
                numbers = {
                    name: float(value)
                    for name, value in self._unwritten[0].items()
                    if name != "round" and isinstance(value, int | float)
                }
                self._tracker.write(self._unwritten[0]["round"], numbers)
                self._unwritten.pop(0)
        except Exception as problem:  # of a package that may raise anything
            log(
                ERROR,
                'tracking = "%s": %s could not be written: %s. The run goes on, and tries '
                "again after the next round",
                self._setting,
                count_of(len(self._unwritten), "round"),
                one_line(str(problem)),
            )


class TensorBoard:
    """Event files in the run's folder, by PyTorch's SummaryWriter."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._writer: Any = self._open()

    def _open(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        writer: Any = SummaryWriter(str(self._folder.path / "tensorboard" / self._folder.name))
        # SummaryWriter.add_hparams would write them to a run of their own.
        for summary in hparams(self._folder.config.to_flat(), {EVALUATED: 0.0}):
            writer.file_writer.add_summary(summary)
        return writer

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Write and flush scalars."""
        writer, self._writer = self._writer or self._open(), None
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()
        self._writer = writer  # one that has failed would write nothing more

    def close(self, is_complete: bool) -> None:
        """Close the event file, which has no status."""
        if self._writer is not None:
            self._writer.close()


class MLflow:
    """A run of MLflow, by its environment variables.

    Without ``MLFLOW_TRACKING_URI`` it is in the file ``mlflow.db`` of the output folder.
    """

    def __init__(self, folder: RunFolder) -> None:
        import mlflow

        self._mlflow: Any = mlflow
        for variable, value in _PATIENCE.items():
            os.environ.setdefault(variable, value)
        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri(f"sqlite:///{folder.path.parent}/mlflow.db")
        if not os.environ.keys() & {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"}:
            mlflow.set_experiment(EXPERIMENT)
        if mlflow.active_run() is None:
            mlflow.start_run(run_name=folder.name)
        mlflow.log_params(folder.config.to_flat())

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Log metrics."""
        self._mlflow.log_metrics(numbers, step=step)

    def close(self, is_complete: bool) -> None:
        """Set the run's status."""
        self._mlflow.end_run("FINISHED" if is_complete else "FAILED")


class WeightsAndBiases:
    """A run of Weights & Biases, in the run's folder and, with ``WANDB_MODE=online``, on a server.

    Offline, nothing leaves the machine until somebody runs ``wandb sync``. Neither the run's log
    nor the state of a git repository is recorded.
    """

    def __init__(self, folder: RunFolder) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", EXPERIMENT),
            mode=os.environ.get("WANDB_MODE", "offline"),
            name=folder.name,
            config=folder.config.to_flat(),
            dir=folder.path,
            settings=wandb.Settings(console="off", disable_git=True),
        )

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Log numbers."""
        self._run.log(numbers, step=step)

    def close(self, is_complete: bool) -> None:
        """Set the run's status, and wait until all is written."""
        self._run.finish(exit_code=0 if is_complete else 1)


_TRACKERS: dict[str, Callable[[RunFolder], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WeightsAndBiases,
}
