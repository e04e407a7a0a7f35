"""The data of one client."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from pfedgpa_app.config import PARTITIONS, DataConfig, DatasetInfo
from pfedgpa_app.data.cache import Indices, SplitFile, counted
from pfedgpa_app.data.dataset import DataError, Dataset
from pfedgpa_app.data.partitions import partition
from pfedgpa_app.data.shifts import shifted
from pfedgpa_app.data.sources import ImageStats, image_stats, load_dataset


class ClientData(NamedTuple):
    """The training and test set of one client, before `normalize`."""

    train_inputs: Tensor
    """``(n, *shape)``, with a dtype of `Dataset`."""
    train_labels: Tensor
    """``(n,)``, int64."""
    test_inputs: Tensor
    test_labels: Tensor
    stats: ImageStats
    info: DatasetInfo

    def to(self, device: torch.device) -> "ClientData":
        """Return the data on a device."""
        return self._replace(
            train_inputs=self.train_inputs.to(device),
            train_labels=self.train_labels.to(device),
            test_inputs=self.test_inputs.to(device),
            test_labels=self.test_labels.to(device),
        )


def client_data(
    config: DataConfig, seed: int, partition_id: int, num_partitions: int
) -> ClientData:
    """Return the data of client ``partition_id`` of ``num_partitions``.

    A process loads and partitions a data set once for all its clients. Raises `DataError` if there
    is no such client, or the data set cannot be loaded or partitioned.
    """
    if not 0 <= partition_id < num_partitions:
        raise DataError(
            f"partition-id = {partition_id} with num-partitions = {num_partitions}: "
            f"the clients are numbered from 0 to num-partitions - 1"
        )
    dataset, stats, indices = _partitioned(config, seed, num_partitions)
    train_inputs, train_labels, test_inputs, test_labels = (
        each.contiguous()
        for rows in indices[partition_id]
        for each in shifted(config, seed, partition_id, dataset.images[rows], dataset.labels[rows])
    )
    return ClientData(train_inputs, train_labels, test_inputs, test_labels, stats, config.info)


def class_counts(config: DataConfig, seed: int, num_partitions: int) -> Tensor | None:
    """Return the clients' training examples of each class, ``(num_partitions, num_classes)``.

    They are counted after any label shift. Nothing is downloaded and no own function is called;
    None if the partition is neither cached nor of an embedded data set. Raises `DataError` if the
    data set cannot be partitioned.
    """
    if config.dataset == "digits" and config.partition in PARTITIONS:
        dataset, _, indices = _partitioned(config, seed, num_partitions)
        counts: Tensor | None = counted(dataset, indices)
    else:
        kept = SplitFile(config, seed, num_partitions).read()
        counts = None if kept is None else kept[2]
    if counts is None or config.shift != "permuted-labels":
        return counts
    labels, nothing = torch.arange(counts.shape[1]), torch.empty(0)
    permuted = torch.empty_like(counts)
    for client in range(num_partitions):
        permuted[client, shifted(config, seed, client, nothing, labels)[1]] = counts[client]
    return permuted


@lru_cache(maxsize=1)  # more than one data set may not fit into memory
def _partitioned(
    config: DataConfig, seed: int, num_partitions: int
) -> tuple[Dataset, ImageStats, Indices]:
    file = SplitFile(config, seed, num_partitions)
    kept = file.read()
    if kept is not None:
        small, indices, _ = kept
        dataset = load_dataset(config, seed) if small is None else small
        return dataset, image_stats(dataset), indices
    dataset = load_dataset(config, seed)
    parts = partition(dataset.labels, dataset.is_test, config, num_partitions, seed, dataset.owners)
    indices = [(part.train, part.test) for part in parts]
    file.write(dataset, indices)
    return dataset, image_stats(dataset), indices
