"""A data set in memory, made of what was read and checked against the settings."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pfedgpa_app.arrays import alike
from pfedgpa_app.config import DataConfig, DatasetInfo, by_x


class DataError(ValueError):
    """Data that clients cannot work with; the message says what would be right."""


class Part(NamedTuple):
    """Examples as they were read: a whole data set, or its training or its test set."""

    images: Tensor
    labels: Tensor
    owners: NDArray[Any] | None = None
    """Who made each example, ``(n,)``, integers or strings; None where it is not known."""
    is_test: Tensor | None = None
    """The examples for testing, ``(n,)``, bool; None where nothing is set apart."""


class Dataset(NamedTuple):
    """A data set in memory, the pools for training and for testing in one."""

    images: Tensor
    """The examples, ``(n, *shape)``: images are ``(n, channels, height, width)``, uint8 but for
    float32, or `LEVELS` of 16 bits, of an own data set; tables are ``(n, features)``."""
    labels: Tensor
    """``(n,)``, int64."""
    is_test: Tensor
    """``(n,)``, bool: the samples that test sets are drawn from, and training sets never."""
    owners: Tensor | None = None
    """``(n,)``, int64: who made each example, from 0 on in the order of their sorted ids; None
    where it is not known."""


def assemble(parts: Sequence[Part], config: DataConfig, seed: int, name: str) -> Dataset:
    """Return a data set of a training and a test part, or of one that is split by the seed.

    Where nothing is set apart for testing, ``test_fraction`` of each class is, drawn by the seed;
    with the partition ``natural``, of each owner, if they are known.

    Raises
    ------
    DataError
        If a part, of the data called ``name``, is not what the settings say.
    """
    for part in parts:
        _check(part.images, part.labels, config.info, name)
    if len(parts) == 2:
        images = torch.cat(alike([part.images for part in parts]))
        labels = torch.cat([part.labels for part in parts]).long()
        return Dataset(images, labels, torch.arange(len(labels)) >= len(parts[0].labels))
    (part,) = parts  # which may be too large for a second copy
    labels, is_test = part.labels.long(), part.is_test
    owners, groups = None, labels
    names = [f"class {label}" for label in range(config.info.num_classes)]
    if part.owners is not None:
        ids, numbers = np.unique(part.owners, return_inverse=True)
        owners = torch.from_numpy(numbers.astype(np.int64))
        if config.partition == "natural":
            groups, names = owners, [f"owner {each!r}" for each in ids.tolist()]
    if is_test is None:
        is_test = _held_out(groups, config.test_fraction, seed, name, names)
    elif groups is owners:
        _check_owners(groups, is_test, name, names)
    elif bool(is_test.all()) or not bool(is_test.any()):
        raise DataError(
            f"{name}: {int(is_test.sum())} of {len(is_test)} examples are for testing; right would "
            "be some for training and some for testing"
        )
    return Dataset(part.images, labels, is_test, owners)


def _check(images: Tensor, labels: Tensor, info: DatasetInfo, name: str) -> None:
    """Raise a `DataError` unless these have that shape and labels of those classes."""
    if tuple(images.shape[1:]) != info.shape:
        raise DataError(
            f"{name}: examples are {by_x(images.shape)}, right would be nx{by_x(info.shape)}"
        )
    if labels.ndim != 1 or len(labels) != len(images):
        raise DataError(
            f"{name}: {len(images)} examples and labels of shape {tuple(labels.shape)}, "
            f"right would be ({len(images)},)"
        )
    if len(images) == 0:
        raise DataError(f"{name}: there is no sample in it")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= info.num_classes:
        raise DataError(
            f"{name}: labels go from {low} to {high}, right would be 0 to {info.num_classes - 1}"
        )


def _check_owners(owners: Tensor, is_test: Tensor, name: str, names: Sequence[str]) -> None:
    """Raise a `DataError` unless every owner has something to train and to test with."""
    for examples, purpose in ((~is_test, "training"), (is_test, "testing")):
        counts = owners[examples].bincount(minlength=len(names))
        if missing := [names[number] for number in (counts == 0).nonzero().flatten().tolist()]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            verb = "have" if more else "has"
            raise DataError(
                f"{name}: {missing[0]}{more} {verb} no example for {purpose}; right would be "
                "one or more of every owner, or to leave those owners out"
            )


def _held_out(
    groups: Tensor, fraction: float, seed: int, name: str, names: Sequence[str]
) -> Tensor:
    """Mark ``fraction`` of each class or owner for testing, but never all of it nor none of it."""
    rng = np.random.default_rng(seed)
    is_test = torch.zeros(len(groups), dtype=torch.bool)
    for group in groups.unique():
        members = (groups == group).nonzero().squeeze(1)
        if len(members) < 2:
            raise DataError(
                f"{name}: {names[int(group)]} has one sample, right would be two or more, "
                f"so that there is one to train and one to test with"
            )
        size = min(max(1, round(fraction * len(members))), len(members) - 1)
        is_test[members[torch.from_numpy(rng.permutation(len(members))[:size])]] = True
    return is_test
