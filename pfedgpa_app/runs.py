"""The runs below an output folder: their names, how they are found, and which of them go on."""

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path

from pfedgpa_app.config import Config
from pfedgpa_app.files import is_hidden, open_regular, read_json, text_of
from pfedgpa_app.source import version_of

RUN_FILE = "run.json"
CHECKPOINT = "checkpoint.safetensors"
BEST = "best"
"""The folder, in that of a run, with the checkpoint of its best round."""
BANK = "bank"
"""The folder, in that of a run, of models that are not in memory."""
LATEST = "latest"
_MAX_CANDIDATES = 10


class RunNotFoundError(ValueError):
    """A reference fits no run or several; the message lists these."""


def register(path: Path, config: Config) -> tuple[str, FileIO]:
    """Give a run a new name in its output folder, ``<data set>-<strategy>-<number>``.

    Returns the name and the new ``run.json``, which is locked as long as the process lives and the
    file is open: see `is_going_on`. Raises `OSError` if it exists or cannot be written.
    """
    data = re.sub(r"[^a-z0-9]+", "-", config.data.dataset.lower()).strip("-")
    pattern = re.compile(rf"{data}-{config.strategy}-([0-9]{{1,9}})")
    with _locked(path.parent):  # one process at a time takes a number
        names = [name_of(file.parent) for file in path.parent.glob(f"*/{RUN_FILE}")]
        taken = [int(found[1]) for name in names if (found := pattern.fullmatch(name))]
        name = f"{data}-{config.strategy}-{max(taken, default=0) + 1}"
        file = (path / RUN_FILE).open("xb", buffering=0)
        try:
            _lock(file.fileno())
            began = datetime.now(UTC).isoformat()
            _write(file, {"name": name, "began": began, "version": version_of()})
        except OSError:
            file.close()
            raise
    return name, file


def name_of(path: Path) -> str:
    """Return a run's name, or its id if it has no valid one."""
    name = field_of(path, "name")
    return name if re.fullmatch("[a-z0-9-]{1,100}", name) else text_of(path.name)


def note_end(path: Path, file: FileIO, key: str, reason: str) -> None:
    """Write why a run ended into the file that `register` returned.

    Raises `OSError` if it cannot be written.
    """
    kept = {name: field_of(path, name) for name in ("name", "began", "version")}
    _write(file, kept | {key: reason})


def _write(file: FileIO, fields: dict[str, str]) -> None:
    # Truncated afterwards, so that the name survives an interruption.
    os.ftruncate(file.fileno(), os.pwrite(file.fileno(), json.dumps(fields).encode() + b"\n", 0))
    os.fsync(file)


def field_of(path: Path, key: str) -> str:
    """Return a field of a run's ``run.json``; empty if there is none.

    These are ``name``, ``began``, ``version`` (of the app) and, after `note_end`, its key.
    """
    try:
        value = read_json(path / RUN_FILE).get(key)
    except (OSError, ValueError, AttributeError):
        return ""
    return value if isinstance(value, str) else ""


def began_at(path: Path) -> datetime:
    """Return when a run began, in UTC: by its ``run.json``, or else by ``config.json``'s time.

    Raises `OSError` if it has neither.
    """
    try:
        return datetime.fromisoformat(field_of(path, "began")).astimezone(UTC)
    except (ValueError, OverflowError):
        return datetime.fromtimestamp((path / "config.json").stat().st_mtime, UTC)


def is_going_on(path: Path) -> bool:
    """Return whether a process works on a run, or may do so: its ``run.json`` cannot be locked."""
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
    """Return the folder of a run in an output folder.

    ``run`` is its name, its id, a prefix of either that no other has, ``latest``, or its path,
    which may be relative to ``folder`` or ``here``; each may end in ``/best``, for the folder of
    its best checkpoint. Raises `RunNotFoundError` if there is none, or more than one, and `OSError`
    if the output folder cannot be read.
    """
    if not run:
        raise RunNotFoundError("The name of the run is empty; pfedgpa runs lists those there are")
    path = Path(os.path.expanduser(run))  # Path's own raises where there is no such user
    if (folder / path).is_dir():
        return folder / path
    if path.name == BEST and path.parent.name:
        return find_run(str(path.parent), folder, here) / BEST
    names = {each: name_of(each) for each in run_folders(folder)}
    if run == LATEST and names:
        return list(names)[-1]
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
    """Return the folders in an output folder that have a ``config.json``, by time, then by path.

    Hidden ones are skipped. Raises `OSError` if it is not a folder, or cannot be read.
    """
    found = []
    for path in folder.iterdir() if folder.exists() else ():
        if not is_hidden(path.name):
            with contextlib.suppress(OSError):  # no run, or being removed
                (path / "config.json").stat()
                found.append((began_at(path), path))
    return [path for _, path in sorted(found)]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    """Lock a file or folder if the file system can: a run without a lock is better than none."""
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)
