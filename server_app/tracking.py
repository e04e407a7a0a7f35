"""What a run writes to a tracker: its settings, and the numbers of metrics.jsonl."""

import os
from collections.abc import Mapping
from logging import ERROR
from pathlib import Path
from typing import Any, Protocol, Self

from flwr.common import log

from pfedgpa_app.report import RunFolder
from pfedgpa_app.rounds import EVALUATED, Row
from pfedgpa_app.section import Scalar
from server_app.replies import one_line

EXPERIMENT = "pfedgpa"
# A server that is away holds up every round: by the defaults of MLflow for minutes.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


class Tracker(Protocol):
    """Where rounds are written to; each call may fail, and is then made again."""

    def write(self, row: Row) -> None:
        """Write a round's numbers, and before the first the run's settings."""

    def close(self, is_whole: bool) -> None:
        """Say that the run is over, and whether it came to its end."""


class Tracking:
    """Hands rounds on to the tracker of ``tracking``, if there is one, as long as the run goes on.

    What is wrong with a tracker costs the run a line of its log: the rounds are in metrics.jsonl.
    What could not be written is written after the next round.
    """

    def __init__(self, folder: RunFolder) -> None:
        config = folder.config
        self._setting = config.tracking
        self._tracker: Tracker | None = None
        self._unwritten: list[Row] = []
        if config.tracking == "tensorboard":
            target = folder.path / "tensorboard" / folder.name
            self._tracker = TensorBoard(target, config.to_flat())
        elif config.tracking == "mlflow":
            self._tracker = MLflow(folder.name, config.to_flat(), folder.path.parent)
        elif config.tracking == "wandb":
            self._tracker = WeightsAndBiases(folder.name, config.to_flat(), folder.path)

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
        if self._tracker is None:
            return
        self._unwritten.append(row)
        try:
            while self._unwritten:
                self._tracker.write(self._unwritten[0])
                self._unwritten.pop(0)
        except Exception as problem:  # of a package that may raise anything
            log(
                ERROR,
                'tracking = "%s": %d round(s) could not be written: %s. The run goes on, and tries '
                "again after the next round",
                self._setting,
                len(self._unwritten),
                one_line(str(problem)),
            )


class TensorBoard:
    """Event files in a folder, by PyTorch's SummaryWriter."""

    def __init__(self, folder: Path, settings: Mapping[str, Scalar]) -> None:
        self.folder = folder
        self.settings = dict(settings)
        self._writer: Any = None

    def write(self, row: Row) -> None:
        """Write scalars, which are on the disk then."""
        try:
            writer = self._writer = self._writer or self._open()
            for name, value in _numbers(row).items():
                writer.add_scalar(name, value, row["round"])
            writer.flush()
        except Exception:
            self._writer = None  # one that has failed writes nothing more
            raise

    def close(self, is_whole: bool) -> None:
        """Close the event file; it cannot say how the run ended."""
        if self._writer is not None:
            self._writer.close()

    def _open(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        writer: Any = SummaryWriter(str(self.folder))
        # SummaryWriter.add_hparams would make a second run of them, with a point of its own.
        for summary in hparams(self.settings, {EVALUATED: 0.0}):
            writer.file_writer.add_summary(summary)
        return writer


class MLflow:
    """A run of MLflow, where its environment variables say.

    Without ``MLFLOW_TRACKING_URI`` that is the file ``mlflow.db`` of the output folder.
    """

    def __init__(self, name: str, settings: Mapping[str, Scalar], folder: Path) -> None:
        self.name = name
        self.settings = settings
        self.folder = folder
        self._has_begun = False

    def write(self, row: Row) -> None:
        """Log metrics with the round as their step."""
        import mlflow

        if not self._has_begun:
            self._begin()
        mlflow.log_metrics(_numbers(row), step=row["round"])

    def close(self, is_whole: bool) -> None:
        """Set the run's status."""
        import mlflow

        if self._has_begun:
            mlflow.end_run("FINISHED" if is_whole else "FAILED")

    def _begin(self) -> None:
        import mlflow

        for variable, value in _PATIENCE.items():
            os.environ.setdefault(variable, value)
        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri(f"sqlite:///{self.folder}/mlflow.db")
        if not os.environ.keys() & {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"}:
            mlflow.set_experiment(EXPERIMENT)
        if mlflow.active_run() is None:
            mlflow.start_run(run_name=self.name)
        mlflow.log_params(self.settings)
        self._has_begun = True


class WeightsAndBiases:
    """A run of Weights & Biases, in the run's folder and, with ``WANDB_MODE=online``, on a server.

    Offline, nothing leaves the machine until somebody types ``wandb sync``. Neither the run's log
    nor the state of a git repository is recorded.
    """

    def __init__(self, name: str, settings: Mapping[str, Scalar], folder: Path) -> None:
        self.name = name
        self.settings = dict(settings)
        self.folder = folder
        self._run: Any = None

    def write(self, row: Row) -> None:
        """Log numbers with the round as their step."""
        self._run = self._run or self._begin()
        self._run.log(_numbers(row), step=row["round"])

    def close(self, is_whole: bool) -> None:
        """Set the run's status, and wait until all is written."""
        if self._run is not None:
            self._run.finish(exit_code=0 if is_whole else 1)

    def _begin(self) -> Any:
        import wandb

        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", EXPERIMENT),
            mode=os.environ.get("WANDB_MODE", "offline"),
            name=self.name,
            config=self.settings,
            dir=self.folder,
            settings=wandb.Settings(console="off", disable_git=True),
        )


def _numbers(row: Row) -> dict[str, float]:
    """Return what is a number in a line of metrics.jsonl, the round aside."""
    return {
        name: float(value)
        for name, value in row.items()
        if name != "round" and isinstance(value, int | float)
    }
