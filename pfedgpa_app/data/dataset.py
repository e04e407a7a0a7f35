"""A data set in memory, checked against the settings."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pfedgpa_app.arrays import common_dtype
from pfedgpa_app.config import DataConfig, DatasetInfo, by_x


class DataError(ValueError):
    """Unusable data; the message says what would be right."""


class Part(NamedTuple):
    """Examples as loaded: a whole data set, or its training or test set."""

    images: Tensor
    labels: Tensor
    owners: NDArray[Any] | None = None
    """The owner of each example, ``(n,)``, integers or strings; None if unknown."""
    is_test: Tensor | None = None
    """Mask of the test examples, ``(n,)``, bool; None without a test split."""


class Dataset(NamedTuple):
    """A data set in memory, training and test pool in one."""

    images: Tensor
    """``(n, *shape)``: images ``(n, channels, height, width)``, uint8, or for own data sets also
    float32 or 16-bit `LEVELS`; tables ``(n, features)``."""
    labels: Tensor
    """``(n,)``, int64."""
    is_test: Tensor
    """``(n,)``, bool: the test pool; the others are the training pool."""
    owners: Tensor | None = None
    """``(n,)``, int64: the owner of each example, numbered from 0 by sorted id; None if unknown."""


def assemble(parts: Sequence[Part], config: DataConfig, seed: int, name: str) -> Dataset:
    """Return the data set of a training and a test part, or of a single part.

    A single part without a test split gets one: ``test_fraction`` of each class, or of each owner
    with the partition ``natural``, drawn by the seed. Raises `DataError` if a part does not match
    the settings; the message begins with ``name``.
    """
    for part in parts:
        _check(part.images, part.labels, config.info, name)
    if len(parts) == 2:
        images = torch.cat(common_dtype([part.images for part in parts]))
        labels = torch.cat([part.labels for part in parts]).long()
        return Dataset(images, labels, torch.arange(len(labels)) >= len(parts[0].labels))
    (part,) = parts  # not copied: it may be large
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
        raise DataError(f"{name}: has no examples")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= info.num_classes:
        raise DataError(
            f"{name}: labels go from {low} to {high}, right would be 0 to {info.num_classes - 1}"
        )


def _check_owners(owners: Tensor, is_test: Tensor, name: str, names: Sequence[str]) -> None:
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
    """Mark ``fraction`` of each class or owner for testing, at least one but not all."""
    rng = np.random.default_rng(seed)
    is_test = torch.zeros(len(groups), dtype=torch.bool)
    for group in groups.unique():
        members = (groups == group).nonzero().squeeze(1)
        if len(members) < 2:
            raise DataError(
                f"{name}: {names[int(group)]} has one example, right would be two or more, "
                f"one for training and one for testing"
            )
        size = min(max(1, round(fraction * len(members))), len(members) - 1)
        is_test[members[torch.from_numpy(rng.permutation(len(members))[:size])]] = True
    return is_test
