"""Named tensors in one safetensors file that is whole or not there."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from pfedgpa_app.files import open_regular, parse_json

# torch takes seconds to import, which whoever writes and reads no tensors is spared.
if TYPE_CHECKING:
    from torch import Tensor

# That of a thousand tensors has a hundredth of it.
_MAX_HEADER_BYTES = 2**24


class WriteError(OSError):
    """A file that cannot be written; the message names it and says why."""


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Name the file that is written here when that fails.

    Raises
    ------
    WriteError
        If it cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        # In safetensors' errors the system's words are all that tells of it.
        is_full = os.strerror(errno.ENOSPC) in str(error)
        reason = "the disk is full; right would be free space on it" if is_full else error
        raise WriteError(f"{file} cannot be written: {reason}") from error


def save_state(file: Path, kind: str, tensors: Mapping[str, "Tensor"], **facts: Any) -> None:
    """Write tensors, and facts as JSON, in place of an older file in one step.

    Whoever is killed, loses power or has no space left while writing leaves the older file as it
    was.

    Raises
    ------
    WriteError
        If the file cannot be written.
    """
    from safetensors.torch import save_file

    metadata = {"kind": kind, "facts": json.dumps(facts)}
    apart = _apart(tensors)
    with replacing(file) as unfinished:
        save_file(apart, unfinished, metadata)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Give a path to write to, which then takes the place of ``file`` in one step.

    Raises
    ------
    WriteError
        If it cannot be written; an older file is as it was.
    """
    unfinished = file.with_name(file.name + ".unfinished")
    with writing(file):
        try:
            unfinished.unlink(missing_ok=True)
            yield unfinished
            # Otherwise the new name may reach the disk before the content.
            sync_to_disk(unfinished)
            unfinished.replace(file)
        finally:
            unfinished.unlink(missing_ok=True)
        sync_to_disk(file.parent)


def write_text(file: Path, text: str) -> None:
    """Write a file of UTF-8, as `replacing` does."""
    with replacing(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def _apart(tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Return tensors that are contiguous and share no memory, as safetensors wants them.

    Only those that are not so are copied: a state may be a large part of what there is of memory.
    """
    apart, storages = {}, set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        apart[name] = (tensor.clone() if storage in storages else tensor).contiguous()
        storages.add(storage)
    return apart


def sync_to_disk(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, outlast a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file another name, without a copy of its content where the disk can.

    Raises
    ------
    WriteError
        If that fails.
    """
    try:
        os.link(source, target)
    except OSError:
        with replacing(target) as unfinished:
            shutil.copyfile(source, unfinished)


Shapes = dict[str, tuple[int, ...]]
"""The shapes of a file's tensors by name."""


def load_state(
    file: Path, kind: str, check: Callable[[dict[str, Any], Shapes], None] | None = None
) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """Return the tensors and the facts that `save_state` wrote.

    ``check`` is called with the facts and the tensors' shapes before any tensor is read, and may
    raise what it likes.

    Raises
    ------
    ValueError
        If the file is missing, damaged or of another kind.
    """
    try:
        metadata, shapes = _read_header(file)
        facts = _facts(file, kind, metadata)
        if check is not None:
            check(facts, shapes)
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, facts  # noqa: SIM118
    except (OSError, SafetensorError, RuntimeError, MemoryError) as error:
        raise ValueError(f"{file} is missing or damaged: {error}") from error


def load_metadata(file: Path, kind: str) -> dict[str, Any]:
    """Return the facts of `load_state` alone, with its errors."""
    try:
        return _facts(file, kind, _read_header(file)[0])
    except OSError as error:
        raise ValueError(f"{file} is missing or damaged: {error}") from error


def _read_header(file: Path) -> tuple[dict[str, Any], Shapes]:
    """Return the metadata and the shapes of a safetensors file, and read nothing else of it.

    Its library maps the whole file into memory before it tells.

    Raises
    ------
    OSError
        If the file cannot be read, or is none.
    """
    with open_regular(file) as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > _MAX_HEADER_BYTES:
            raise OSError(f"its header has {size} bytes")
        header = stream.read(size)
    try:
        entries = dict(parse_json(header))
        metadata = dict(entries.pop("__metadata__", {}))
        shapes = {name: tuple(map(int, entry["shape"])) for name, entry in entries.items()}
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise OSError(f"its header cannot be read: {error!r}") from error
    return metadata, shapes


def _facts(file: Path, kind: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    if metadata.get("kind") != kind:
        found = repr(metadata.get("kind", "of no kind"))[:60]
        raise ValueError(f"{file} is {found}; right would be {kind!r}")
    try:
        return dict(parse_json(metadata["facts"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} has damaged metadata: {error!r}") from error


def states_under(prefix: str, states: Mapping[int, Mapping[str, "Tensor"]]) -> dict[str, "Tensor"]:
    """Return the tensors of many clients' states below ``prefix.<client>.``."""
    return {
        f"{prefix}.{client}.{name}": tensor
        for client, state in states.items()
        for name, tensor in state.items()
    }


def states_below(prefix: str, tensors: Mapping[str, "Tensor"]) -> dict[int, dict[str, "Tensor"]]:
    """Return the states by client, the inverse of `states_under`."""
    states: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if not key.startswith(f"{prefix}."):
            continue
        client, _, name = key.removeprefix(f"{prefix}.").partition(".")
        states.setdefault(int(client), {})[name] = tensor
    return states
