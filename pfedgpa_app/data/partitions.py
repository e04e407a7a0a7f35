"""Partitions of a data set among clients.

The training pool is partitioned by a partitioner of flwr-datasets: Flower's own for ``dirichlet``,
``pathological`` and ``iid``, one of this module for ``dominant-classes`` and ``disjoint``; or by an
own function. Test sets follow the class distributions of the training sets. With ``natural`` every
owner is a client.
"""

import warnings
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from datasets.arrow_dataset import Dataset
from flwr_datasets.partitioner import (
    DirichletPartitioner,
    IidPartitioner,
    Partitioner,
    PathologicalPartitioner,
)
from numpy.typing import NDArray
from torch import Tensor

from pfedgpa_app.config import PARTITIONS, DataConfig
from pfedgpa_app.data.dataset import DataError
from pfedgpa_app.data.own import own_shares
from pfedgpa_app.data_section import ByClass

Indices = NDArray[np.int64]

# The Dirichlet distribution is redrawn while a client has fewer.
MIN_DIRICHLET_SAMPLES = 10

REMEDIES = {
    "dominant-classes": "fewer clients (data.partition = dominant-classes)",
    "dirichlet": "a larger data.dirichlet-alpha or fewer clients",
    "pathological": "fewer clients or a smaller data.classes-per-client",
    "disjoint": "fewer clients (data.partition = disjoint)",
    "iid": "fewer clients (data.partition = iid)",
}


class ClientIndices(NamedTuple):
    """The examples of one client, as ascending int64 indices into the data set."""

    train: Tensor
    test: Tensor


def partition(
    labels: Tensor,
    is_test: Tensor,
    config: DataConfig,
    num_clients: int,
    seed: int,
    owners: Tensor | None = None,
) -> list[ClientIndices]:
    """Partition a data set; the same arguments give the same partition in every process.

    Training sets come from the pool ``~is_test`` and have at most ``train_samples`` each (0: no
    limit). Test sets come from the pool ``is_test``, so no client trains on another's test
    examples. A test set has the class distribution of its client's training set, but for the
    fraction ``test_uniform_fraction``, which is uniform over all classes. With ``test_samples`` = 0
    it is as large as possible without sharing test examples, except by rounding and the uniform
    fraction; with ``test_samples`` > 0 it has that size, and clients may share.

    With ``natural``, client i has the examples of owner i, at most ``train_samples`` and
    ``test_samples``, drawn by the seed. Owners beyond the number of clients are left out.

    Parameters
    ----------
    labels : Tensor
        ``(n,)``, int64.
    is_test : Tensor
        Mask of the test pool, ``(n,)``, bool.
    owners : Tensor | None
        The owner of each example, ``(n,)``, int64, from 0; for ``natural`` alone.

    Raises
    ------
    DataError
        If a client would have no training or test examples, or needs more test examples of a class
        than there are.
    """
    classes, in_test_pool = labels.numpy(), is_test.numpy()
    if config.partition == "natural":
        return _natural(in_test_pool, owners, config, num_clients, seed)
    train_pool = _shuffled(np.flatnonzero(~in_test_pool), seed, stream=1)
    test_pool = _shuffled(np.flatnonzero(in_test_pool), seed, stream=2)
    if not 1 <= num_clients <= len(train_pool):
        raise DataError(
            f"{num_clients} clients cannot share {len(train_pool)} training examples, "
            f"right would be 1 to {len(train_pool)} clients"
        )
    if config.partition in PARTITIONS:
        shares = _shares(train_pool, classes, config, num_clients, seed)
    else:
        pool = np.sort(train_pool)
        shares = [
            _drawn(pool[share], 0, seed, client)
            for client, share in enumerate(
                own_shares(config.partition, classes[pool], num_clients, seed)
            )
        ]
    # Shares are shuffled, so that a prefix is a random subset.
    train = [np.sort(share[: config.train_samples or None]) for share in shares]
    for client, share in enumerate(train):
        if len(share) == 0:
            raise DataError(
                f"client {client} of {num_clients} has no training examples; "
                f"what would help: {REMEDIES[config.partition]}"
            )
    num_classes = config.info.num_classes
    held = np.stack([np.bincount(classes[share], minlength=num_classes) for share in train])
    pools = _by_class(test_pool, classes, num_classes)
    available = np.array([len(pool) for pool in pools])
    test = _deal(
        pools, _test_counts(held, available, config.test_samples, config.test_uniform_fraction)
    )
    return [
        ClientIndices(torch.from_numpy(mine), torch.from_numpy(np.sort(theirs)))
        for mine, theirs in zip(train, test, strict=True)
    ]


