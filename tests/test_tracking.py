"""What a run writes to a tracker; their packages are stood in for."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from flwr.app import Context, RecordDict
from simulated_grid import learning_grid, weights

from pfedgpa_app.config import Config
from pfedgpa_app.files import count_of
from pfedgpa_app.model_spec import ModelSpec
from pfedgpa_app.report import RunFolder
from server_app import app
from server_app.tracking import Tracking


class FakeWriter:
    """In place of SummaryWriter: keeps what is written, and fails where a test says so."""

    written: dict[str, list[Any]]
    fails: list[int]

    def __init__(self, folder: str) -> None:
        self.logged = self.written.setdefault(folder, [])
        self.file_writer = SimpleNamespace(add_summary=self.logged.append)
        self.has_failed = False

    def add_scalar(self, name: str, value: float, step: int) -> None:
        if self.has_failed or step in self.fails:
            self.has_failed = True
            if step in self.fails:
                self.fails.remove(step)
            raise OSError("No space\nleft on device")
        self.logged.append((name, step, value))

    def flush(self) -> None:
        self.logged.append("flush")

    def close(self) -> None:
        self.logged.append("close")


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> type[FakeWriter]:
    tensorboard, summary = ModuleType("tensorboard"), ModuleType("summary")
    monkeypatch.setattr(FakeWriter, "written", {}, raising=False)
    monkeypatch.setattr(FakeWriter, "fails", [], raising=False)
    vars(tensorboard)["SummaryWriter"] = FakeWriter
    vars(summary)["hparams"] = lambda settings, metrics: [("hparams", settings, list(metrics))]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.summary", summary)
    return FakeWriter


class FakeMLflow(ModuleType):
    """In place of the package: keeps what it is called with."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.calls: list[tuple[Any, ...]] = []
        self.is_away = False
        self.run: object = None

    def active_run(self) -> object:
        return self.run

    def start_run(self, run_name: str) -> None:
        self._call("start_run", run_name)
        self.run = object()

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self._call("log_metrics", metrics, step)

    def end_run(self, status: str) -> None:
        self._call("end_run", status)

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self._call(name, *arguments)

    def _call(self, *call: Any) -> None:
        if self.is_away:
            raise ConnectionError("the server is away")
        self.calls.append(call)


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> FakeMLflow:
    for name in ("TRACKING_URI", "EXPERIMENT_NAME", "EXPERIMENT_ID"):
        monkeypatch.delenv(f"MLFLOW_{name}", raising=False)
    # Set first, so that what the tracker sets is undone after the test.
    for name in ("MAX_RETRIES", "TIMEOUT"):
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", "3")
    fake = FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    return fake


def numbers(path: Path) -> list[dict[str, float]]:
    """Return the numbers of a run's metrics.jsonl, a dict a round."""
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if k not in ("round", "strategy") and v is not None}
        for row in rows
    ]


def run_app(output: Path, run_id: int, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    monkeypatch.setattr(app, "preflight", lambda config: ModelSpec.of_state(weights(0.0)))
    config = {"output-dir": str(output), "num-server-rounds": 2, "diffusion.train-steps": 5}
    app.main(learning_grid(10), Context(run_id, 1, {}, RecordDict(), config | settings))


def test_tensorboard_has_the_settings_and_the_numbers_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: type[FakeWriter]
):
    run_app(tmp_path, 7, monkeypatch, tracking="tensorboard")
    ((folder, logged),) = writer.written.items()
    assert folder == str(tmp_path / "7" / "tensorboard" / "digits-pfedgpa-1")
    settings = json.loads((tmp_path / "7" / "config.json").read_text())
    assert logged[0] == ("hparams", settings, ["personalized-accuracy"])
    first, second = numbers(tmp_path / "7")
    assert first["personalized-accuracy"] > 0
    assert logged[1:] == [
        *((name, 1, value) for name, value in first.items()),
        "flush",
        *((name, 2, value) for name, value in second.items()),
        "flush",
        "close",
    ]


def test_mlflow_has_the_settings_and_the_numbers_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow: FakeMLflow
):
    run_app(tmp_path, 7, monkeypatch, tracking="mlflow")
    first, second = numbers(tmp_path / "7")
    assert mlflow.calls == [
        ("set_tracking_uri", f"sqlite:///{tmp_path}/mlflow.db"),
        ("set_experiment", "pfedgpa"),
        ("start_run", "digits-pfedgpa-1"),
        ("log_params", json.loads((tmp_path / "7" / "config.json").read_text())),
        ("log_metrics", first, 1),
        ("log_metrics", second, 2),
        ("end_run", "FINISHED"),
    ]


