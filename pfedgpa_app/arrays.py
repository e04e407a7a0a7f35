"""Arrays from .npz files, whose headers are read before anything is decompressed."""

import io
import zipfile
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Of an array; it is held in memory as a whole.
MAX_BYTES = 8 * 2**30
# What numpy's file format puts before the data, generously.
MAX_HEADER_BYTES = 4096


class FileError(ValueError):
    """A file that holds nothing for the model; the message names it."""


def check_regular(file: Path) -> None:
    """Refuse what may have no end, or never begin.

    Raises
    ------
    FileError
        If it is no regular file.
    """
    if not file.is_file():
        raise FileError(
            f"{file}: is a pipe, a device, a folder or a broken link; right would be a regular file"
        )


def read_examples(file: Path, shape: Sequence[int | str]) -> Tensor:
    """Return the array x of an .npz file, uint8 or float32, ``(n, *shape)``.

    Parameters
    ----------
    file
        What numpy's savez or savez_compressed wrote.
    shape
        Of an example; where a name stands in place of a number, any will do.

    Raises
    ------
    FileError
        If there is no such array, or it has more than `MAX_BYTES`.
    """
    array = _read_array(file, "x", shape, (np.uint8, np.floating), "uint8 or floating point")
    return torch.from_numpy(array if array.dtype == np.uint8 else array.astype(np.float32))


def read_labels(file: Path) -> Tensor:
    """Return the array y of an .npz file, int64, ``(n,)``.

    Raises
    ------
    FileError
        If there is no such array, or it has more than `MAX_BYTES`.
    """
    return torch.from_numpy(
        _read_array(file, "y", (), (np.integer,), "whole numbers").astype(np.int64)
    )


def read_header(beginning: bytes) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return the shape and dtype of a .npy file by its first bytes, without making its array.

    Raises
    ------
    ValueError
        If they are no header of at most `MAX_HEADER_BYTES`.
    """
    file = io.BytesIO(beginning)
    version = np.lib.format.read_magic(file)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, _, dtype = read(file, max_header_size=MAX_HEADER_BYTES)
    return tuple(shape), dtype


def _read_array(
    file: Path, name: str, wanted: Sequence[int | str], kinds: tuple[type, ...], right: str
) -> np.ndarray[Any, Any]:
    """Return an array of n entries of a shape, whose numbers are of one of some kinds."""
    check_regular(file)
    try:
        with zipfile.ZipFile(file) as archive:
            member = archive.getinfo(f"{name}.npy")
            with archive.open(member) as stream:
                shape, dtype = read_header(stream.read(MAX_HEADER_BYTES))
            problem = _problem(shape, dtype, member.file_size, wanted, kinds, right)
            if problem is None:
                with archive.open(member) as stream:
                    array: np.ndarray[Any, Any] = np.lib.format.read_array(stream)
    except Exception as error:  # numpy, zipfile and zlib each raise their own
        raise FileError(f"{file}: its array {name} cannot be read ({error})") from error
    if problem is not None:
        raise FileError(f"{file}: {name} {problem}")
    return array


def _problem(
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    file_size: int,
    wanted: Sequence[int | str],
    kinds: tuple[type, ...],
    right: str,
) -> str | None:
    """Say what is wrong with an array that is not read yet; None if it may be read."""
    fits = len(shape) == 1 + len(wanted) and all(
        isinstance(size, str) or size == given
        for size, given in zip(wanted, shape[1:], strict=True)
    )
    if not fits or not any(np.issubdtype(dtype, kind) for kind in kinds):
        return f"is {dtype} of shape {shape}; right would be {right} of shape {_with_n(wanted)}"
    num_bytes = prod(shape) * dtype.itemsize
    if num_bytes > MAX_BYTES:
        return f"has {num_bytes:,} bytes; right would be {MAX_BYTES:,} or less"
    if num_bytes > file_size:
        return f"should have {num_bytes:,} bytes and the file has {file_size:,}; it is cut off"
    return None


def _with_n(shape: Sequence[int | str]) -> str:
    return f"({', '.join(map(str, ('n', *shape)))}{'' if shape else ','})"
