"""Loading and normalization of data sets."""

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

from pfedgpa_app.arrays import LEVELS, PIECE
from pfedgpa_app.config import DATASETS, SITES, DataConfig
from pfedgpa_app.data.dataset import DataError, Dataset, Part, assemble
from pfedgpa_app.data.flights import load_flights
from pfedgpa_app.data.own import load_part
from pfedgpa_app.data.smartwatch import load_windows

# The original files in Debian's package dataset-fashion-mnist.
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


class ImageStats(NamedTuple):
    """Mean and standard deviation of each channel, ``(channels,)``, or of each feature of a table.

    They have the unit of the examples; for 16-bit images, that of 8 bits.
    """

    mean: Tensor
    std: Tensor


def load_dataset(config: DataConfig, seed: int) -> Dataset:
    """Load the data set of the settings.

    The test pool is the official test set, or the data set's own split, or drawn by `assemble`.
    Raises `DataError` if the data set cannot be loaded, or does not match its settings.
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
        parts = [load_part(config, seed)]
    dataset = assemble(parts, config, seed, name)
    if config.partition == "natural" and dataset.owners is None:
        raise DataError(
            f'{name}: data.partition = "natural", and the examples have no owners; right '
            "would be (examples, labels, owners), or another data.partition"
        )
    return dataset


def image_stats(dataset: Dataset) -> ImageStats:
    """Compute the statistics of the training pool for `normalize`.

    Tables are always normalized, feature by feature. Other float data counts as normalized: mean 0,
    standard deviation 1.
    """
    if dataset.images.ndim == 2:
        return _feature_stats(dataset.images[~dataset.is_test])
    channels = dataset.images.shape[1]
    if dataset.images.is_floating_point():
        return ImageStats(torch.zeros(channels), torch.ones(channels))
    # Histograms are exact and need no float copy of the images.
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
    # A constant channel is not scaled: no 0 / 0.
    return ImageStats(mean.float(), torch.where(std > 0, std, 1.0).float())


def _feature_stats(table: Tensor) -> ImageStats:
    """Return the statistics of a table's features, ``(n, features)``; constant ones become 0."""
    means, deviations = [], []
    # By blocks, since a float64 copy of the table would be large.
    for block in table.split(max(1, PIECE // len(table)), dim=1):
        values = block.double()
        # By rounding, the deviation of equal values may be just above 0; that of very small numbers
        # may underflow in float32.
        is_constant = values.amax(0) == values.amin(0)
        std = torch.where(is_constant, 1.0, values.std(0, correction=0)).float()
        means.append(values.mean(0).float())
        deviations.append(torch.where(std > 0, std, 1.0))
    return ImageStats(torch.cat(means), torch.cat(deviations))


def normalize(images: Tensor, stats: ImageStats) -> Tensor:
    """Return standardized examples ``(n, *shape)``, float32.

    ``stats`` are per channel, or per feature of a table.
    """
    each = (-1, *(1,) * (images.ndim - 2))
    mean, std = (values.to(images.device).view(each) for values in stats)
    values = images.float() / 257 if images.dtype == LEVELS else images.float()
    return (values - mean) / std


def _digits() -> Part:
    from sklearn.datasets import load_digits  # imported here: it takes a second

    digits = load_digits()
    images = torch.from_numpy(np.round(digits.images * (255 / 16)).astype(np.uint8))
    return Part(images[:, None], torch.from_numpy(digits.target))


def _breast_cancer() -> Part:
    from sklearn.datasets import load_breast_cancer

    table = load_breast_cancer()
    return Part(torch.from_numpy(table.data.astype(np.float32)), torch.from_numpy(table.target))


# Contained in packages.
_EMBEDDED = {
    "digits": _digits,
    "breast-cancer": _breast_cancer,
    "watch": load_windows,
    "flights": load_flights,
}


def _torchvision(name: str, root: Path) -> list[Part]:
    from torchvision import datasets  # imported here: it takes seconds

    readers: dict[str, Callable[..., Any]] = {
        "fashion-mnist": datasets.FashionMNIST,
        "emnist-balanced": partial(datasets.EMNIST, split="balanced"),
        "emnist-byclass": partial(datasets.EMNIST, split="byclass"),
        "cifar10": datasets.CIFAR10,
    }
    try:
        if name == "fashion-mnist" and not _has_fashion(root) and DEBIAN_FASHION_MNIST.is_dir():
            sets = _debian_fashion_mnist()
        else:
            root.mkdir(parents=True, exist_ok=True)
            # Locked, so that no process reads what another is unpacking. A read-only folder needs
            # no lock.
            with FileLock(root / ".lock") if os.access(root, os.W_OK) else nullcontext():
                sets = [readers[name](root, train=each, download=True) for each in (True, False)]
    except Exception as error:  # torchvision, urllib and archives have no common base
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(
            f"{name}: neither readable in {root} nor downloaded ({cause}). Start once with a "
            f"network connection, or set data.root to a folder where torchvision finds it"
        ) from error
    return [Part(_upright(torch.as_tensor(s.data), name), torch.as_tensor(s.targets)) for s in sets]


def _has_fashion(root: Path) -> bool:
    from torchvision.datasets import FashionMNIST

    raw = root / "FashionMNIST" / "raw"
    return all((raw / Path(name).stem).is_file() for name, _ in FashionMNIST.resources)


def _debian_fashion_mnist() -> list[Any]:
    """Unpack Debian's files for torchvision's reader, and read them."""
    from torchvision.datasets import FashionMNIST
    from torchvision.datasets.utils import extract_archive

    with TemporaryDirectory() as root:
        raw = Path(root) / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        for name, _ in FashionMNIST.resources:
            extract_archive(DEBIAN_FASHION_MNIST / name, raw)
        return [FashionMNIST(root, train=train) for train in (True, False)]


def _upright(images: Tensor, name: str) -> Tensor:
    """Return torchvision's raw images as ``(n, channels, height, width)``."""
    if name == "cifar10":
        return images.permute(0, 3, 1, 2)
    if name.startswith("emnist"):  # its files are column-major
        images = images.transpose(1, 2)
    return images[:, None]
