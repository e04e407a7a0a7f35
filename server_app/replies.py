"""Validation of clients' replies, none of which is trusted."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord
from flwr.common.constant import ErrorCode
from torch import Tensor

from pfedgpa_app import protocol
from pfedgpa_app.arrays import MAX_HEADER_BYTES, read_header
from pfedgpa_app.config import PrivacyConfig
from pfedgpa_app.parameters import (
    MAX_ABSOLUTE,
    Entry,
    ParameterError,
    ParameterLayout,
    StateDict,
    UnboundedError,
    is_bounded,
)
from pfedgpa_app.rounds import CLIENT_FAILED, NO_REPLY

# Error codes of the SuperLink for lost nodes.
_GONE = (
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ErrorCode.NODE_UNAVAILABLE,
)
# More than any data set has; loops over partitions must end.
MAX_PARTITIONS = 100_000
# Larger integers are not exact as floats.
MAX_WEIGHT = 2**53
# Channels, or features of a table: gene expression has tens of thousands.
_MAX_CHANNELS = 2**20
# Ten years, and an epsilon without any privacy: beyond is not plausible.
_MAX_SECONDS = 3e8
_MAX_EPSILON = 1e9
# Letters of the privacy that a site demands.
_MAX_DEMAND = 60
# For headers, and extras of some rounds.
_SPARE_BYTES = 2**24


class ReplyError(ValueError):
    """An invalid reply, with the reason, and what `RoundRecord.note` gets besides."""

    columns: ClassVar[Mapping[str, bool]] = {}


class NotFiniteError(ReplyError):
    """A reply with a metric or parameter that is NaN, infinite or huge."""

    columns: ClassVar[Mapping[str, bool]] = {"not_finite": True}


@dataclass(frozen=True)
class Upload:
    """A client's validated upload."""

    layout: ParameterLayout
    sent: StateDict
    state: StateDict
    """The state_dicts before and after training."""
    num_examples: int
    metrics: dict[str, float]
    site: StateDict
    """What the client reports of its data, if anything: ``image-stats``, mean and standard
    deviation of each channel or feature, ``(2, channels)``, float32; ``partition``, its id and the
    number of partitions, ``(2,)``."""
    extras: StateDict

    @cached_property
    def vector(self) -> Tensor:
        """The generated parameters after training, ``(d,)``."""
        return self.layout.split(self.state)[0]

    @cached_property
    def start(self) -> Tensor:
        """The generated parameters before training, ``(d,)``."""
        return self.layout.split(self.sent)[0]


def read_upload(
    message: Message,
    layout: ParameterLayout,
    sent: StateDict,
    weighted_by_key: str,
    extras_layout: ParameterLayout | None = None,
    *,
    may_lack_extras: bool = False,
) -> Upload:
    """Return the validated reply to a training message with the state ``sent``.

    With ``extras_layout`` there must be a second ArrayRecord `EXTRAS`, or may be with
    ``may_lack_extras``. Raises `ReplyError` if it is an error, has other records, arrays that do
    not fit ``layout``, or invalid metrics. ``image-mean``, ``image-std`` and ``partition`` may be
    missing, but not wrong.
    """
    if may_lack_extras and message.has_content() and len(message.content.array_records) == 1:
        extras_layout = None
    num_records = 1 if extras_layout is None else 2
    metrics = read_metrics(message, weighted_by_key, num_array_records=num_records)
    records = dict(message.content.array_records)
    extras: StateDict = {}
    if extras_layout is not None:
        if protocol.EXTRAS not in records:
            raise ReplyError(f'has no record "{protocol.EXTRAS}" beside that of the parameters')
        extras = _read_state(records.pop(protocol.EXTRAS), extras_layout)
    state = _read_state(next(iter(records.values())), layout)
    site = _read_site(next(iter(message.content.metric_records.values())))
    return Upload(layout, sent, state, int(metrics[weighted_by_key]), metrics, site, extras)


def read_demand(message: Message) -> str | None:
    """Return the privacy that a site demands which did not train for lack of it; else None."""
    if message.has_error() or message.content.array_records:
        return None
    for record in message.content.config_records.values():
        if protocol.BELOW_FLOOR in record:
            return one_line(str(record[protocol.BELOW_FLOOR]), _MAX_DEMAND)
    return None


def max_bytes(*layouts: ParameterLayout | None) -> int:
    """Return the limit of a reply's arrays in bytes: twice the size of ``layouts``.

    Arrays that are somewhat too large are then still named by `read_upload`.
    """
    entries = [entry for layout in layouts if layout is not None for entry in layout.sent]
    return 2 * sum(entry.numel * entry.dtype.itemsize for entry in entries) + _SPARE_BYTES


def _read_state(arrays: ArrayRecord, layout: ParameterLayout) -> StateDict:
    try:
        layout.check_names(arrays)
        state = {entry.name: _read_array(arrays[entry.name], entry) for entry in layout.sent}
        layout.check(state)
    except UnboundedError as error:
        raise NotFiniteError(one_line(str(error), 1000)) from error
    except ParameterError as error:
        raise ReplyError(one_line(str(error), 1000)) from error
    return layout.received(state)


