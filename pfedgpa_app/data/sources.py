"""The data sets: all examples and labels of one, and which of them are only for testing."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from pfedgpa_app.arrays import LEVELS, PIECE, ArrayError, alike, as_examples, as_labels
from pfedgpa_app.config import DATASETS, SITES, DataConfig, DatasetInfo, by_x
from pfedgpa_app.errors import described
from pfedgpa_app.own_functions import own_function
from pfedgpa_app.randomness import initialized_by, make_generator

# Where Debian's package dataset-fashion-mnist puts the original files.
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

Part = tuple[Tensor, Tensor]


class DataError(ValueError):
    """Data that clients cannot work with; the message says what would be right."""


class Dataset(NamedTuple):
    """A data set in memory, the pools for training and for testing in one."""

    images: Tensor
    """The examples, ``(n, *shape)``: images are ``(n, channels, height, width)``, uint8 but for
    float32, or `LEVELS` of 16 bits, of an own data set; tables are ``(n, features)``."""
    labels: Tensor
    """``(n,)``, int64."""
    is_test: Tensor
    """``(n,)``, bool: the samples that test sets are drawn from, and training sets never."""


class ImageStats(NamedTuple):
    """Mean and standard deviation of each channel, ``(channels,)``, in units of the images.

    Those of 16 bits are in levels of 8 bits too. Of a table, those of each feature.
    """

    mean: Tensor
    std: Tensor


def load_dataset(config: DataConfig, seed: int) -> Dataset:
    """Load the data set of the settings; `client_data` does it once a process.

    The test pool is the official test set. What scikit-learn has and own data sets have none: there
    it is ``test_fraction`` of each class, drawn by the seed.

    Raises
    ------
    DataError
        If the data set cannot be had, or is not what its settings say.
    """
    name = config.dataset
    if name == SITES:
        raise DataError(
            f'data.dataset = "{SITES}": every site brings its own data; right would be a SuperNode '
            """started with, for example, --node-config 'data-path="/srv/scans"'"""
        )
    if name in _EMBEDDED:
        parts = [_EMBEDDED[name]()]
    elif name in DATASETS:
        parts = _torchvision(name, config.root_path)
    else:
        parts = [_own(config, seed)]
    return assemble(parts, config, seed, name)


def assemble(parts: list[Part], config: DataConfig, seed: int, name: str) -> Dataset:
    """Return a data set of a training and a test part, or of one that is split by the seed.

    Raises
    ------
    DataError
        If a part, of the data called ``name``, is not what the settings say.
    """
    for images, labels in parts:
        _check(images, labels, config.info, name)
    if len(parts) == 1:  # which may be too large for a second copy
        images, labels = parts[0][0], parts[0][1].long()
    else:
        images = torch.cat(alike([images for images, _ in parts]))
        labels = torch.cat([labels for _, labels in parts]).long()
    if len(parts) == 2:
        return Dataset(images, labels, torch.arange(len(labels)) >= len(parts[0][1]))
    return Dataset(images, labels, _stratified(labels, config.test_fraction, seed, name))


def image_stats(dataset: Dataset) -> ImageStats:
    """Compute what `normalize` needs, from the training pool.

    A table's features each have a unit of their own, so that float tables are normalized like those
    of bytes, feature by feature. Other floats count as normalized already: mean 0, standard
    deviation 1.
    """
    if dataset.images.ndim == 2:
        return _feature_stats(dataset.images[~dataset.is_test])
    channels = dataset.images.shape[1]
    if dataset.images.is_floating_point():
        return ImageStats(torch.zeros(channels), torch.ones(channels))
    # Counting the values is exact and needs no float copy of the images.
    num_levels, unit = (2**16, 257) if dataset.images.dtype == LEVELS else (2**8, 1)
    counts = torch.zeros(channels, num_levels, dtype=torch.float64)
    for chunk in (~dataset.is_test).nonzero().squeeze(1).split(10_000):
        for channel in range(channels):
            pixels = dataset.images[chunk, channel].flatten()
            counts[channel] += torch.bincount(pixels, minlength=num_levels)
    shares = counts / counts.sum(1, keepdim=True)
    values = torch.arange(num_levels, dtype=torch.float64) / unit
    mean = shares @ values
    std = (shares * (values - mean[:, None]) ** 2).sum(1).sqrt()
    # A channel without any contrast stays as it is, instead of becoming 0 / 0.
    return ImageStats(mean.float(), torch.where(std > 0, std, 1.0).float())


def _feature_stats(table: Tensor) -> ImageStats:
    """Return the statistics of a table's features, ``(n, features)``; constant ones become 0."""
    blocks = [  # a copy of a wide table in float64 would be large
        _feature_block(block.double()) for block in table.split(max(1, PIECE // len(table)), dim=1)
    ]
    mean, std = (torch.cat(each) for each in zip(*blocks, strict=True))
    return ImageStats(mean, std)


def _feature_block(values: Tensor) -> tuple[Tensor, Tensor]:
    # Rounding leaves equal values a deviation just above 0, by which others must not be divided.
    is_constant = values.amax(0) == values.amin(0)
    std = torch.where(is_constant, 1.0, values.std(0, correction=0)).float()
    # The smallest numbers that there are may have a deviation that is none in float32.
    return values.mean(0).float(), torch.where(std > 0, std, 1.0)


def normalize(images: Tensor, stats: ImageStats) -> Tensor:
    """Return examples ``(n, *shape)`` as float32 of zero mean and unit variance.

    The statistics are those of the first dimension of the shape: channels, or a table's features.
    """
    each = (-1, *(1,) * (images.ndim - 2))
    mean, std = (values.to(images.device).view(each) for values in stats)
    values = images.float() / 257 if images.dtype == LEVELS else images.float()
    return (values - mean) / std


def _digits() -> Part:
    from sklearn.datasets import load_digits  # only where it is needed: it takes a second

    digits = load_digits()
    images = torch.from_numpy(np.round(digits.images * (255 / 16)).astype(np.uint8))
    return images[:, None], torch.from_numpy(digits.target)


def _breast_cancer() -> Part:
    from sklearn.datasets import load_breast_cancer

    table = load_breast_cancer()
    return torch.from_numpy(table.data.astype(np.float32)), torch.from_numpy(table.target)


# What scikit-learn brings along.
_EMBEDDED = {"digits": _digits, "breast-cancer": _breast_cancer}


def _torchvision(name: str, root: Path) -> list[Part]:
    """Return the training and the test part of a data set of torchvision's."""
    from torchvision import datasets  # only where it is needed: it takes seconds

    readers: dict[str, Callable[..., Any]] = {
        "fashion-mnist": datasets.FashionMNIST,
        "emnist-balanced": partial(datasets.EMNIST, split="balanced"),
        "emnist-byclass": partial(datasets.EMNIST, split="byclass"),
        "cifar10": datasets.CIFAR10,
    }
    try:
        if name == "fashion-mnist" and DEBIAN_FASHION_MNIST.is_dir() and not _has_fashion(root):
            sets = _debian_fashion_mnist()
        else:
            sets = _read_or_download(readers[name], root)
    except Exception as error:  # torchvision, urllib and the archives each raise their own
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(
            f"{name}: neither readable in {root} nor downloaded ({cause}). Start once with a "
            f"network connection, or set data.root to a folder where torchvision finds it"
        ) from error
    return [(_upright(torch.as_tensor(s.data), name), torch.as_tensor(s.targets)) for s in sets]


def _read_or_download(reader: Callable[..., Any], root: Path) -> list[Any]:
    root.mkdir(parents=True, exist_ok=True)
    # Several processes start at once, and none may read what another is still unpacking. Where
    # nothing can be written, nothing is being unpacked.
    lock = FileLock(root / ".lock") if os.access(root, os.W_OK) else nullcontext()
    with lock:
        return [reader(root, train=train, download=True) for train in (True, False)]


def _has_fashion(root: Path) -> bool:
    from torchvision.datasets import FashionMNIST

    raw = root / "FashionMNIST" / "raw"
    return all((raw / Path(name).stem).is_file() for name, _ in FashionMNIST.resources)


def _debian_fashion_mnist() -> list[Any]:
    """Read Debian's files, which are packed, with torchvision's reader, which wants them bare."""
    from torchvision.datasets import FashionMNIST
    from torchvision.datasets.utils import extract_archive

    with TemporaryDirectory() as root:
        raw = Path(root) / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        for name, _ in FashionMNIST.resources:
            extract_archive(DEBIAN_FASHION_MNIST / name, raw)
        return [FashionMNIST(root, train=train) for train in (True, False)]


def _upright(images: Tensor, name: str) -> Tensor:
    """Bring torchvision's raw images into the order channels, height, width."""
    if name == "cifar10":
        return images.permute(0, 3, 1, 2)
    if name.startswith("emnist"):  # its files hold every image column by column
        images = images.transpose(1, 2)
    return images[:, None]


def _own(config: DataConfig, seed: int) -> Part:
    """Call ``package.module:function`` with the folder of the data sets.

    Global generators follow the seed meanwhile.
    """
    name = config.dataset
    try:
        function = own_function(name)
    except (ImportError, AttributeError) as error:
        raise DataError(
            f"{name}: cannot be imported ({error}). data.dataset names a function as "
            '"package.module:function", of a module that is there where the clients run'
        ) from error
    except Exception as error:  # code of the user's raises whatever it likes
        raise DataError(f"{name}: importing it failed with {described(error)}") from error
    try:
        # Every client calls it, and what it draws must be the same for all of them.
        with initialized_by(make_generator(seed, "dataset")):
            pair = function(config.root_path)
    except Exception as error:
        raise DataError(f"{name}: failed with {described(error)}") from error
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise DataError(f"{name}: returns {type(pair).__name__}, right would be (examples, labels)")
    what = "examples"
    try:
        examples = as_examples(pair[0], config.info.shape, to_train=True)
        what = "labels"
        return examples, as_labels(pair[1])
    except ArrayError as error:
        raise DataError(f"{name}: {what} are {error}") from error


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


def _stratified(labels: Tensor, fraction: float, seed: int, name: str) -> Tensor:
    """Mark ``fraction`` of each class, but never all of it nor none of it."""
    rng = np.random.default_rng(seed)
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        if len(members) < 2:
            raise DataError(
                f"{name}: class {int(label)} has one sample, right would be two or more, "
                f"so that there is one to train and one to test with"
            )
        size = min(max(1, round(fraction * len(members))), len(members) - 1)
        is_test[members[torch.from_numpy(rng.permutation(len(members))[:size])]] = True
    return is_test
