"""Partitions of a data set among clients.

The training pool is partitioned by classes (``dirichlet`` and ``pathological`` by flwr-datasets),
or by an own function. Test sets follow the class distributions of the training sets. With
``natural`` every owner is a client.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pfedgpa_app.config import PARTITIONS, DataConfig
from pfedgpa_app.data.dataset import DataError
from pfedgpa_app.data.own import own_shares
from pfedgpa_app.data_section import ByClass
from pfedgpa_app.files import count_of

Indices = NDArray[np.int64]

_REMEDIES = {
    "dirichlet": "a larger data.dirichlet-alpha or fewer clients",
    "pathological": "fewer clients or a smaller data.classes-per-client",
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

    ``labels`` and ``is_test``, the mask of the test pool, are ``(n,)``, as are ``owners``, numbered
    from 0, for ``natural`` alone. Raises `DataError` if a client would have no training or test
    examples, or needs more test examples of a class than there are.
    """
    classes, in_test_pool = labels.numpy(), is_test.numpy()
    if config.partition == "natural":
        return _natural(in_test_pool, owners, config, num_clients, seed)
    train_pool = _shuffled(np.flatnonzero(~in_test_pool), seed, stream=1)
    test_pool = _shuffled(np.flatnonzero(in_test_pool), seed, stream=2)
    if not 1 <= num_clients <= len(train_pool):
        raise DataError(
            f"{num_clients} clients cannot share {count_of(len(train_pool), 'training example')}, "
            f"right would be 1 to {len(train_pool)} clients"
        )
    # Shares are shuffled, so that a prefix is a random subset.
    if config.partition in PARTITIONS:
        rows = _shares(classes[train_pool], config, num_clients, seed)
        shares = [train_pool[each] for each in rows]
    else:
        pool = np.sort(train_pool)
        rows = own_shares(config.partition, classes[pool], num_clients, seed)
        shares = [_drawn(pool[each], 0, seed, client) for client, each in enumerate(rows)]
    train = [np.sort(share[: config.train_samples or None]) for share in shares]
    for client, share in enumerate(train):
        if len(share) == 0:
            raise DataError(
                f"client {client} of {num_clients} has no training examples; "
                f"what would help: {_remedy(config)}"
            )
    num_classes = config.info.num_classes
    held = np.stack([np.bincount(classes[share], minlength=num_classes) for share in train])
    pools = [test_pool[classes[test_pool] == label] for label in range(num_classes)]
    test = _deal(pools, _test_counts(held, np.array([len(pool) for pool in pools]), config))
    return [
        ClientIndices(torch.from_numpy(mine), torch.from_numpy(np.sort(theirs)))
        for mine, theirs in zip(train, test, strict=True)
    ]


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
            f"data.partition = natural: {count_of(num_clients, 'client')}, and "
            f"{count_of(num_owners, 'owner')}; right would be 1 to {num_owners} clients"
        )
    pools = ((~in_test_pool, config.train_samples), (in_test_pool, config.test_samples))
    clients = []
    for client in range(num_clients):
        mine = owners.numpy() == client
        train, test = (
            torch.from_numpy(np.sort(_drawn(np.flatnonzero(pool & mine), limit, seed, client)))
            for pool, limit in pools
        )
        clients.append(ClientIndices(train, test))
    return clients


def _drawn(samples: Indices, limit: int, seed: int, client: int) -> Indices:
    """Return at most ``limit`` of a client's indices (0: all), shuffled."""
    rng = np.random.default_rng([4, seed, client])
    return rng.permutation(samples)[: limit or None]


def _shares(labels: Indices, config: DataConfig, num_clients: int, seed: int) -> list[Indices]:
    """Return each client's rows of the shuffled training pool, which has these labels."""
    match cast(ByClass, config.partition):
        case "dominant-classes":
            return _dominant_classes(labels, config, num_clients)
        case "disjoint":
            return _disjoint(labels, num_clients, seed)
        case "iid":
            return np.array_split(np.arange(len(labels)), num_clients)
        case "dirichlet" | "pathological":
            # Imported here, since it takes seconds.
            from pfedgpa_app.data.flower_partitions import flower_shares

            try:
                return flower_shares(labels, config, num_clients, seed)
            except ValueError as error:
                raise DataError(
                    f"data.partition = {config.partition} fails for "
                    f"{count_of(num_clients, 'client')}: {error} What would help: {_remedy(config)}"
                ) from error


