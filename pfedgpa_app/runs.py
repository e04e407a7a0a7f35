"""The runs below an output folder: their names, how they are found, and which of them go on."""

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from io import FileIO
from pathlib import Path

from pfedgpa_app.config import Config
from pfedgpa_app.files import is_hidden, open_regular, read_json, text_of

RUN_FILE = "run.json"
CHECKPOINT = "checkpoint.safetensors"
BEST = "best"
"""The folder, in that of a run, with the checkpoint of its best round."""
BANK = "bank"
"""The folder, in that of a run, of models that are not in memory."""
LATEST = "latest"
_MAX_CANDIDATES = 10


class RunNotFoundError(ValueError):
    """No run, or more than one, is meant; the message lists those that may be."""


def register(path: Path, config: Config) -> tuple[str, FileIO]:
    """Name a run as no other below its output folder, ``<data set>-<strategy>-<number>``.

    Returns
    -------
    tuple[str, FileIO]
        The name, and the run's ``run.json``, which has it and when the run began. The file is
        locked until it is closed or the process is gone, however that ends: see `is_going_on`.

    Raises
    ------
    OSError
        If the file is there, or cannot be written.
    """
    data = re.sub(r"[^a-z0-9]+", "-", config.data.dataset.lower()).strip("-")
    pattern = re.compile(rf"{data}-{config.strategy}-([0-9]{{1,9}})")
    # Whoever else names a run in this folder waits.
    with _locked(path.parent):
        names = [name_of(file.parent) for file in path.parent.glob(f"*/{RUN_FILE}")]
        taken = [int(found[1]) for name in names if (found := pattern.fullmatch(name))]
        name = f"{data}-{config.strategy}-{max(taken, default=0) + 1}"
        file = (path / RUN_FILE).open("xb", buffering=0)
        try:
            _lock(file.fileno(), fcntl.LOCK_EX)
            facts = {"name": name, "began": datetime.now(UTC).isoformat(), "version": _version()}
            file.write(json.dumps(facts).encode() + b"\n")
            os.fsync(file)
        except OSError:
            file.close()
            raise
    return name, file


def name_of(path: Path) -> str:
    """Return a run's name; one of an older version has none but its id."""
    name = _fact(path, "name")
    return name if re.fullmatch("[a-z0-9-]{1,100}", name) else text_of(path.name)


def end_of(path: Path, key: str) -> str:
    """Return why a run ended before its last round, as `note_end` wrote it; empty if it did not."""
    return _fact(path, key)


def version_of(path: Path) -> str:
    """Return the version of the app that did a run, if it knows."""
    return _fact(path, "version")


def _version() -> str:
    try:
        return version("pfedgpa")
    except PackageNotFoundError:  # it runs from where it was unpacked
        return ""


def note_end(path: Path, file: FileIO, key: str, reason: str) -> None:
    """Write why a run ended into the file that `register` returned.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    facts = {
        "name": name_of(path),
        "began": began_at(path).isoformat(),
        "version": version_of(path),
        key: reason,
    }
    # Longer than what is there, so that the name is not lost if it ends half-way.
    os.ftruncate(file.fileno(), os.pwrite(file.fileno(), json.dumps(facts).encode() + b"\n", 0))
    os.fsync(file)


def _fact(path: Path, key: str) -> str:
    """Return what a run's ``run.json`` has, an empty text if it has no such thing."""
    try:
        facts = read_json(path / RUN_FILE)
        fact = facts.get(key)
    except (OSError, ValueError, AttributeError):
        return ""
    return fact if isinstance(fact, str) else ""


def began_at(path: Path) -> datetime:
    """Return when a run began, as it wrote down itself, in UTC.

    An older version wrote nothing of it. Such a run is as old as its ``config.json``, which a copy
    may make younger.

    Raises
    ------
    OSError
        If it has no ``config.json``.
    """
    try:
        return datetime.fromisoformat(_fact(path, "began")).astimezone(UTC)
    except (ValueError, OverflowError):
        return datetime.fromtimestamp((path / "config.json").stat().st_mtime, UTC)


def is_going_on(path: Path) -> bool:
    """Tell whether a process is at work on a run; if that cannot be told, it may be.

    A run of an older version, which has no ``run.json``, counts as over, and so does what has
    something else in its place.
    """
    if not (path / RUN_FILE).is_file():
        return False
    try:
        with open_regular(path / RUN_FILE) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def find_run(run: str, folder: Path, here: Path | None = None) -> Path:
    """Return the folder of a run.

    Parameters
    ----------
    run
        Its name, its id, the beginning of either if no other begins so, ``latest``, or its folder;
        or any of these and ``/best``, for the folder of its best checkpoint.
    folder
        The output folder; a path may be relative to it.
    here
        What else a path may be relative to.

    Raises
    ------
    RunNotFoundError
        If there is none, or more than one.
    OSError
        If the output folder cannot be read.
    """
    if not run:
        raise RunNotFoundError("The name of the run is empty; pfedgpa runs lists those there are")
    path = Path(os.path.expanduser(run))  # Path's own raises where there is no such user
    if (folder / path).is_dir():
        return folder / path
    if path.name == BEST and path.parent.name:
        return find_run(str(path.parent), folder, here) / BEST
    runs = run_folders(folder)
    if run == LATEST and runs:
        return runs[-1]
    names = {each: name_of(each) for each in runs}
    found = [each for each, name in names.items() if run == name] or [
        each for each, name in names.items() if name.startswith(run) or each.name.startswith(run)
    ]
    if len(found) > 1:
        listed = [f"{names[each]} ({each.name})" for each in found[-_MAX_CANDIDATES:]]
        if len(found) > len(listed):
            listed.insert(0, f"{len(found) - len(listed)} older ones")
        raise RunNotFoundError(
            f'"{run}" may be {", ".join(listed)}; right would be one of these names or ids'
        )
    if found:
        return found[0]
    if here is not None and (here / path).is_dir():
        return here / path
    raise RunNotFoundError(f"There is no run {folder / path}; pfedgpa runs lists those there are")


def run_folders(folder: Path) -> list[Path]:
    """Return the folders below an output folder that have a ``config.json``, oldest first.

    Those that began at the same time are sorted by their paths. Hidden ones, such as those of a
    bin, are passed over.

    Raises
    ------
    OSError
        If it is not a folder, or cannot be read.
    """
    found = []
    for path in folder.iterdir() if folder.exists() else ():
        if is_hidden(path.name):
            continue
        with contextlib.suppress(OSError):  # it is none, or is being removed
            (path / "config.json").stat()
            found.append((began_at(path), path))
    return [path for _, path in sorted(found)]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, operation: int) -> None:
    """Lock a file or folder, where the file system can: a run without is better than none."""
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, operation)
