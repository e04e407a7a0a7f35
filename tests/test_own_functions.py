"""Which functions settings may name."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pfedgpa_app import own_functions
from pfedgpa_app.config import DATASETS, DataConfig
from pfedgpa_app.data import DataError
from pfedgpa_app.data.sources import load_dataset
from pfedgpa_app.model_spec import ModelError
from pfedgpa_app.models import build_model
from pfedgpa_app.own_functions import OwnFunctionError, own_function

PROJECT = Path(__file__).parents[1]
MODULE = """
import functools
import shutil
from json import loads
from shutil import rmtree

remove = functools.partial(rmtree, ignore_errors=True)


class Net:
    pass


@functools.lru_cache
def load(root):
    return root
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the current folder, with a module and a package of the user's in it."""
    (tmp_path / "here" / "packed").mkdir(parents=True)
    (tmp_path / "here" / "written.py").write_text(MODULE)
    (tmp_path / "here" / "packed" / "part.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "here"), *sys.path])
    yield tmp_path / "here"
    for name in ("written", "packed", "packed.part"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["written:load", "written:Net", "packed.part:load"])
def test_functions_of_the_current_folder_are_found(here: Path, name: str):
    assert own_function(name).__name__ == name.partition(":")[2]


def test_functions_of_the_apps_folder_are_found_wherever_one_is(here: Path):
    assert own_function("benchmarks.small_images:cnn").__name__ == "cnn"


REFUSED = [
    "shutil:rmtree",  # of the standard library
    "os.path:exists",
    "sys:exit",  # built in
    "builtins:print",
    "torch:load",  # installed
    "pfedgpa_app.commands_runs:remove",  # of the app
    "server_app.app:main",
    "written:rmtree",  # imported by the user's module
    "written:remove",
    "__main__:main",
]


@pytest.mark.parametrize("name", REFUSED)
def test_no_other_function_is_called_or_imported(here: Path, name: str):
    with pytest.raises(
        OwnFunctionError, match=r"is not a module of your own; right would be.*TRUST"
    ):
        own_function(name)


def test_a_data_set_that_is_named_so_deletes_nothing(tmp_path: Path):
    (tmp_path / "kept").mkdir()
    config = DataConfig(
        dataset="shutil:rmtree",
        root=str(tmp_path / "kept"),
        shape="1x8x8",
        num_classes=2,
        partition="iid",
    )
    with pytest.raises(DataError, match="shutil is not a module of your own"):
        load_dataset(config, seed=0)
    with pytest.raises(ModelError, match="shutil is not a module of your own"):
        build_model("shutil:rmtree", DATASETS["digits"], seed=0)
    assert (tmp_path / "kept").is_dir()


@pytest.mark.parametrize("where", ["elsewhere", "here/.venv/lib/site-packages"])
def test_an_installed_package_is_called_if_it_is_trusted_by_name(
    here: Path, monkeypatch: pytest.MonkeyPatch, where: str
):
    folder = here.parent / where
    folder.mkdir(parents=True)
    (folder / "installed.py").write_text("raise SystemExit\n")
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(OwnFunctionError, match="PFEDGPA_TRUST=installed"):
        own_function("installed:load")  # and it was not imported, which would end all
    (folder / "installed.py").write_text(MODULE)
    monkeypatch.setenv("PFEDGPA_TRUST", "other, installed")
    assert own_function("installed:load").__name__ == "load"
    monkeypatch.setenv("PFEDGPA_TRUST", "installed,shutil")
    assert own_function("installed:rmtree") is shutil.rmtree


def test_the_app_as_it_is_installed_trusts_nothing_beside_it(
    here: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(own_functions, "_APP", Path(pytest.__file__).parents[1])
    with pytest.raises(OwnFunctionError):
        own_function("pytest:main")


def test_a_service_that_is_started_in_the_root_folder_trusts_nothing_for_it(
    here: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir("/")
    with pytest.raises(OwnFunctionError):
        own_function("written:load")


def test_a_module_that_is_not_there_is_named(here: Path):
    with pytest.raises(OwnFunctionError, match="No module named 'missing'"):
        own_function("missing:load")


def test_functions_are_found_in_a_copy_of_the_app_as_flower_unpacks_it(tmp_path: Path):
    copy = tmp_path / "apps" / "fab"
    shutil.copytree(PROJECT / "pfedgpa_app", copy / "pfedgpa_app")
    (copy / "written.py").write_text(MODULE)
    program = (
        f"import sys; sys.path.insert(0, {str(copy)!r})\n"
        "from pfedgpa_app.own_functions import own_function\n"
        "print(own_function.__code__.co_filename, own_function('written:load').__name__)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(copy / "pfedgpa_app" / "own_functions.py"), "load"]
