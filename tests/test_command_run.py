"""`pfedgpa run`; small scripts play flwr and Flower's SuperLink."""

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
from published import PROJECT
from typer.testing import CliRunner, Result

from benchmarks.network import parents, wait_until
from pfedgpa_app.config import Config
from pfedgpa_app.report import RunFolder
from pfedgpa_app.rounds import READING
from server_app import own_superlink, superlink
from server_app.cli import app

# It runs nothing: it notes how it was called, and says what a run says.
FLWR = f"""#!{sys.executable}
import json, os, signal, sys, time, tomllib
from pathlib import Path

here = Path(sys.argv[0]).parent
outcome = json.loads((here / "outcome.json").read_text())
with (here / "called").open("a") as called:
    print(*sys.argv[1:], file=called)
if sys.argv[1] == "ls":
    run = {{"status": outcome["status"], "status-details": outcome["why"]}}
    print(json.dumps({{"runs": [run]}}))
if sys.argv[1] != "run":
    sys.exit()
(here / "home.toml").write_text((Path(os.environ["FLWR_HOME"]) / "config.toml").read_text())
options = dict(zip(sys.argv[5::2], sys.argv[6::2]))
(here / "settings.toml").write_text(Path(options["--run-config"]).read_text())
if outcome.get("refusal"):
    sys.exit(outcome["refusal"])
print("\\x1b[92mSuccessfully started run 4711\\x1b[0m")
print("\\x1b[93mWARNING \\x1b[0m:   Since flwr 1.32, nothing is as it was", flush=True)
folder = here / "runs" / "4711"
print("\\x1b[92mINFO \\x1b[0m:      Run digits-local-1 (4711) begins:", folder, flush=True)
print("\\x1b[92mINFO \\x1b[0m:      {READING}", flush=True)
print("\\x1b[93mWARNING \\x1b[0m:   Client 1 is out of the round", flush=True)
print("\\x1b[92mINFO \\x1b[0m:      Round 1/1: personalized accuracy 0.7500", flush=True)
if outcome.get("interrupt"):
    while not (here / "read").exists():
        time.sleep(0.01)
    os.kill(os.getppid(), signal.SIGINT)
    signal.pause()
if outcome["status"] == "finished:completed" and not outcome.get("elsewhere"):
    folder.mkdir(parents=True)
    (folder / "report.html").touch()
"""