def read_metrics(
    message: Message, weighted_by_key: str, num_array_records: int = 0
) -> dict[str, float]:
    """Return the scalars of the only MetricRecord of a reply.

    Raises `ReplyError` if it is an error, has other records, a metric that is not finite or huge,
    or no positive ``weighted_by_key``.
    """
    if message.has_error():
        what = NO_REPLY if message.error.code in _GONE else CLIENT_FAILED
        raise ReplyError(f"{what}: {one_line(str(message.error.reason))}")
    content = message.content
    found = (len(content.array_records), len(content.metric_records), len(content.config_records))
    wanted = (num_array_records, 1, 0)
    if found != wanted:
        raise ReplyError(f"has (array, metric, config) records {found} instead of {wanted}")
    metrics: dict[str, float] = {}
    for name, value in next(iter(content.metric_records.values())).items():
        if isinstance(value, list):
            continue
        if not abs(value) < (MAX_WEIGHT if name == weighted_by_key else MAX_ABSOLUTE):
            raise NotFiniteError(f'the metric "{one_line(name)}" is {value}')
        metrics[name] = value
    weight = metrics.get(weighted_by_key)
    if weight is None or weight < 1:
        raise ReplyError(f'the metric "{weighted_by_key}" is {weight}, and should be 1 or more')
    return metrics


def metric_ranges(privacy: PrivacyConfig, num_classes: int = 0) -> dict[str, tuple[float, float]]:
    """Return the smallest and the largest value of each metric of this app's own clients."""
    may_spend = privacy.epsilon if privacy.mode == "example" else 0.0
    most = (may_spend or _MAX_EPSILON) if privacy.is_on else 0.0
    shares = [protocol.ACCURACY, protocol.ACCURACY_BEFORE, protocol.ACCURACY_AFTER]
    shares += [*protocol.SCORES, *(f"{protocol.RECALL}{number}" for number in range(num_classes))]
    losses = (protocol.LOSS, protocol.LOSS_BEFORE, protocol.LOSS_AFTER)
    return {
        **dict.fromkeys(shares, (0.0, 1.0)),
        **dict.fromkeys(losses, (0.0, MAX_ABSOLUTE)),
        protocol.SECONDS: (0.0, _MAX_SECONDS),
        protocol.EPSILON: (0.0, most),
    }


def check_ranges(metrics: Mapping[str, float], ranges: Mapping[str, tuple[float, float]]) -> None:
    """Raise a `ReplyError` for a metric out of range, or the recall of a class there is not."""
    for name in metrics.keys() & ranges.keys():
        low, high = ranges[name]
        if not low <= metrics[name] <= high:
            raise ReplyError(
                f'the metric "{name}" is {metrics[name]:g}, and should be between {low:g} and '
                f"{high:g}"
            )
    if ranges:
        for name in metrics.keys() - ranges.keys():
            if name.startswith(protocol.RECALL):
                raise ReplyError(f'the metric "{one_line(name)}" is of a class that there is not')


def one_line(text: str, length: int = 300) -> str:
    """Return a client's text as one printable line of limited length."""
    beginning = text[: 10 * length]  # the text may be of any length
    printable = "".join(letter if letter.isprintable() else " " for letter in beginning)
    return " ".join(printable.split())[:length]


def _read_site(record: MetricRecord) -> StateDict:
    site = {}
    match record.get(protocol.IMAGE_MEAN), record.get(protocol.IMAGE_STD):
        case None, None:
            pass
        case [*mean], [*std] if 1 <= len(mean) == len(std) <= _MAX_CHANNELS:
            site["image-stats"] = stats = torch.tensor([[*map(float, mean)], [*map(float, std)]])
            if not is_bounded(stats) or not bool((stats[1] > 0).all()):
                raise ReplyError(
                    'the metrics "image-mean" and "image-std" should be finite numbers, the latter '
                    "above 0"
                )
        case _:
            raise ReplyError(
                'the metrics "image-mean" and "image-std" should be lists of one number per '
                f"channel or feature, of 1 to {_MAX_CHANNELS}"
            )
    match record.get(protocol.PARTITION):
        case None:
            pass
        case [int(number), int(total)] if 0 <= number < total <= MAX_PARTITIONS:
            site["partition"] = torch.tensor([number, total])
        case _:
            raise ReplyError('the metric "partition" should be [partition-id, num-partitions]')
    return site


def _read_array(array: Array, entry: Entry) -> Tensor:
    """Deserialize an array if its header has the shape and dtype of ``entry``."""
    expected = torch.empty(0, dtype=entry.dtype).numpy().dtype
    num_bytes = entry.numel * expected.itemsize
    if not num_bytes <= len(array.data) <= num_bytes + MAX_HEADER_BYTES:
        raise ParameterError(
            f"{entry.name} has {len(array.data)} bytes, and should have about {num_bytes}"
        )
    try:
        shape, dtype = read_header(array.data)
        matches = shape == entry.shape and dtype == expected
        tensor = torch.from_numpy(array.numpy()) if matches else None
    except Exception as error:  # the header's parser may raise anything
        raise ParameterError(f"{entry.name} cannot be read: {one_line(str(error))}") from error
    if tensor is None:
        raise ParameterError(f"{entry.name} is {dtype} {shape} instead of {expected} {entry.shape}")
    return tensor