def _remedy(config: DataConfig) -> str:
    name = config.partition
    return _REMEDIES.get(name, f"fewer clients (data.partition = {name})")


def _dominant_classes(labels: Indices, config: DataConfig, num_clients: int) -> list[Indices]:
    """Make groups of clients with dominant classes, the protocol of FedPAC (arXiv 2306.11867).

    Every client has ``train_samples`` examples (0: its share of the table, or less if a class has
    too few). The fraction ``uniform_fraction`` is uniform over all classes, the rest uniform over
    the dominant classes of the client's group. Client i is in group ``i % num_groups``; group g has
    ``dominant_classes`` consecutive classes from ``g * num_classes // num_groups`` on, modulo
    ``num_classes``.

    Clients take the examples of a class in the order of the table, starting over at its end, so
    that clients may share examples. No client has an example twice.
    """
    num_classes, uniform = config.info.num_classes, config.uniform_fraction
    first = np.arange(num_clients) % config.num_groups * num_classes // config.num_groups
    dominant = (first[:, None] + np.arange(config.dominant_classes)) % num_classes
    # Row i: the class distribution of client i.
    shares = np.full((num_clients, num_classes), uniform / num_classes)
    of_dominant = uniform / num_classes + (1 - uniform) / config.dominant_classes
    np.put_along_axis(shares, dominant, of_dominant, axis=1)
    pools = [np.flatnonzero(labels == label) for label in range(num_classes)]
    sizes = np.array([len(pool) for pool in pools])
    with np.errstate(divide="ignore", invalid="ignore"):
        limit_of_class = np.where(shares > 0, sizes / shares, np.inf).min(axis=0)
    scarce, limit = int(limit_of_class.argmin()), int(limit_of_class.min())
    num_samples = config.train_samples or min(len(labels) // num_clients, limit)
    if not 0 < num_samples <= limit:
        raise DataError(
            f"class {config.classes[scarce]} has only "
            f"{count_of(sizes[scarce], 'training example')}, enough for {limit} a "
            "client without repetition; right would be "
            + (f"data.train-samples <= {limit}" if limit else "examples of every class")
        )
    return _deal(pools, np.stack([_apportion(num_samples, row) for row in shares]))


def _disjoint(labels: Indices, num_clients: int, seed: int) -> list[Indices]:
    """Deal the shuffled classes to the clients: equal or disjoint label sets.

    With more clients than classes, each has one class, and clients of the same class split its
    examples without overlap.
    """
    order = _shuffled(np.unique(labels), seed, stream=3)
    num_sets = min(num_clients, len(order))
    plan = []
    for client in range(num_clients):
        label_set, rank = client % num_sets, client // num_sets
        rows = np.flatnonzero(np.isin(labels, order[label_set::num_sets]))
        num_holders = len(range(label_set, num_clients, num_sets))
        plan.append(rows[rank::num_holders])
    return plan


def _test_counts(held: Indices, available: Indices, config: DataConfig) -> Indices:
    """Return the number of test examples of each client and class, ``(clients, classes)``.

    Each row is proportional to that of ``held``, the clients' training examples. Without
    ``test_samples``, each class of the test pool (``available``) is divided among the clients like
    its training examples. The fraction ``test_uniform_fraction`` is uniform over available classes.
    """
    totals = held.sum(axis=0)
    counts = np.zeros_like(held)
    for client, row in enumerate(held):
        mine = row > 0
        # The scarcest class limits the size, so that the distribution stays the training one.
        largest = int((available[mine] * row.sum() // totals[mine]).min())
        total = config.test_samples or max(1, largest)
        uniform = round(config.test_uniform_fraction * total)
        counts[client] = _apportion(total - uniform, row) + _apportion(uniform, available > 0)
        for label in np.flatnonzero(counts[client] > available):
            raise DataError(
                f"client {client} needs {count_of(counts[client, label], 'test example')} of class "
                f"{config.classes[label]}, there are {available[label]}; right would be a "
                "smaller data.test-samples or, for a data set without a test set of its own, a "
                "larger data.test-fraction"
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
                pool[(start + np.arange(count)) % max(1, len(pool))]
                for pool, start, count in zip(pools, *rows, strict=True)
            ]
        )
        for rows in zip(starts, counts, strict=True)
    ]


def _shuffled(values: Indices, seed: int, stream: int) -> Indices:
    # Streams of one seed are independent; Flower's partitioners draw from the bare seed.
    return np.random.default_rng([stream, seed]).permutation(values)
