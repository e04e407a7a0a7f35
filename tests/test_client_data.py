"""What a client gets is its own part of the data set, loaded once a process."""

import sys

import numpy as np
import pytest
import torch

from pfedgpa_app.config import DataConfig
from pfedgpa_app.data import (
    DataError,
    class_counts,
    client_data,
    clients,
    image_stats,
    load_dataset,
)
from pfedgpa_app.data.clients import _partitioned
from pfedgpa_app.data.partitions import partition

FILES = pytest.mark.fashion_mnist


@pytest.fixture(autouse=True)
def empty_cache():
    _partitioned.cache_clear()
    yield
    _partitioned.cache_clear()


def test_a_client_gets_the_images_and_labels_of_its_part():
    config = DataConfig(dataset="digits")
    dataset = load_dataset(config, seed=3)
    train, test = partition(dataset.labels, dataset.is_test, config, 10, seed=3)[4]
    client = client_data(config, 3, 4, 10)
    assert torch.equal(client.train_inputs, dataset.images[train])
    assert torch.equal(client.train_labels, dataset.labels[train])
    assert torch.equal(client.test_inputs, dataset.images[test])
    assert torch.equal(client.test_labels, dataset.labels[test])
    assert client.train_inputs.dtype == torch.uint8
    assert client.info == config.info
    assert all(map(torch.equal, client.stats, image_stats(dataset)))


def test_a_process_loads_once_for_all_its_clients(monkeypatch):
    calls = []
    module = type(sys)("own_data")
    labels = np.arange(60) % 3

    def load(root):
        calls.append(root)
        return np.zeros((60, 1, 2, 2), np.uint8), labels

    module.load = load
    monkeypatch.setitem(sys.modules, "own_data", module)
    monkeypatch.setenv("PFEDGPA_TRUST", "own_data")
    for partition_id in range(4):
        # Each message brings its settings anew.
        config = DataConfig(dataset="own_data:load", shape="1x2x2", num_classes=3, partition="iid")
        client_data(config, 0, partition_id, 4)
    assert len(calls) == 1
    client_data(config, 1, 0, 4)
    assert len(calls) == 2


def nothing(*args, **kwargs):
    raise AssertionError("it was shared out before")


@pytest.mark.parametrize(
    ("dataset", "by"),
    [
        ("digits", "dirichlet"),
        ("watch", "natural"),
        pytest.param("fashion-mnist", "dirichlet", marks=FILES),
    ],
)
def test_another_process_shares_nothing_out_again(monkeypatch, dataset: str, by: str):
    config = DataConfig(dataset=dataset, partition=by)
    before = [client_data(config, 3, partition_id, 5) for partition_id in range(5)]
    _partitioned.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(clients, "partition", nothing)
        for partition_id, client in enumerate(before):
            again = client_data(config, 3, partition_id, 5)
            assert all(map(torch.equal, again[:4], client[:4]))
            assert all(map(torch.equal, again.stats, client.stats))
        other_way = config.model_copy(update={"partition": "iid"})
        for other in ((config, 3, 0, 6), (config, 4, 0, 5), (other_way, 3, 0, 5)):
            with pytest.raises(AssertionError):
                client_data(*other)


@FILES
def test_class_counts_are_known_where_the_data_was_partitioned_and_only_there():
    config = DataConfig(dataset="fashion-mnist", partition="dirichlet", train_samples=50)
    assert class_counts(config, 3, 5) is None
    labels = [client_data(config, 3, client, 5).train_labels for client in range(5)]
    counts = class_counts(config, 3, 5)
    assert torch.equal(counts, torch.stack([each.bincount(minlength=10) for each in labels]))
    assert class_counts(config, 4, 5) is None


@pytest.mark.parametrize("state", ["damaged", "folder that may not be written"])
def test_what_cannot_be_kept_or_read_is_partitioned_again(own_home, monkeypatch, state: str):
    config = DataConfig(dataset="digits")
    folder = own_home / ".cache" / "pfedgpa" / "splits"
    if state == "damaged":
        expected = client_data(config, 0, 1, 4)
        (file,) = folder.iterdir()
        file.write_bytes(file.read_bytes()[:-1])
    else:
        folder.parent.mkdir(parents=True)
        folder.write_text("in the way")
        expected = client_data(config, 0, 1, 4)
        assert folder.is_file()
    _partitioned.cache_clear()
    assert torch.equal(client_data(config, 0, 1, 4).train_inputs, expected.train_inputs)


def test_what_a_client_does_to_its_data_stays_with_it():
    config = DataConfig(dataset="digits")
    client = client_data(config, 0, 0, 10)
    before = client.train_inputs.clone()
    client.train_inputs.zero_()
    assert torch.equal(client_data(config, 0, 0, 10).train_inputs, before)


@pytest.mark.parametrize(("partition_id", "num_partitions"), [(-1, 10), (10, 10), (0, 0)])
def test_a_client_that_does_not_exist_is_an_error(partition_id, num_partitions):
    with pytest.raises(DataError, match=rf"partition-id = {partition_id} .* numbered from 0"):
        client_data(DataConfig(dataset="digits"), 0, partition_id, num_partitions)
