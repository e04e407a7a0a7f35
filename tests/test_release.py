"""What is published: the wheel, and the app as Flower packs it."""

import contextlib
import importlib
import io
import re
import shutil
import sys
import tomllib
import zipfile
from pathlib import Path

import flwr
import pytest
import yaml
from flwr.cli.app_cmd.publish import _collect_file_paths, _validate_files
from flwr.cli.build import build_fab_from_disk
from flwr.common.constant import FAB_MAX_SIZE
from packaging.requirements import Requirement

import pfedgpa_app
from pfedgpa_app.exported import MODEL_KIND
from pfedgpa_app.vault import VECTOR_KIND
from server_app.checkpoint import CHECKPOINT_KIND

PROJECT = Path(__file__).parents[1]
PACKAGES = ("pfedgpa_app", "client_app", "server_app")
PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text())
VERSION = PYPROJECT["project"]["version"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the project without an environment, whose files take seconds to be left out."""
    left_out = shutil.ignore_patterns(".venv", ".git", ".*_cache", "build")
    return shutil.copytree(PROJECT, tmp_path_factory.mktemp("project") / "copy", ignore=left_out)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel with the build backend alone, which this environment must have."""
    folder = tmp_path_factory.mktemp("wheel")
    from hatchling.build import build_wheel  # imported here, as other workers need it not

    with contextlib.chdir(PROJECT):
        return folder / build_wheel(str(folder))


def test_flower_accepts_the_number_and_size_of_the_files_for_publication(project: Path):
    with contextlib.redirect_stdout(io.StringIO()):
        files = _collect_file_paths(project)
    _validate_files(files)
    assert project / "server_app" / "strategies" / "pfedgpa.py" in files


def test_what_flower_packs_has_all_of_the_app_and_leaves_room_for_own_modules(project: Path):
    fab = build_fab_from_disk(project)
    assert len(fab) < FAB_MAX_SIZE / 4
    names = set(zipfile.ZipFile(io.BytesIO(fab)).namelist())
    for package in PACKAGES:
        modules = (PROJECT / package).rglob("*.py")
        assert {str(file.relative_to(PROJECT)) for file in modules} <= names


def test_flower_is_of_a_version_that_was_tried_and_the_app_names_the_last():
    (needed,) = (
        r for r in map(Requirement, PYPROJECT["project"]["dependencies"]) if r.name == "flwr"
    )
    target = PYPROJECT["tool"]["flwr"]["app"]["flwr-version-target"]
    assert flwr.__version__ in needed.specifier
    assert target in needed.specifier
    assert "1.43.0" not in needed.specifier  # some of what is imported is no public API


def test_on_windows_an_error_says_what_would_be_right(monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "win32")
        with pytest.raises(ImportError, match=r"Windows does not; right would be .* \(WSL 2\)"):
            importlib.reload(pfedgpa_app)
    importlib.reload(pfedgpa_app)


def test_the_wheel_has_the_packages_with_their_types_and_nothing_else(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in PACKAGES:
        modules = {str(file.relative_to(PROJECT)) for file in (PROJECT / package).rglob("*.py")}
        assert modules | {f"{package}/py.typed"} <= names
    folders = {name.split("/")[0] for name in names}
    assert folders == {*PACKAGES, f"pfedgpa-{VERSION}.dist-info"}


def test_citation_and_changelog_are_of_this_version():
    citation = yaml.safe_load((PROJECT / "docs" / "CITATION.cff").read_text())
    assert citation["version"] == VERSION
    first = re.search(
        r"^## (\S+)", (PROJECT / "docs" / "changelog.md").read_text(), flags=re.MULTILINE
    )
    assert first is not None
    assert first[1] in (VERSION, "Unreleased")


def test_the_kinds_of_files_are_those_that_the_documents_name():
    text = (PROJECT / "docs" / "runs.md").read_text()
    kinds = {CHECKPOINT_KIND, VECTOR_KIND, MODEL_KIND}
    assert set(re.findall(r"`(pfedgpa-[a-z]+-\d+)`", text)) == kinds
