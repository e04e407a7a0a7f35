"""Arrays that people bring: what becomes of their types, and .npz files.

The header of an .npz file's array is read before anything is decompressed.
"""

import io
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pfedgpa_app.data_section import by_x
from pfedgpa_app.parameters import MAX_ABSOLUTE

# Of an array; it is held in memory as a whole.
MAX_BYTES = 8 * 2**30
# What numpy's file format puts before the data, generously.
MAX_HEADER_BYTES = 4096
# Of a feature's range, how much of it float32 may lose.
_MAX_LOSS = 1e-3
# Entries of a table that are looked at together.
PIECE = 2**24
# What varies by less, of its size, is a constant that was calculated in float64.
_ROUNDING = 1e-12

LEVELS = torch.int32
"""The type of images and signals of 16 bits, of whose levels 257 are one of 8 bits."""

Array = np.ndarray[Any, Any]


class FileError(ValueError):
    """A file that holds nothing for the model; the message names it."""


class ArrayError(ValueError):
    """Numbers that are no examples or labels; the message goes on after what they are called."""


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


def as_examples(values: Any, shape: Sequence[int | str], *, to_train: bool) -> Tensor:
    """Return a NumPy array or tensor of any byte order as models are given it.

    The numbers of a table become float32, but for uint8. Images and signals are uint8, or uint16,
    which becomes `LEVELS`, or floats, which become float32; of other whole numbers nobody knows
    what is black and what is white.

    Parameters
    ----------
    values
        Examples, ``(n, *shape)``; those of a table have one dimension.
    shape
        Of an example; where a name stands in place of a number, any will do.
    to_train
        Whether features are learned from these rows, and so have to keep their differences.

    Raises
    ------
    ArrayError
        If they are of no such shape or type, not finite or too large, or lose what a feature tells.
    """
    array, is_table = _as_array(values), len(shape) == 1
    if not _fits(array.shape, shape):
        given = by_x(array.shape) or "a number"
        raise ArrayError(f"{given}, right would be {by_x(('n', *shape))}")
    _check_type(array, *_example_kinds(is_table))
    if array.dtype == np.uint8:
        return _as_tensor(array, np.uint8)
    if array.dtype == np.uint16 and not is_table:
        return _as_tensor(array, np.int32)
    with np.errstate(over="ignore"):  # what is too large becomes infinite
        examples = _as_tensor(array, np.float32)
    is_right = examples.abs() < MAX_ABSOLUTE
    if not bool(is_right.all()):
        row = int((~is_right.reshape(len(array), -1)).any(dim=1).nonzero()[0])
        raise ArrayError(
            f"NaN or infinity or beyond {MAX_ABSOLUTE:.0e} (first in row {row}, from 0), right "
            "would be finite numbers"
        )
    if is_table and to_train and (lost := _lost_features(array, examples.numpy())):
        shown = ", ".join(map(str, lost[:10])) + (", …" if len(lost) > 10 else "")
        raise ArrayError(
            f"{array.dtype}, and {len(lost)} feature(s) (column {shown}, from 0) vary by less than "
            "float32 tells apart at their size, right would be to subtract the mean, or another "
            "unit"
        )
    return examples


def as_labels(values: Any) -> Tensor:
    """Return a NumPy array or tensor of whole numbers of any type and byte order as int64.

    Raises
    ------
    ArrayError
        If they are of another type (floats too, whole or not), or do not fit.
    """
    array = _as_array(values)
    _check_type(array, _LABEL_KINDS, "whole numbers (int64)")
    if array.dtype.kind == "u" and array.size and array.max() > np.iinfo(np.int64).max:
        raise ArrayError(f"up to {array.max()}, right would be 0 to data.num-classes - 1")
    return _as_tensor(array, np.int64)


def alike(images: Sequence[Tensor]) -> list[Tensor]:
    """Return pictures of one type: those of 8 bits become `LEVELS` where others are."""
    if not any(each.dtype == LEVELS for each in images):
        return list(images)
    return [e.to(LEVELS) * 257 if e.dtype == torch.uint8 else e for e in images]


_LABEL_KINDS = (np.integer,)


def _example_kinds(is_table: bool) -> tuple[tuple[type, ...], str]:
    """Return the types that examples may have, and how a message calls them."""
    if is_table:
        return (np.integer, np.floating), "whole numbers or floats"
    return (np.uint8, np.uint16, np.floating), "uint8, uint16 or floats"


def _is_one_of(dtype: np.dtype[Any], kinds: tuple[type, ...]) -> bool:
    return any(np.issubdtype(dtype, kind) for kind in kinds)