def test_a_resumed_run_writes_the_rounds_before_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow: FakeMLflow
):
    run_app(tmp_path, 1, monkeypatch)
    assert not mlflow.calls
    later = {"num-server-rounds": 3, "resume-from": "latest"}
    run_app(tmp_path, 2, monkeypatch, tracking="mlflow", **later)
    steps = [call[2] for call in mlflow.calls if call[0] == "log_metrics"]
    assert steps == [1, 2, 3]


def track(tmp_path: Path, setting: str, rounds: list[int]) -> None:
    with (
        RunFolder(tmp_path / "1", Config.from_flat({"tracking": setting})) as folder,
        Tracking(folder) as tracking,
    ):
        for number in rounds:
            tracking.add_round({"round": number, "x": number / 2, "y": None})


def test_rounds_that_cannot_be_written_are_written_with_the_next(
    tmp_path: Path, writer: type[FakeWriter], caplog: pytest.LogCaptureFixture
):
    writer.fails = [2, 2]
    track(tmp_path, "tensorboard", [1, 2, 3, 4])
    (logged,) = writer.written.values()
    scalars = [each for each in logged if isinstance(each, tuple) and each[0] == "x"]
    assert scalars == [("x", 1, 0.5), ("x", 2, 1.0), ("x", 3, 1.5), ("x", 4, 2.0)]
    assert logged[-1] == "close"
    assert caplog.messages == [
        f'tracking = "tensorboard": {count_of(number, "round")} could not be written: '
        "No space left on device. The run goes on, and tries again after the next round"
        for number in (1, 2)
    ]


def test_a_server_that_is_away_does_not_end_the_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mlflow: FakeMLflow,
    caplog: pytest.LogCaptureFixture,
):
    mlflow.is_away = True
    run_app(tmp_path, 7, monkeypatch, tracking="mlflow")
    assert len(numbers(tmp_path / "7")) == 2
    assert (tmp_path / "7" / "report.html").exists()
    assert sum("the server is away" in text for text in caplog.messages) == 2


def test_an_end_that_cannot_be_written_is_logged(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mlflow: FakeMLflow,
    caplog: pytest.LogCaptureFixture,
):
    def fail(status: str) -> None:
        raise ConnectionError("the server\nis away")

    monkeypatch.setattr(mlflow, "end_run", fail)
    track(tmp_path, "mlflow", [1])
    assert caplog.messages == [
        'tracking = "mlflow": the end of the run could not be written: the server is away'
    ]


def test_a_run_that_breaks_off_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow: FakeMLflow
):
    def fail(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "save_model", fail)
    with pytest.raises(KeyboardInterrupt):
        run_app(tmp_path, 7, monkeypatch, tracking="mlflow")
    assert mlflow.calls[-1] == ("end_run", "FAILED")


def test_mlflow_writes_where_its_variables_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow: FakeMLflow
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://example.org")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "hospitals")
    track(tmp_path, "mlflow", [1])
    assert mlflow.calls[0] == ("start_run", "digits-pfedgpa-1")


def test_without_a_tracker_nothing_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("mlflow", "torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    track(tmp_path, "", [1, 2])


class FakeWandb(ModuleType):
    """In place of the package: keeps what it is called with; what a run does is in it too."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def Settings(self, **settings: Any) -> dict[str, Any]:  # noqa: N802
        return settings

    def init(self, **options: Any) -> "FakeWandb":
        self.calls.append(("init", options))
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.calls.append(("log", {"step": step, **numbers}))

    def finish(self, exit_code: int) -> None:
        self.calls.append(("finish", {"exit_code": exit_code}))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    for name in ("MODE", "PROJECT"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_weights_and_biases_has_the_settings_and_the_numbers_and_sends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wandb: FakeWandb
):
    run_app(tmp_path, 7, monkeypatch, tracking="wandb")
    first, second = numbers(tmp_path / "7")
    assert wandb.calls == [
        (
            "init",
            {
                "project": "pfedgpa",
                "mode": "offline",
                "name": "digits-pfedgpa-1",
                "config": json.loads((tmp_path / "7" / "config.json").read_text()),
                "dir": tmp_path / "7",
                "settings": {"console": "off", "disable_git": True},
            },
        ),
        ("log", {"step": 1, **first}),
        ("log", {"step": 2, **second}),
        ("finish", {"exit_code": 0}),
    ]


def test_weights_and_biases_sends_where_its_variables_say_and_knows_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wandb: FakeWandb
):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_PROJECT", "hospitals")
    with RunFolder(tmp_path / "1", Config(tracking="wandb")) as folder:
        tracking = Tracking(folder)
        tracking.add_round({"round": 1, "x": 0.5})
        tracking.__exit__(KeyboardInterrupt)
    (_, options), *_, end = wandb.calls
    assert (options["mode"], options["project"]) == ("online", "hospitals")
    assert end == ("finish", {"exit_code": 1})
