"""The partitions ``dirichlet`` and ``pathological``, by the partitioners of flwr-datasets."""

import warnings
from collections.abc import Iterable
from typing import Any, cast

import numpy as np
from datasets.arrow_dataset import Dataset
from flwr_datasets.partitioner import DirichletPartitioner, Partitioner, PathologicalPartitioner
from numpy.typing import NDArray

from pfedgpa_app.config import DataConfig

# The Dirichlet distribution is redrawn while a client has fewer.
MIN_DIRICHLET_SAMPLES = 10


class _Table(Dataset):
    """A table whose columns and selections are NumPy arrays.

    Flower's partitioners read columns value by value and select by lists of NumPy integers, which
    takes a minute for EMNIST instead of seconds.
    """

    def __getitem__(self, key: Any) -> Any:
        return self.data.column(key).to_numpy()

    def select(self, indices: Iterable[int], *args: Any, **kwargs: Any) -> Any:
        """Return the rows themselves."""
        return np.asarray(indices, dtype=np.int64)


def flower_shares(
    labels: NDArray[np.int64], config: DataConfig, num_clients: int, seed: int
) -> list[NDArray[np.int64]]:
    """Return each client's indices into ``labels``; `ValueError` if the partition fails."""
    partitioner: Partitioner
    if config.partition == "dirichlet":
        partitioner = DirichletPartitioner(
            num_clients,
            partition_by="label",
            alpha=config.dirichlet_alpha,
            min_partition_size=MIN_DIRICHLET_SAMPLES,
            seed=seed,
        )
    else:
        partitioner = PathologicalPartitioner(
            num_clients,
            partition_by="label",
            num_classes_per_partition=config.classes_per_client,
            class_assignment_mode="first-deterministic",  # random may leave classes unused
            seed=seed,
        )
    partitioner.dataset = _Table(Dataset.from_dict({"label": labels}).data)
    with warnings.catch_warnings():  # they are about arguments that this app does not expose
        warnings.simplefilter("ignore")
        return [cast(Any, partitioner.load_partition(each)) for each in range(num_clients)]
