"""The names of runs, which of them go on, and how they are found."""

import json
import multiprocessing
import os
import shutil
import signal
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from pfedgpa_app import report, runs
from pfedgpa_app.config import Config
from pfedgpa_app.report import Run, RunFolder
from pfedgpa_app.runs import (
    RunNotFoundError,
    began_at,
    find_run,
    is_going_on,
    name_of,
    run_folders,
)
from pfedgpa_app.state import WriteError
from server_app.checkpoint import ResumeError, resolve_resume


def begin(path: Path, **settings: object) -> str:
    """Leave a run that has just begun, and is over."""
    with RunFolder(path, Config.from_flat(settings)) as folder:
        return folder.name


def test_a_run_is_named_after_its_data_and_strategy_and_a_free_number(tmp_path: Path):
    own = {"data.dataset": "My_Scans:load", "data.shape": "1x8x8", "data.num-classes": 10}
    names = [
        begin(tmp_path / "a"),
        begin(tmp_path / "b", strategy="fedavg"),
        begin(tmp_path / "c", strategy="fedavg-ft"),
        begin(tmp_path / "d"),
        begin(tmp_path / "e", **own),
    ]
    assert names == [
        "digits-pfedgpa-1",
        "digits-fedavg-1",
        "digits-fedavg-ft-1",
        "digits-pfedgpa-2",
        "my-scans-load-pfedgpa-1",
    ]
    assert [Run.read(tmp_path / name).name for name in "abcde"] == names


def test_a_name_that_has_become_free_among_others_is_not_given_again(tmp_path: Path):
    for folder in "abc":
        begin(tmp_path / folder)
    shutil.rmtree(tmp_path / "b")
    assert begin(tmp_path / "d") == "digits-pfedgpa-4"


def _begin_many(folder: Path, process: int) -> None:
    for number in range(5):
        begin(folder / f"{process}-{number}")


def test_runs_that_begin_at_the_same_moment_have_different_names(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_begin_many, args=(tmp_path, each)) for each in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    names = {name_of(path) for path in run_folders(tmp_path)}
    assert names == {f"digits-pfedgpa-{number}" for number in range(1, 21)}


@pytest.mark.parametrize(
    "content", [None, "", "[1]", "{}", '{"name": 1}', '{"name": "\\u001b[2J"}']
)
def test_a_run_without_a_name_that_can_be_read_is_called_by_its_id(
    tmp_path: Path, content: str | None
):
    begin(tmp_path / "17")
    (tmp_path / "17" / "run.json").unlink()
    if content is not None:
        (tmp_path / "17" / "run.json").write_text(content)
    assert Run.read(tmp_path / "17").name == "17"
    assert begin(tmp_path / "18") == "digits-pfedgpa-1"


def test_a_run_goes_on_until_its_folder_is_closed(tmp_path: Path):
    with RunFolder(tmp_path / "1", Config(num_server_rounds=1)) as folder:
        assert is_going_on(tmp_path / "1")
        assert Run.read(tmp_path / "1").state == "running"
        folder.add_round({"round": 1}, [])
        assert Run.read(tmp_path / "1").state == "running"
    assert Run.read(tmp_path / "1").state == "complete"
    begin(tmp_path / "2")
    assert Run.read(tmp_path / "2").state == "stopped"


def test_a_run_of_an_older_version_is_over(tmp_path: Path):
    begin(tmp_path / "1")
    (tmp_path / "1" / "run.json").unlink()
    assert not is_going_on(tmp_path / "1")


def test_a_run_that_cannot_write_its_settings_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    begin(tmp_path / "1")

    def fail(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "sync_to_disk", fail)
    with pytest.raises(WriteError):
        begin(tmp_path / "2")
    assert find_run("latest", tmp_path) == tmp_path / "1"
    assert not is_going_on(tmp_path / "2")