def _check_type(array: Array, kinds: tuple[type, ...], right: str) -> None:
    if not _is_one_of(array.dtype, kinds):
        raise ArrayError(f"a {type(array).__name__} of {array.dtype}, right would be {right}")


def _fits(given: Sequence[int], shape: Sequence[int | str]) -> bool:
    """Tell whether an array is one of examples of a shape."""
    return len(given) == 1 + len(shape) and all(
        isinstance(wanted, str) or wanted == size
        for wanted, size in zip(shape, given[1:], strict=True)
    )


def _as_array(values: Any) -> Array:
    """Return a NumPy array or tensor as a plain array in the byte order of this machine."""
    try:
        if isinstance(values, Tensor):
            values = values.detach().cpu()
            values = values.float() if values.dtype == torch.bfloat16 else values
            return np.asarray(values.resolve_conj().resolve_neg().numpy())
    except (TypeError, RuntimeError) as error:
        raise ArrayError(
            f"a tensor of {values.dtype} that NumPy does not take ({error}), right would be a "
            "dense one of whole numbers or floats"
        ) from error
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        raise ArrayError("a masked array, right would be to leave out or fill in what is masked")
    if isinstance(values, np.ndarray):
        return np.asarray(values, values.dtype.newbyteorder("="))
    kind = f"{type(values).__name__} of {getattr(values, 'dtype', 'objects')}"
    raise ArrayError(f"a {kind}, right would be a tensor or NumPy array")


def _as_tensor(array: Array, dtype: Any) -> Tensor:
    """Return an array as a tensor of a type, without a copy where none is needed."""
    return torch.from_numpy(np.require(array, np.dtype(dtype), ("C", "W")))


def _lost_features(table: Array, floats: Array) -> list[int]:
    """Return the features that differ by less than float32 tells apart, ``(n, features)``."""
    if np.can_cast(table.dtype, np.float32) or not len(table):
        return []
    low = high = table[0].astype(np.float64)
    loss = np.zeros_like(low)
    step = max(1, PIECE // table[0].size)  # a copy of the table in float64 would be large
    for begin in range(0, len(table), step):
        exact = table[begin : begin + step].astype(np.float64)
        low, high = np.minimum(low, exact.min(axis=0)), np.maximum(high, exact.max(axis=0))
        exact -= floats[begin : begin + step]
        loss = np.maximum(loss, np.abs(exact, out=exact).max(axis=0))
    spread = high - low
    varies = spread > _ROUNDING * np.maximum(np.abs(low), np.abs(high))
    lost: list[int] = np.flatnonzero(varies & (loss > _MAX_LOSS * spread)).tolist()
    return lost


def read_examples(file: Path, shape: Sequence[int | str], *, to_train: bool = False) -> Tensor:
    """Return the array x of an .npz file, ``(n, *shape)``, as `as_examples` makes it.

    Parameters
    ----------
    file
        What numpy's savez or savez_compressed wrote.
    shape
        Of an example; where a name stands in place of a number, any will do.
    to_train
        As `as_examples` takes it.

    Raises
    ------
    FileError
        If there is no such array, it has more than `MAX_BYTES`, or no example can have its numbers.
    """
    array = _read_array(file, "x", shape, *_example_kinds(len(shape) == 1))
    with _named(f"{file}: x"):
        return as_examples(array, shape, to_train=to_train)


def read_labels(file: Path) -> Tensor:
    """Return the array y of an .npz file, int64, ``(n,)``.

    Raises
    ------
    FileError
        If there is no such array, it has more than `MAX_BYTES`, or its numbers do not fit.
    """
    array = _read_array(file, "y", (), _LABEL_KINDS, "whole numbers")
    with _named(f"{file}: y"):
        return as_labels(array)


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Name what an array is called, and its file, where its numbers are refused."""
    try:
        yield
    except ArrayError as error:
        raise FileError(f"{what} is {error}") from error


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
) -> Array:
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
                    array: Array = np.lib.format.read_array(stream)
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
    if not _fits(shape, wanted) or not _is_one_of(dtype, kinds):
        return f"is {dtype} of shape {shape}; right would be {right} of shape {_with_n(wanted)}"
    num_bytes = prod(shape) * dtype.itemsize
    if num_bytes > MAX_BYTES:
        return f"has {num_bytes:,} bytes; right would be {MAX_BYTES:,} or less"
    if num_bytes > file_size:
        return f"should have {num_bytes:,} bytes and the file has {file_size:,}; it is cut off"
    return None


def _with_n(shape: Sequence[int | str]) -> str:
    return f"({', '.join(map(str, ('n', *shape)))}{'' if shape else ','})"