# It listens, as one does, and starts a process that would outlive it.
SUPERLINK = f"""#!{sys.executable}
import os, socket, subprocess, sys
from pathlib import Path

here = Path(sys.argv[0]).parent
if (here / "refuse").exists():
    sys.exit("no room for a SuperLink")
port = int(sys.argv[sys.argv.index("--port") + 1])
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
(here / "pids").write_text(f"{{os.getpid()}} {{child.pid}}")
listening = socket.create_server(("127.0.0.1", port))
while True:
    listening.accept()
"""
COMPLETED = {"status": "finished:completed", "why": "N/A"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Go to a folder with the app's pyproject.toml, in which scripts play Flower's programs."""
    shutil.copy(PROJECT / "pyproject.toml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    for name, script in (("flwr", FLWR), ("flower-superlink", SUPERLINK)):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(superlink, "PROGRAM", str(tmp_path / "flwr"))
    monkeypatch.setattr(own_superlink, "PROGRAM", str(tmp_path / "flower-superlink"))
    return tmp_path


def run(here: Path, *words: str, **outcome: object) -> Result:
    (here / "outcome.json").write_text(json.dumps({**COMPLETED, **outcome}))
    return CliRunner().invoke(app, ["run", "-c", 'strategy="local"', *words])


def called(here: Path) -> list[str]:
    return (here / "called").read_text().splitlines() if (here / "called").exists() else []


def wait_until_nothing_is_left(here: Path) -> None:
    """Wait until a SuperLink that was started is gone with what it started."""
    started = [int(number) for number in (here / "pids").read_text().split()]
    assert len(started) == 2
    wait_until(lambda: parents().keys().isdisjoint(started), timeout=10)


def test_a_run_has_file_and_pairs_and_ends_with_its_page(here: Path):
    (here / "mine.toml").write_text("seed = 5\n[client]\nlocal-epochs = 3\nmomentum = 0.25\n")
    defaults = (
        (here / "pyproject.toml")
        .read_text()
        .replace("num-server-rounds = 10 ", "num-server-rounds = 7 ")
    )
    (here / "pyproject.toml").write_text(defaults)
    result = run(here, "mine.toml", "-c", "client.local-epochs=2", "--clients", "4")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == [
        f"Run digits-local-1 (4711) begins: {here}/runs/4711",
        READING,
        "Client 1 is out of the round",
        "  Round 1/1: personalized accuracy 0.7500",
        f"The page of this run: {here}/runs/4711/report.html",
    ]
    lines = (here / "settings.toml").read_text().splitlines()
    wanted = {"seed = 5", "client.local-epochs = 2", "client.momentum = 0.25", 'strategy = "local"'}
    assert wanted | {"num-server-rounds = 7"} <= set(lines)
    first, second = called(here)
    assert first.startswith("run . own --stream --run-config ")
    assert first.endswith("--federation-config num-supernodes=4 client-resources-num-cpus=1")
    assert second == "ls own --run-id 4711 --format json"
    wait_until_nothing_is_left(here)


def test_baselines_run_first_unless_they_are_there(here: Path):
    config = Config(strategy="local", num_server_rounds=1)
    with RunFolder(here / "runs" / "1", config) as folder:
        folder.add_round({"round": 1, "num-nodes": 3}, [])
    pairs = ("num-server-rounds=1", f"output-dir='{here / 'runs'}'", 'strategy="pfedgpa"')
    options = [each for pair in pairs for each in ("-c", pair)]
    result = run(here, *options, "--clients", "3", "--with-baselines", elsewhere=True)
    assert result.exit_code == 0, result.output
    order = [line for line in result.stdout.splitlines() if line.endswith(":")]
    assert order == ["fedavg:", "pfedgpa:"]
    assert [call.split()[0] for call in called(here)] == ["run", "ls"] * 2


def test_a_failed_run_ends_with_its_cause(here: Path):
    why = "Simulation failed with exception: Every client failed:\n  2 clients: no data"
    result = run(here, status="finished:failed", why=why)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        "run 4711 failed: Every client failed: 2 clients: no data"
    )
    assert "The folder of this run, on its ServerApp's machine: " in result.stdout
    wait_until_nothing_is_left(here)


def test_a_run_that_flwr_refuses_ends_with_what_it_says(here: Path):
    result = run(here, refusal="Error: no room")
    assert result.exit_code == 1
    assert result.stderr == "flwr did not start the run: Error: no room\n"
    wait_until_nothing_is_left(here)


def test_an_interrupt_stops_the_run_and_ends_the_superlink(
    here: Path, monkeypatch: pytest.MonkeyPatch
):
    read = superlink.FlowerRun.read

    def note(self: superlink.FlowerRun, line: str, *arguments: object) -> str:
        """Let the program know that this line was read, and so when to interrupt."""
        if "Round 1/1" in line:
            (here / "read").touch()
        return read(self, line, *arguments)

    monkeypatch.setattr(superlink.FlowerRun, "read", note)
    # Processes that a shell starts in the background ignore interrupts, and this may be one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = run(here, interrupt=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.exit_code == 130
    assert called(here)[1:] == ["stop 4711 own"]
    wait_until_nothing_is_left(here)


def test_a_superlink_that_does_not_start_is_reported(here: Path):
    (here / "refuse").touch()
    result = run(here)
    assert result.exit_code == 1
    assert result.stderr == "Flower's SuperLink did not start: no room for a SuperLink\n"
    assert not called(here)


def test_a_named_superlink_has_nodes_and_may_be_elsewhere(
    here: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FLWR_HOME", str(here / "home"))
    (here / "home").mkdir()
    (here / "home" / "config.toml").touch()
    result = run(here, "--superlink", "hospital", elsewhere=True)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1] == (
        f"The folder of this run, on its ServerApp's machine: {here}/runs/4711"
    )
    (first, second) = called(here)
    assert first.startswith("run . hospital --stream")
    assert "--federation-config" not in first
    assert second == "ls hospital --run-id 4711 --format json"
    assert not (here / "pids").exists()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("-c", "seed=-1"), "seed = -1: should be greater than or equal to 0"),
        (("--clients", "1"), "server.min-available-nodes = 2: more than 1 client"),
        (
            ("-c", 'data.dataset="sites"', "-c", 'data.shape="1x8x8"', "-c", "data.num-classes=3"),
            'data.dataset = "sites" needs sites; right would be --superlink NAME',
        ),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_started(
    here: Path, words: tuple[str, ...], problem: str
):
    result = run(here, *words)
    assert result.exit_code == 1
    assert problem in result.stderr
    assert not called(here)
    assert not (here / "pids").exists()


def test_another_folder_than_the_projects_is_refused(here: Path):
    (here / "pyproject.toml").write_text('[project]\nname = "other"\n')
    result = run(here)
    assert result.exit_code == 1
    assert "has no pyproject.toml of this app; right would be the project's folder" in result.stderr