def _shares(
    train_pool: Indices, classes: Indices, config: DataConfig, num_clients: int, seed: int
) -> list[Indices]:
    """Return the shuffled training indices of each client."""
    partitioner = _partitioner(config, num_clients, seed)
    partitioner.dataset = _Table.of(train_pool, classes[train_pool])
    try:
        with warnings.catch_warnings():  # they are about arguments that this app does not expose
            warnings.simplefilter("ignore")
            return [
                np.asarray(partitioner.load_partition(client)["index"][:], dtype=np.int64)
                for client in range(num_clients)
            ]
    except DataError:
        raise
    except ValueError as error:
        raise DataError(
            f"data.partition = {config.partition} fails for {num_clients} clients: {error} "
            f"What would help: {REMEDIES[config.partition]}"
        ) from error


def _natural(
    in_test_pool: NDArray[np.bool_],
    owners: Tensor | None,
    config: DataConfig,
    num_clients: int,
    seed: int,
) -> list[ClientIndices]:
    """Return the examples of the first owners; `assemble` has checked that each has some."""
    assert owners is not None  # `load_dataset` refuses data sets without owners
    num_owners = int(owners.max()) + 1
    if not 1 <= num_clients <= num_owners:
        raise DataError(
            f"data.partition = natural: {num_clients} clients, and {num_owners} owners; "
            f"right would be 1 to {num_owners} clients"
        )
    clients = []
    for client in range(num_clients):
        mine = owners.numpy() == client
        train, test = (
            torch.from_numpy(np.sort(_drawn(np.flatnonzero(pool & mine), limit, seed, client)))
            for pool, limit in (
                (~in_test_pool, config.train_samples),
                (in_test_pool, config.test_samples),
            )
        )
        clients.append(ClientIndices(train, test))
    return clients


def _drawn(samples: Indices, limit: int, seed: int, client: int) -> Indices:
    """Return at most ``limit`` of a client's indices (0: all), shuffled."""
    rng = np.random.default_rng([4, seed, client])
    return rng.permutation(samples)[: limit or None]


class _PlannedPartitioner(Partitioner):
    """A partitioner that assigns all rows of its table in one call."""

    def __init__(self, num_partitions: int) -> None:
        super().__init__()
        self._num_partitions = num_partitions

    @property
    def num_partitions(self) -> int:
        """Number of clients."""
        return self._num_partitions

    def load_partition(self, partition_id: int) -> Dataset:
        """Return the rows of one client."""
        rows: Dataset = self.dataset.select(self._plan[partition_id])
        return rows

    @cached_property
    def _plan(self) -> list[Indices]:
        return self._assign(np.asarray(self.dataset["label"][:], dtype=np.int64))

    @abstractmethod
    def _assign(self, labels: Indices) -> list[Indices]:
        """Return the rows of each client, given the label of each row."""


