"""Who has which samples: sizes, classes, and what clients never share."""

import random
import socket
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pfedgpa_app.config import DataConfig
from pfedgpa_app.data import DataError
from pfedgpa_app.data.partitions import partition
from pfedgpa_app.data_section import ByClass

PARTITIONS = get_args(ByClass)


def data(num_classes=10, per_class=100, test_per_class=30, seed=0):
    """Return labels and test marks of a balanced data set, in random order."""
    labels = torch.arange(num_classes).repeat(per_class + test_per_class)
    is_test = torch.arange(len(labels)) >= num_classes * per_class
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    return labels[order], is_test[order]


def config(partition, num_classes=10, **kwargs):
    protocol = {"train_samples": 0, "num_groups": 5, "dominant_classes": 3}
    protocol |= {"uniform_fraction": 0.2}
    return DataConfig(
        dataset="own:load",
        shape="1x1x1",
        num_classes=num_classes,
        partition=partition,
        **{**protocol, **kwargs},
    )


def counts(labels, indices, num_classes=10):
    return labels[indices].bincount(minlength=num_classes)


@pytest.mark.parametrize("name", PARTITIONS)
@settings(max_examples=10)
@given(
    num_clients=st.integers(2, 12),
    seed=st.integers(0, 2**31 - 1),
    train_samples=st.sampled_from([0, 7, 60]),
    test_samples=st.sampled_from([0, 20, 25]),
)
def test_test_sets_have_other_examples_of_the_same_classes_as_training_sets(
    name, num_clients, seed, train_samples, test_samples
):
    labels, is_test = data()
    chosen = config(
        name, train_samples=train_samples, test_samples=test_samples, dirichlet_alpha=5.0
    )
    clients = partition(labels, is_test, chosen, num_clients, seed)
    assert len(clients) == num_clients
    for train, test in clients:
        assert not is_test[train].any()
        assert is_test[test].all()
        for indices in (train, test):
            assert indices.dtype == torch.int64
            assert len(indices) > 0
            assert (indices.diff() > 0).all()  # ascending, so no sample twice
        assert not train_samples or len(train) <= train_samples
        assert not test_samples or len(test) == test_samples
        proportional = counts(labels, train) * (len(test) / len(train))
        assert (counts(labels, test) - proportional).abs().max() < 1


@pytest.mark.parametrize("name", [name for name in PARTITIONS if name != "dominant-classes"])
@settings(max_examples=10)
@given(num_clients=st.integers(5, 15), seed=st.integers(0, 2**31 - 1))
def test_the_pools_are_partitioned_without_rest_and_overlap(name, num_clients, seed):
    labels, is_test = data()
    clients = partition(labels, is_test, config(name, dirichlet_alpha=5.0), num_clients, seed)
    train = torch.cat([client.train for client in clients])
    assert len(train.unique()) == len(train)
    if name == "pathological":  # five clients may leave some classes to nobody
        held = labels[train].unique()
        assert len(train) == 100 * len(held)
    else:
        assert len(train) == int((~is_test).sum())
    if name == "disjoint" and num_clients in (5, 10, 15):  # nothing to round
        test = torch.cat([client.test for client in clients])
        assert len(test.unique()) == len(test) == int(is_test.sum())


@pytest.mark.parametrize("name", PARTITIONS)
def test_the_seed_alone_decides(name):
    labels, is_test = data()

    def split(seed):
        return torch.cat([torch.cat(c) for c in partition(labels, is_test, config(name), 6, seed)])

    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    first = split(3)
    random.seed(2), np.random.seed(2), torch.manual_seed(2)  # noqa: NPY002
    assert torch.equal(first, split(3))
    other = split(4)
    assert first.shape != other.shape or not torch.equal(first, other)