def test_where_locks_cannot_be_told_a_run_may_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def no_locks(*arguments: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(runs.fcntl, "flock", no_locks)
    begin(tmp_path / "1")
    assert is_going_on(tmp_path / "1")


def _hold(path: Path, held: Connection) -> None:
    with RunFolder(path, Config()):
        held.send(True)
        signal.pause()


def test_a_run_that_is_killed_does_not_go_on(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_hold, args=(tmp_path / "1", there))
    process.start()
    assert here.recv()
    assert is_going_on(tmp_path / "1")
    process.kill()
    process.join()
    assert not is_going_on(tmp_path / "1")


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Leave runs 123, 124 and, of older versions, 2 and 3; the last of them is 124."""
    for number, folder in enumerate(["2", "3", "123", "124"]):
        begin(tmp_path / folder)
        os.utime(tmp_path / folder / "config.json", (number, number))
    (tmp_path / "2" / "run.json").unlink()
    (tmp_path / "3" / "run.json").write_text(json.dumps({"name": "local-local-1"}))
    write_facts(tmp_path / "123", "digits-pfedgpa-1", "2026-11-30T11:00:00+00:00")
    write_facts(tmp_path / "124", "digits-pfedgpa-12", "2026-11-30T11:00:00.000001+00:00")
    return tmp_path


def write_facts(path: Path, name: str, began: object) -> None:
    (path / "run.json").write_text(json.dumps({"name": name, "began": began}))


def test_a_run_writes_down_when_it_began(tmp_path: Path):
    before = datetime.now(UTC)
    begin(tmp_path / "1")
    os.utime(tmp_path / "1" / "config.json", (0, 0))
    assert before <= began_at(tmp_path / "1") <= datetime.now(UTC)


def test_copies_of_runs_keep_their_order(three: Path, tmp_path: Path):
    copied = tmp_path / "copied"
    copied.mkdir()
    for folder in ("124", "123"):  # the last that is copied has the youngest files
        shutil.copytree(three / folder, copied / folder, copy_function=shutil.copyfile)
    assert [path.name for path in run_folders(copied)] == ["123", "124"]
    assert find_run("latest", copied) == copied / "124"


def test_runs_of_older_versions_are_as_old_as_their_settings(three: Path):
    assert [path.name for path in run_folders(three)] == ["2", "3", "123", "124"]


@pytest.mark.parametrize("began", [None, 7, "", "yesterday", [], "0001-01-01T00:00:00+14:00"])
def test_a_time_that_is_none_is_passed_over(tmp_path: Path, began: object):
    begin(tmp_path / "1")
    write_facts(tmp_path / "1", "digits-pfedgpa-1", began)
    os.utime(tmp_path / "1" / "config.json", (1000, 1000))
    assert began_at(tmp_path / "1") == datetime.fromtimestamp(1000, UTC)


def test_runs_that_began_at_the_same_time_have_an_order(tmp_path: Path):
    for folder in ("2", "1", "3"):
        begin(tmp_path / folder)
        write_facts(tmp_path / folder, f"digits-pfedgpa-{folder}", "2026-11-30T12:00:00+01:00")
    assert [path.name for path in run_folders(tmp_path)] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("run", "folder"),
    [
        ("123", "123"),
        ("digits-pfedgpa-1", "123"),  # though another's name begins so
        ("digits-pfedgpa-12", "124"),
        ("2", "2"),
        ("latest", "124"),
    ],
)
def test_a_run_is_found_by_name_and_id(three: Path, run: str, folder: str):
    assert find_run(run, three) == three / folder


def test_a_run_is_found_by_the_only_beginning(three: Path):
    begin(three / "9876", strategy="local")
    for run in ("98", "digits-l"):
        assert find_run(run, three) == three / "9876"


def test_an_ambiguous_beginning_lists_what_it_may_be(three: Path):
    with pytest.raises(RunNotFoundError) as caught:
        find_run("digits", three)
    assert str(caught.value) == (
        '"digits" may be digits-pfedgpa-1 (123), digits-pfedgpa-12 (124); '
        "right would be one of these names or ids"
    )


def test_of_many_candidates_the_last_are_listed(tmp_path: Path):
    for number in range(13):
        begin(tmp_path / f"1{number:02}")
    with pytest.raises(RunNotFoundError, match=r"may be 3 older ones, digits-pfedgpa-4 \(103\), "):
        find_run("1", tmp_path)


def test_two_runs_of_one_name_are_told_apart_by_their_ids(three: Path):
    """As when a run's folder was copied from another machine."""
    shutil.copytree(three / "123", three / "777")
    with pytest.raises(RunNotFoundError, match=r"digits-pfedgpa-1 \(123\), digits-pfedgpa-1 \(777"):
        find_run("digits-pfedgpa-1", three)
    assert find_run("777", three) == three / "777"


def test_a_path_is_relative_to_the_output_folder_or_to_here(three: Path, tmp_path: Path):
    begin(tmp_path / "elsewhere" / "5")
    assert find_run(str(tmp_path / "elsewhere" / "5"), three) == tmp_path / "elsewhere" / "5"
    assert find_run("5", three, tmp_path / "elsewhere") == tmp_path / "elsewhere" / "5"
    with pytest.raises(RunNotFoundError, match=r"no run .*/5; pfedgpa runs lists"):
        find_run("5", three)


@pytest.mark.parametrize("run", ["latest", "1", "nothing", "~no-such-user/1"])
def test_in_an_empty_folder_nothing_is_found(tmp_path: Path, run: str):
    with pytest.raises(RunNotFoundError, match="There is no run"):
        find_run(run, tmp_path / "none")


@pytest.mark.parametrize("run", ["123", "digits-pfedgpa-1", "latest"])
def test_settings_keep_the_id_of_the_run_to_go_on_from(three: Path, run: str):
    """`latest` is another run as soon as the next has begun."""
    config = resolve_resume(Config(output_dir=str(three), resume_from=run))
    assert config.resume_from == find_run(run, three).name


def test_settings_keep_the_path_of_a_run_from_elsewhere(three: Path, tmp_path: Path):
    path = str(tmp_path / "elsewhere" / "5")
    begin(Path(path))
    config = Config(output_dir=str(three), resume_from=path)
    assert resolve_resume(config) == config


def test_a_run_to_go_on_from_that_is_not_there_is_named(three: Path):
    with pytest.raises(ResumeError, match=r'resume-from = "digits": "digits" may be '):
        resolve_resume(Config(output_dir=str(three), resume_from="digits"))
