"""Conversion and checks of users' arrays, and safe reading of .npz files."""

import io
import zipfile
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pfedgpa_app.data_section import by_x
from pfedgpa_app.files import count_of, open_regular
from pfedgpa_app.parameters import MAX_ABSOLUTE

# Limit of an array in memory.
MAX_BYTES = 8 * 2**30
# Limit of a .npy header.
MAX_HEADER_BYTES = 4096
# Largest float32 rounding error, relative to a feature's range.
_MAX_LOSS = 1e-3
# Table entries that are processed at a time.
PIECE = 2**24
# A feature with a smaller relative range is a constant with float64 rounding errors.
_ROUNDING = 1e-12

LEVELS = torch.int32
"""The dtype of 16-bit images and signals; 257 levels are one 8-bit level."""

Array = np.ndarray[Any, Any]


class FileError(ValueError):
    """An unusable data file; the message names it."""


class ArrayError(ValueError):
    """Unusable examples or labels; the message completes a sentence that begins with their name."""


def as_examples(values: Any, shape: Sequence[int | str], *, to_train: bool) -> Tensor:
    """Return examples ``(n, *shape)``, a NumPy array or tensor, as a tensor for models.

    Tables ``(n, features)`` become float32, but uint8 stays. Images and signals are uint8, uint16
    (which becomes `LEVELS`) or floats (which become float32); other integers have no known range.
    In ``shape``, a name in place of a number allows any size. ``to_train`` refuses table features
    that float32 cannot resolve. Raises `ArrayError` for a wrong shape or dtype, values that are not
    finite or too large, or lost features.
    """
    array, is_table = _as_array(values), len(shape) == 1
    if not _fits(array.shape, shape):
        given = by_x(array.shape) or "a number"
        raise ArrayError(f"{given}, right would be {by_x(('n', *shape))}")
    _check_type(array, _TABLES if is_table else _IMAGES)
    if array.dtype == np.uint8:
        return _as_tensor(array, np.uint8)
    if array.dtype == np.uint16 and not is_table:
        return _as_tensor(array, np.int32)
    with np.errstate(over="ignore"):  # overflow becomes infinity
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
            f"{array.dtype}, and {count_of(len(lost), 'feature')} (column {shown}, from 0) varied "
            "by less than float32 resolves at their size, right would be to subtract the mean, or "
            "another unit"
        )
    return examples


def as_labels(values: Any) -> Tensor:
    """Return a NumPy array or tensor of whole numbers of any type and byte order as int64.

    Raises `ArrayError` if they have another dtype (floats included), or do not fit into int64.
    """
    array = _as_array(values)
    _check_type(array, _LABELS)
    if array.dtype.kind == "u" and array.size and array.max() > np.iinfo(np.int64).max:
        raise ArrayError(f"up to {array.max()}, right would be 0 to data.num-classes - 1")
    return _as_tensor(array, np.int64)


def common_dtype(images: Sequence[Tensor]) -> list[Tensor]:
    """Return images of one dtype: if some are `LEVELS`, 8-bit ones are converted to it."""
    if not any(each.dtype == LEVELS for each in images):
        return list(images)
    return [e.to(LEVELS) * 257 if e.dtype == torch.uint8 else e for e in images]


class _Kinds(NamedTuple):
    """Allowed dtypes, and their description for messages."""

    types: tuple[type, ...]
    right: str

    def has(self, dtype: np.dtype[Any]) -> bool:
        return any(np.issubdtype(dtype, each) for each in self.types)


_LABELS = _Kinds((np.integer,), "whole numbers")
_TABLES = _Kinds((np.integer, np.floating), "whole numbers or floats")
_IMAGES = _Kinds((np.uint8, np.uint16, np.floating), "uint8, uint16 or floats")


def _check_type(array: Array, kinds: _Kinds) -> None:
    if not kinds.has(array.dtype):
        raise ArrayError(f"a {type(array).__name__} of {array.dtype}, right would be {kinds.right}")