@pytest.mark.parametrize("name", PARTITIONS)
def test_partitioning_leaves_the_global_generators_and_the_network_alone(name, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()  # noqa: NPY002
    partition(*data(), config(name), 6, 0)
    assert random.getstate() == before[0]
    assert str(np.random.get_state()) == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def test_the_split_of_a_seed_stays_what_it_is():
    """Clients in different places, with other releases, must agree; a change here parts them."""
    labels = torch.arange(40) % 4
    is_test = torch.arange(40) >= 30
    clients = partition(labels, is_test, config("iid", num_classes=4), 3, seed=7)
    assert [client.train.tolist() for client in clients] == [
        [1, 2, 3, 4, 5, 6, 17, 21, 22, 23],
        [0, 9, 11, 14, 16, 18, 26, 27, 28, 29],
        [7, 8, 10, 12, 13, 15, 19, 20, 24, 25],
    ]


def test_dominant_classes_of_the_five_groups_of_fedpac():
    labels, is_test = data(per_class=600, test_per_class=100)
    clients = partition(labels, is_test, config("dominant-classes", train_samples=300), 10, 0)
    for client, (train, _) in enumerate(clients):
        dominant = [{0, 1, 2}, {2, 3, 4}, {4, 5, 6}, {6, 7, 8}, {8, 9, 0}][client % 5]
        # A fifth of the 300 over ten classes, the rest over the dominant three.
        expected = [6 + 80 * (label in dominant) for label in range(10)]
        assert counts(labels, train).tolist() == expected


@given(
    num_classes=st.integers(2, 12),
    num_groups=st.integers(1, 6),
    share=st.sampled_from([0.0, 0.2, 0.37, 1.0]),
    size=st.integers(1, 60),
    extra=st.data(),
)
def test_dominant_classes_have_their_part_of_exactly_the_samples(
    num_classes, num_groups, share, size, extra
):
    num_dominant = extra.draw(st.integers(1, num_classes))
    labels, is_test = data(num_classes, per_class=60, test_per_class=60)
    chosen = config(
        "dominant-classes",
        num_classes,
        num_groups=num_groups,
        dominant_classes=num_dominant,
        uniform_fraction=share,
        train_samples=size,
    )
    clients = partition(labels, is_test, chosen, 8, 0)
    for client, (train, _) in enumerate(clients):
        first = (client % num_groups) * num_classes // num_groups
        dominant = {(first + k) % num_classes for k in range(num_dominant)}
        assert len(train) == size
        for label, count in enumerate(counts(labels, train, num_classes).tolist()):
            exact = size * share / num_classes
            exact += size * (1 - share) / num_dominant * (label in dominant)
            assert abs(count - exact) < 1 + 1e-9


def test_a_class_is_used_up_before_a_sample_of_it_is_shared():
    labels, is_test = data(num_classes=2, per_class=100)
    chosen = config(
        "dominant-classes",
        num_classes=2,
        num_groups=1,
        dominant_classes=1,
        uniform_fraction=0.0,
        train_samples=60,
    )
    first, second, third = (c.train for c in partition(labels, is_test, chosen, 3, 0))
    together, times = torch.cat([first, second, third]).unique(return_counts=True)
    assert len(together) == 100
    assert sorted(times.tolist()) == [1] * 20 + [2] * 80
    assert len(torch.cat([first, second]).unique()) == 100


@pytest.mark.parametrize(("num_clients", "size"), [(10, 100), (2, 348)])
def test_without_a_number_each_client_has_its_part_or_what_the_scarcest_class_allows(
    num_clients, size
):
    labels, is_test = data()
    clients = partition(labels, is_test, config("dominant-classes"), num_clients, 0)
    # .2/10 + .8/3 of the samples are of a dominant class, and that has 100.
    assert [len(client.train) for client in clients] == [size] * num_clients


def test_more_samples_of_a_class_than_there_are_is_an_error_with_the_limit():
    chosen = config("dominant-classes", train_samples=349)
    with pytest.raises(DataError, match=r"only 100 .* right would be data.train-samples <= 348"):
        partition(*data(), chosen, 10, 0)


def test_a_class_without_samples_is_an_error_where_every_client_needs_it():
    labels, is_test = data()
    keep = labels != 4
    with pytest.raises(DataError, match=r"class 4 has only 0 .* examples of every class"):
        partition(labels[keep], is_test[keep], config("dominant-classes"), 10, 0)


@given(
    num_classes=st.integers(2, 12),
    num_clients=st.integers(1, 30),
    seed=st.integers(0, 2**31 - 1),
)
def test_disjoint_label_sets_are_equal_or_have_nothing_in_common(num_classes, num_clients, seed):
    labels, is_test = data(num_classes)
    clients = partition(
        labels, is_test, config("disjoint", num_classes=num_classes), num_clients, seed
    )
    label_sets = [frozenset(labels[client.train].tolist()) for client in clients]
    distinct = set(label_sets)
    assert len(distinct) == min(num_classes, num_clients)
    assert sum(len(label_set) for label_set in distinct) == num_classes
    assert frozenset.union(*distinct) == set(range(num_classes))


@pytest.mark.parametrize("classes_per_client", [1, 3, 10])
def test_pathological_clients_have_the_number_of_classes_asked_for(classes_per_client):
    labels, is_test = data()
    chosen = config("pathological", classes_per_client=classes_per_client)
    clients = partition(labels, is_test, chosen, 12, 0)
    assert {len(labels[client.train].unique()) for client in clients} == {classes_per_client}
    assert len(labels[torch.cat([client.train for client in clients])].unique()) == 10


def test_a_small_alpha_makes_clients_heterogeneous():
    labels, is_test = data(per_class=1000)

    def largest_class(alpha):
        clients = partition(labels, is_test, config("dirichlet", dirichlet_alpha=alpha), 10, 0)
        shares = [counts(labels, train) / len(train) for train, _ in clients]
        return float(torch.stack(shares).max(dim=1).values.mean())

    # 1/10 would be the same for all; the bounds are far from the values of about .17 and .55.
    assert largest_class(10.0) < 0.3 < largest_class(0.1)


def test_limited_training_sets_are_not_the_first_classes_of_the_share():
    labels, is_test = data()
    for name in ("dirichlet", "pathological", "disjoint", "iid"):
        chosen = config(name, train_samples=40, dirichlet_alpha=100.0, classes_per_client=5)
        for train, _ in partition(labels, is_test, chosen, 2, 0):
            assert len(train) == 40
            assert len(labels[train].unique()) >= 4


def test_the_scarcest_class_of_the_test_pool_sets_the_size_of_the_test_sets():
    labels, is_test = data(num_classes=2, per_class=100, test_per_class=50)
    drop = torch.zeros_like(is_test)
    drop[((labels == 1) & is_test).nonzero().squeeze(1)[:40]] = True
    labels, is_test = labels[~drop], is_test[~drop]
    clients = partition(labels, is_test, config("disjoint", num_classes=2), 1, 0)
    assert counts(labels, clients[0].test, 2).tolist() == [10, 10]


@pytest.mark.parametrize(
    ("chosen", "num_clients", "message"),
    [
        (config("iid"), 0, "0 clients cannot share 1000"),
        (config("iid"), 1001, "1001 clients cannot share 1000 .* 1 to 1000 clients"),
        (config("dirichlet", dirichlet_alpha=0.001), 50, "larger data.dirichlet-alpha"),
        (config("pathological", classes_per_client=9), 900, "smaller data.classes-per-client"),
        (config("iid", test_samples=400), 2, "needs .* right would be a smaller data.test-samples"),
    ],
)
def test_what_cannot_be_partitioned_is_an_error_with_a_remedy(chosen, num_clients, message):
    with pytest.raises(DataError, match=message):
        partition(*data(), chosen, num_clients, 0)


def test_a_client_that_would_stay_empty_is_an_error_with_a_remedy():
    labels = torch.tensor([0] * 50 + [1] * 2 + [0, 1])
    is_test = torch.arange(54) >= 52
    with pytest.raises(DataError, match=r"no training examples.*fewer clients"):
        partition(labels, is_test, config("disjoint", num_classes=2), 10, 0)


def test_a_class_without_test_samples_is_an_error():
    labels, is_test = data()
    keep = ~((labels == 4) & is_test)
    with pytest.raises(DataError, match="needs 1 test example of class 4, there are 0"):
        partition(labels[keep], is_test[keep], config("disjoint"), 10, 0)