class DominantClassesPartitioner(_PlannedPartitioner):
    """Groups of clients with dominant classes, the protocol of FedPAC (arXiv 2306.11867).

    Every client has the same number of examples. The fraction ``uniform_fraction`` is uniform over
    all classes, the rest uniform over the dominant classes of the client's group. Client i is in
    group ``i % num_groups``; group g has ``dominant_classes`` consecutive classes from
    ``g * num_classes // num_groups`` on, modulo ``num_classes``.

    Clients take the examples of a class in the order of the table, starting over at its end, so
    that clients may share examples. No client has an example twice.

    Parameters
    ----------
    num_samples : int
        Examples of each client; 0 = the size of the table divided by the number of clients, or
        less if a class has too few.
    """

    def __init__(
        self,
        num_partitions: int,
        num_classes: int,
        num_samples: int,
        num_groups: int,
        dominant_classes: int,
        uniform_fraction: float,
    ) -> None:
        super().__init__(num_partitions)
        groups = np.arange(num_partitions) % num_groups
        first = groups * num_classes // num_groups
        dominant = (first[:, None] + np.arange(dominant_classes)) % num_classes
        self._num_samples = num_samples
        # Row i: the class distribution of client i, (num_partitions, num_classes).
        self._shares = np.full((num_partitions, num_classes), uniform_fraction / num_classes)
        np.put_along_axis(
            self._shares,
            dominant,
            uniform_fraction / num_classes + (1 - uniform_fraction) / dominant_classes,
            axis=1,
        )

    def _assign(self, labels: Indices) -> list[Indices]:
        num_partitions, num_classes = self._shares.shape
        pools = _by_class(np.arange(len(labels)), labels, num_classes)
        sizes = np.array([len(pool) for pool in pools])
        with np.errstate(divide="ignore", invalid="ignore"):
            limit_of_class = np.where(self._shares > 0, sizes / self._shares, np.inf).min(axis=0)
        scarce, limit = int(limit_of_class.argmin()), int(limit_of_class.min())
        num_samples = self._num_samples or min(len(labels) // num_partitions, limit)
        if not 0 < num_samples <= limit:
            raise DataError(
                f"class {scarce} has only {sizes[scarce]} training examples, enough for {limit} a "
                "client without repetition; right would be "
                + (f"data.train-samples <= {limit}" if limit else "examples of every class")
            )
        counts = [_apportion(num_samples, shares) for shares in self._shares]
        return _deal(pools, np.stack(counts))


class DisjointPartitioner(_PlannedPartitioner):
    """Equal or disjoint label sets.

    The shuffled classes are dealt to the clients. With more clients than classes, each has one
    class, and clients of the same class split its examples without overlap.
    """

    def __init__(self, num_partitions: int, seed: int) -> None:
        super().__init__(num_partitions)
        self._seed = seed

    def _assign(self, labels: Indices) -> list[Indices]:
        order = _shuffled(np.unique(labels), self._seed, stream=3)
        num_sets = min(self._num_partitions, len(order))
        plan = []
        for client in range(self._num_partitions):
            label_set, rank = client % num_sets, client // num_sets
            rows = np.flatnonzero(np.isin(labels, order[label_set::num_sets]))
            num_holders = len(range(label_set, self._num_partitions, num_sets))
            plan.append(rows[rank::num_holders])
        return plan


class _Table(Dataset):
    """A table with columns and selections as NumPy arrays.

    Flower's partitioners read columns value by value and select by lists of NumPy integers, which
    takes a minute for EMNIST instead of seconds.
    """

    @classmethod
    def of(cls, index: Indices, label: Indices) -> "_Table":
        """Return the table with the two columns ``index`` and ``label``."""
        return cls(Dataset.from_dict({"index": index, "label": label}).data)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self.data.column(key).to_numpy()
        return super().__getitem__(key)

    def select(self, indices: Iterable[int], *args: Any, **kwargs: Any) -> Dataset:
        if not isinstance(indices, range):
            indices = np.asarray(indices, dtype=np.int64)
        selected: Dataset = super().select(indices, *args, **kwargs)
        return selected


def _partitioner(config: DataConfig, num_clients: int, seed: int) -> Partitioner:
    match cast(ByClass, config.partition):
        case "dominant-classes":
            return DominantClassesPartitioner(
                num_clients,
                config.info.num_classes,
                config.train_samples,
                config.num_groups,
                config.dominant_classes,
                config.uniform_fraction,
            )
        case "disjoint":
            return DisjointPartitioner(num_clients, seed)
        case "dirichlet":
            return DirichletPartitioner(
                num_clients,
                partition_by="label",
                alpha=config.dirichlet_alpha,
                min_partition_size=MIN_DIRICHLET_SAMPLES,
                seed=seed,
            )
        case "pathological":
            return PathologicalPartitioner(
                num_clients,
                partition_by="label",
                num_classes_per_partition=config.classes_per_client,
                class_assignment_mode="first-deterministic",  # random may leave classes unused
                seed=seed,
            )
        case "iid":  # contiguous pieces of the shuffled table
            return IidPartitioner(num_clients)


def _test_counts(
    held: Indices, available: Indices, size: int, uniform_fraction: float = 0.0
) -> Indices:
    """Return the number of test examples of each client and class, ``(clients, classes)``.

    Each row is proportional to that of ``held``, the clients' training examples. With ``size`` 0,
    each class of the test pool (``available``) is divided among the clients like its training
    examples. The fraction ``uniform_fraction`` of each row is uniform over all available classes.
    """
    totals = held.sum(axis=0)
    counts = np.zeros_like(held)
    for client, row in enumerate(held):
        mine = row > 0
        # The scarcest class limits the size, so that the distribution stays the training one.
        largest = int((available[mine] * row.sum() // totals[mine]).min())
        total = size or max(1, largest)
        uniform = round(uniform_fraction * total)
        counts[client] = _apportion(total - uniform, row) + _apportion(uniform, available > 0)
        for label in np.flatnonzero(counts[client] > available):
            raise DataError(
                f"client {client} needs {counts[client, label]} test examples of class {label}, "
                f"there are {available[label]}; right would be a smaller data.test-samples or, "
                f"for a data set without a test set of its own, a larger data.test-fraction"
            )
    return counts


def _apportion(total: int, weights: NDArray[Any]) -> Indices:
    """Divide ``total`` in proportion to ``weights`` into integers (largest remainder method)."""
    quotas = total * weights / weights.sum()
    counts: Indices = np.floor(quotas).astype(np.int64)
    largest_remainders = np.argsort(counts - quotas, kind="stable")
    counts[largest_remainders[: total - counts.sum()]] += 1
    return counts


def _deal(pools: Sequence[Indices], counts: Indices) -> list[Indices]:
    """Give client i the next ``counts[i, c]`` of ``pools[c]``, cyclically."""
    starts = counts.cumsum(axis=0) - counts
    return [
        np.concatenate(
            [
                pool[(start + np.arange(count)) % len(pool)] if count else pool[:0]
                for pool, start, count in zip(pools, starts[client], counts[client], strict=True)
            ]
        )
        for client in range(len(counts))
    ]


def _by_class(indices: Indices, labels: Indices, num_classes: int) -> list[Indices]:
    return [indices[labels[indices] == label] for label in range(num_classes)]


def _shuffled(values: Indices, seed: int, stream: int) -> Indices:
    # Streams of one seed are independent; Flower's partitioners draw from the bare seed.
    return np.random.default_rng([stream, seed]).permutation(values)