def _fits(given: Sequence[int], shape: Sequence[int | str]) -> bool:
    """Return whether an array shape is that of examples of ``shape``."""
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
            f"a tensor of {values.dtype} that NumPy cannot represent ({error}), right would be a "
            "dense one of whole numbers or floats"
        ) from error
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        raise ArrayError("a masked array, right would be to leave out or fill in what is masked")
    if isinstance(values, np.ndarray):
        return np.asarray(values, values.dtype.newbyteorder("="))
    kind = f"{type(values).__name__} of {getattr(values, 'dtype', 'objects')}"
    raise ArrayError(f"a {kind}, right would be a tensor or NumPy array")


def _as_tensor(array: Array, dtype: Any) -> Tensor:
    """Return an array as a tensor of a dtype, without a copy if possible."""
    return torch.from_numpy(np.require(array, np.dtype(dtype), ("C", "W")))


def _lost_features(table: Array, floats: Array) -> list[int]:
    """Return the columns of a table ``(n, features)`` that float32 cannot resolve."""
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
    """Return the array x of an .npz file of NumPy, ``(n, *shape)``, converted by `as_examples`.

    Raises `FileError` if there is no such array, it has more than `MAX_BYTES`, or `as_examples`
    refuses it.
    """
    array = _read_array(file, "x", shape, _TABLES if len(shape) == 1 else _IMAGES)
    try:
        return as_examples(array, shape, to_train=to_train)
    except ArrayError as error:
        raise FileError(f"{file}: x is {error}") from error


def read_labels(file: Path) -> Tensor:
    """Return the array y of an .npz file, int64, ``(n,)``.

    Raises `FileError` if there is no such array, it has more than `MAX_BYTES`, or `as_labels`
    refuses it.
    """
    array = _read_array(file, "y", (), _LABELS)
    try:
        return as_labels(array)
    except ArrayError as error:
        raise FileError(f"{file}: y is {error}") from error


def read_header(beginning: bytes) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return the shape and dtype in the header of a .npy file, without allocating its array.

    Raises `ValueError` if there is no header of at most `MAX_HEADER_BYTES`.
    """
    file, formats = io.BytesIO(beginning), np.lib.format
    is_first = formats.read_magic(file) == (1, 0)
    read = formats.read_array_header_1_0 if is_first else formats.read_array_header_2_0
    shape, _, dtype = read(file, max_header_size=MAX_HEADER_BYTES)
    return tuple(shape), dtype


def _read_array(file: Path, name: str, wanted: Sequence[int | str], kinds: _Kinds) -> Array:
    """Read an array of an .npz file, if shape, dtype and size in its header are right."""
    try:
        with open_regular(file) as opened, zipfile.ZipFile(opened) as archive:
            member = archive.getinfo(f"{name}.npy")
            with archive.open(member) as stream:
                shape, dtype = read_header(stream.read(MAX_HEADER_BYTES))
            num_bytes = prod(shape) * dtype.itemsize
            if not _fits(shape, wanted) or not kinds.has(dtype):
                right = f"{kinds.right} of shape {_with_n(wanted)}"
                problem = f"is {dtype} of shape {shape}; right would be {right}"
            elif num_bytes > MAX_BYTES:
                problem = f"has {num_bytes:,} bytes; right would be {MAX_BYTES:,} or less"
            elif num_bytes > member.file_size:
                problem = (
                    f"should have {num_bytes:,} bytes and the file has {member.file_size:,}; it is "
                    "cut off"
                )
            else:
                with archive.open(member) as stream:
                    array: Array = np.lib.format.read_array(stream)
                return array
    except Exception as error:  # numpy, zipfile and zlib have no common base
        raise FileError(f"{file}: its array {name} cannot be read ({error})") from error
    raise FileError(f"{file}: {name} {problem}")


def _with_n(shape: Sequence[int | str]) -> str:
    return f"({', '.join(map(str, ('n', *shape)))}{'' if shape else ','})"
