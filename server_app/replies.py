"""Reading replies of clients, none of which is trusted."""

import io
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import Array, Message, MetricRecord
from torch import Tensor

from pfedgpa_app.parameters import Entry, ParameterError, ParameterLayout, StateDict

# What numpy's file format puts before the data, generously.
_MAX_HEADER_BYTES = 4096


class ReplyError(ValueError):
    """A reply that must not be used, with the reason."""


class Upload(NamedTuple):
    """A client's checked contribution to a round."""

    state: StateDict
    num_examples: int
    metrics: dict[str, float]


def read_upload(
    message: Message, layout: ParameterLayout, arrayrecord_key: str, weighted_by_key: str
) -> Upload:
    """Return what a training reply holds.

    Raises
    ------
    ReplyError
        If it is an error, has other records than one of arrays and one of metrics, arrays that do
        not fit ``layout``, or numbers that are none.
    """
    content = _content(message, num_array_records=1)
    if arrayrecord_key not in content.array_records:
        raise ReplyError(f'no ArrayRecord "{arrayrecord_key}"')
    metrics = read_metrics(message, weighted_by_key, num_array_records=1)
    arrays = content.array_records[arrayrecord_key]
    entries = {entry.name: entry for entry in layout.entries}
    try:
        # Unknown names are left to the layout, which lists them, and never deserialized.
        state = {
            name: _read_array(array, entries[name]) if name in entries else torch.empty(0)
            for name, array in arrays.items()
        }
        layout.check(state)
    except ParameterError as error:
        raise ReplyError(str(error)) from error
    return Upload(state, int(metrics[weighted_by_key]), metrics)


def read_metrics(
    message: Message, weighted_by_key: str, num_array_records: int = 0
) -> dict[str, float]:
    """Return the finite scalars of the only MetricRecord of a reply.

    Raises
    ------
    ReplyError
        If it is an error, has other records, a number that is not finite, an accuracy outside
        0 .. 1, or no positive ``weighted_by_key``.
    """
    content = _content(message, num_array_records)
    record: MetricRecord = next(iter(content.metric_records.values()))
    metrics: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, list):
            continue
        if not math.isfinite(value):
            raise ReplyError(f'the metric "{name}" is {value}')
        if "accuracy" in name and not 0 <= value <= 1:
            raise ReplyError(f'the metric "{name}" is {value}, and an accuracy is in 0 .. 1')
        metrics[name] = value
    weight = metrics.get(weighted_by_key)
    if weight is None or not 1 <= weight < 2**53:
        raise ReplyError(f'the metric "{weighted_by_key}" is {weight}, and should be 1 or more')
    return metrics


def _content(message: Message, num_array_records: int):  # type: ignore[no-untyped-def]
    if message.has_error():
        raise ReplyError(f"the client failed: {message.error.reason}")
    content = message.content
    found = (len(content.array_records), len(content.metric_records), len(content.config_records))
    wanted = (num_array_records, 1, 0)
    if found != wanted:
        raise ReplyError(f"has (array, metric, config) records {found} instead of {wanted}")
    return content


def _read_array(array: Array, entry: Entry) -> Tensor:
    """Deserialize an array whose header promises what ``entry`` says, and nothing larger."""
    expected = _numpy_dtype(entry.dtype)
    num_bytes = entry.numel * expected.itemsize
    if not num_bytes <= len(array.data) <= num_bytes + _MAX_HEADER_BYTES:
        raise ParameterError(
            f"{entry.name} has {len(array.data)} bytes, and should have about {num_bytes}"
        )
    try:
        shape, dtype = _read_header(array.data)
        if shape != entry.shape or dtype != expected:
            raise ParameterError(
                f"{entry.name} is {dtype} {shape} instead of {expected} {entry.shape}"
            )
        return torch.from_numpy(array.numpy())
    except ParameterError:
        raise
    except (ValueError, TypeError, OSError, EOFError, SyntaxError) as error:
        raise ParameterError(f"{entry.name} cannot be read: {error}") from error


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    try:
        return torch.empty(0, dtype=dtype).numpy().dtype
    except TypeError as error:  # Flower's arrays are NumPy's, which has no bfloat16
        raise ParameterError(f"{dtype} cannot be sent; right would be float32") from error


def _read_header(data: bytes) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return the shape and dtype of a .npy file without making its array."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, _, dtype = read(file, max_header_size=_MAX_HEADER_BYTES)
    return tuple(shape), dtype
