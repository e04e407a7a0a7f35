"""Named tensors in one safetensors file that is whole or not there."""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from pfedgpa_app.files import open_regular, parse_json

# torch takes seconds to import, and is needed for tensors alone.
if TYPE_CHECKING:
    from torch import Tensor

# A hundred times that of a thousand tensors.
_MAX_HEADER_BYTES = 2**24


class WriteError(OSError):
    """A file that cannot be written; the message names it and says why."""


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Raise a `WriteError` for ``file`` in place of errors of the system and of safetensors."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors passes only the system's text on.
        is_full = os.strerror(errno.ENOSPC) in str(error)
        reason = "the disk is full; right would be free space on it" if is_full else error
        raise WriteError(f"{file} cannot be written: {reason}") from error


def save_state(file: Path, kind: str, tensors: Mapping[str, "Tensor"], **fields: Any) -> None:
    """Replace a file by tensors, and ``fields`` as JSON, in one step; see `replacing`.

    Raises `WriteError`.
    """
    from safetensors.torch import save_file

    # Only tensors that share memory or are not contiguous, which safetensors refuses, are copied:
    # a state may be a large part of the memory.
    apart: dict[str, Tensor] = {}
    storages = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        apart[name] = (tensor.clone() if storage in storages else tensor).contiguous()
        storages.add(storage)
    with replacing(file) as unfinished:
        save_file(apart, unfinished, {"kind": kind, "fields": json.dumps(fields)})


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield a path to write to, which then replaces ``file`` in one step.

    An error, a kill or a loss of power before leaves an older file unchanged. Raises `WriteError`.
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
    """Replace a file by a text in UTF-8, as `replacing` does."""
    with replacing(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def sync_to_disk(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where the file system cannot; raises `WriteError`."""
    try:
        os.link(source, target)
    except OSError:
        with replacing(target) as unfinished:
            shutil.copyfile(source, unfinished)


Shapes = dict[str, tuple[int, ...]]
"""The shapes of a file's tensors by name."""


def load_state(file: Path, kind: str) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """Return the tensors and ``fields`` of `save_state`.

    Raises `ValueError` if the file is missing, damaged or of another kind.
    """
    fields, shapes = load_header(file, kind)
    with _reading(file), safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in shapes}, fields


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, MemoryError) as error:
        raise ValueError(f"{file} is missing or damaged: {error}") from error


def load_header(file: Path, kind: str) -> tuple[dict[str, Any], Shapes]:
    """Return the ``fields`` of `load_state` and the tensors' shapes, with its errors."""
    with _reading(file):
        with open_regular(file) as stream:
            size = int.from_bytes(stream.read(8), "little")
        if size > _MAX_HEADER_BYTES:
            raise OSError(f"its header has {size} bytes")
        # "np" needs no torch, which would reserve memory for the whole file.
        with safe_open(file, framework="np") as opened:
            metadata = opened.metadata() or {}
            names = opened.keys()
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in names}
    if metadata.get("kind") != kind:
        found = repr(metadata.get("kind", "of no kind"))[:60]
        raise ValueError(f"{file} is {found}; right would be {kind!r}")
    try:
        return dict(parse_json(metadata["fields"])), shapes
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} has damaged metadata: {error!r}") from error


def states_under(prefix: str, states: Mapping[int, Mapping[str, "Tensor"]]) -> dict[str, "Tensor"]:
    """Return the tensors of many clients' states below ``prefix.<client>.``."""
    named = ((client, *each) for client, state in states.items() for each in state.items())
    return {f"{prefix}.{client}.{name}": tensor for client, name, tensor in named}


def states_below(prefix: str, tensors: Mapping[str, "Tensor"]) -> dict[int, dict[str, "Tensor"]]:
    """Return the states by client, the inverse of `states_under`."""
    states: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(f"{prefix}."):
            client, _, name = key.removeprefix(f"{prefix}.").partition(".")
            states.setdefault(int(client), {})[name] = tensor
    return states
