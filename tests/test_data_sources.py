"""Data sets are read as what they are, and an own one is refused with what would be right."""

import gzip
import hashlib
import io
import pickle
import socket
import struct
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout

from pfedgpa_app.config import DataConfig
from pfedgpa_app.data import DataError, image_stats, load_dataset, normalize, sources

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Return a function that makes settings of an own data set, which returns ``result``."""
    module = type(sys)("own_data")
    monkeypatch.setitem(sys.modules, "own_data", module)
    monkeypatch.setenv("PFEDGPA_TRUST", "own_data")

    def settings(result):
        module.load = lambda root: (module.__setattr__("root", root), result)[1]
        return DataConfig(
            dataset="own_data:load",
            shape="1x4x5",
            num_classes=3,
            partition="iid",
            root=str(tmp_path),
        )

    return settings


def good_images(n=30):
    return RNG.integers(0, 256, (n, 1, 4, 5), dtype=np.uint8)


def good_labels(n=30):
    return np.arange(n) % 3


def idx(array):
    """Return an array of bytes in the idx format of MNIST."""
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def test_digits_span_the_range_of_a_byte():
    dataset = load_dataset(DataConfig(dataset="digits"), seed=0)
    assert dataset.images.shape == (1797, 1, 8, 8)
    assert dataset.images.dtype == torch.uint8
    assert (int(dataset.images.min()), int(dataset.images.max())) == (0, 255)
    assert len(dataset.images.unique()) == 17
    assert dataset.labels.dtype == torch.int64
    assert dataset.labels[:10].tolist() == list(range(10))


def test_a_held_out_test_pool_has_its_fraction_of_each_class():
    dataset = load_dataset(DataConfig(dataset="digits", test_fraction=0.3), seed=0)
    for label in range(10):
        of_class = dataset.labels == label
        assert int(dataset.is_test[of_class].sum()) == round(0.3 * int(of_class.sum()))


def test_a_held_out_test_pool_depends_on_the_seed_alone():
    config = DataConfig(dataset="digits")
    torch.manual_seed(1)
    first = load_dataset(config, seed=0).is_test
    torch.manual_seed(2)
    assert torch.equal(first, load_dataset(config, seed=0).is_test)
    assert not torch.equal(first, load_dataset(config, seed=1).is_test)


@pytest.mark.fashion_mnist
def test_fashion_mnist_is_read_from_debians_files(tmp_path):
    config = DataConfig(dataset="fashion-mnist", root=str(tmp_path))
    images, labels, is_test, _ = load_dataset(config, seed=0)
    assert images.shape == (70_000, 1, 28, 28)
    assert images.dtype == torch.uint8
    assert labels[is_test].bincount().tolist() == [1000] * 10
    assert labels[~is_test].bincount().tolist() == [6000] * 10
    # The first training image is an ankle boot; mean and deviation are the published .2860, .3530.
    assert int(labels[0]) == 9
    stats = image_stats(sources.Dataset(images, labels, is_test))
    assert float(stats.mean) / 255 == pytest.approx(0.2860, abs=1e-4)
    assert float(stats.std) / 255 == pytest.approx(0.3530, abs=1e-4)


def write_fashion_mnist(root):
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split, n in (("train", 20), ("t10k", 10)):
        (raw / f"{split}-images-idx3-ubyte").write_bytes(idx(np.full((n, 28, 28), n)))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(idx(np.arange(n) % 10))


def test_fashion_mnist_in_the_own_folder_comes_first(tmp_path):
    write_fashion_mnist(tmp_path)
    config = DataConfig(dataset="fashion-mnist", root=str(tmp_path))
    dataset = load_dataset(config, seed=0)
    assert dataset.images.unique().tolist() == [10, 20]
    assert dataset.is_test.tolist() == [False] * 20 + [True] * 10


def test_data_in_a_folder_without_write_permission_is_read(tmp_path, monkeypatch):
    write_fashion_mnist(tmp_path)
    monkeypatch.setattr(sources.os, "access", lambda *_: False)  # permissions do not bind root
    load_dataset(DataConfig(dataset="fashion-mnist", root=str(tmp_path)), seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["FashionMNIST"]


def test_no_other_process_reads_while_one_unpacks(tmp_path, monkeypatch):
    write_fashion_mnist(tmp_path)
    locked = []

    def download(_self):
        try:
            FileLock(tmp_path / ".lock").acquire(timeout=0).lock.release()
        except Timeout:
            locked.append(True)

    monkeypatch.setattr("torchvision.datasets.FashionMNIST.download", download)
    load_dataset(DataConfig(dataset="fashion-mnist", root=str(tmp_path)), seed=0)
    assert locked == [True, True]


@pytest.mark.parametrize(("split", "num_classes"), [("balanced", 47), ("byclass", 62)])
def test_emnist_is_unpacked_and_put_upright(tmp_path, monkeypatch, split, num_classes):
    upright = RNG.integers(0, 256, (2, num_classes, 28, 28), dtype=np.uint8)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        for part, images in zip(("train", "test"), upright, strict=True):
            stem = f"gzip/emnist-{split}-{part}"
            on_file = images.transpose(0, 2, 1)  # NIST stores the columns of an image as rows
            packed.writestr(f"{stem}-images-idx3-ubyte.gz", gzip.compress(idx(on_file)))
            labels = idx(np.arange(num_classes))
            packed.writestr(f"{stem}-labels-idx1-ubyte.gz", gzip.compress(labels))
    raw = tmp_path / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "gzip.zip").write_bytes(archive.getvalue())
    monkeypatch.setattr(
        "torchvision.datasets.EMNIST.md5", hashlib.md5(archive.getvalue()).hexdigest()
    )

    dataset = load_dataset(DataConfig(dataset=f"emnist-{split}", root=str(tmp_path)), seed=0)
    assert np.array_equal(dataset.images[:, 0].numpy(), np.concatenate(upright))
    assert dataset.labels.tolist() == 2 * list(range(num_classes))
    assert dataset.is_test.tolist() == [False] * num_classes + [True] * num_classes


def test_cifar10_is_unpacked_with_its_channels_first(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10  # it takes seconds

    images = RNG.integers(0, 256, (6, 10, 3, 32, 32), dtype=np.uint8)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    entries = {
        name: {"data": batch.reshape(10, 3072), "labels": list(range(10))}
        for name, batch in zip(names, images, strict=True)
    }
    files = {name: pickle.dumps(entry) for name, entry in entries.items()}
    files["batches.meta"] = pickle.dumps({"label_names": list("abcdefghij")})
    sums = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    path = tmp_path / CIFAR10.filename
    with tarfile.open(path, "w:gz") as packed:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            member.size = len(content)
            packed.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in names[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums["batches.meta"]})

    dataset = load_dataset(DataConfig(dataset="cifar10", root=str(tmp_path)), seed=0)
    assert np.array_equal(dataset.images.numpy(), images.reshape(60, 3, 32, 32))
    assert dataset.labels.tolist() == 6 * list(range(10))
    assert int(dataset.is_test.sum()) == 10
    assert bool(dataset.is_test[50:].all())


@pytest.mark.parametrize("name", ["fashion-mnist", "emnist-balanced", "cifar10"])
def test_without_a_network_the_error_names_the_folder_and_what_to_do(tmp_path, monkeypatch, name):
    monkeypatch.setattr(sources, "DEBIAN_FASHION_MNIST", tmp_path / "none")
    folder = tmp_path / "data"
    with pytest.raises(DataError, match=rf"{name}: .*{folder}.*network connection.*data\.root"):
        load_dataset(DataConfig(dataset=name, root=str(folder)), seed=0)


def test_a_damaged_file_is_an_error_that_names_the_data_set(tmp_path):
    write_fashion_mnist(tmp_path)
    images = tmp_path / "FashionMNIST/raw/train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:1000])
    with pytest.raises(DataError, match="fashion-mnist"):
        load_dataset(DataConfig(dataset="fashion-mnist", root=str(tmp_path)), seed=0)


def test_missing_files_are_downloaded_from_the_official_address(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    wanted = []
    monkeypatch.setattr(
        "torchvision.datasets.utils._urlretrieve", lambda url, *_args, **_kwargs: wanted.append(url)
    )
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, max_hops: url)
    with pytest.raises(DataError, match="not found or corrupted"):
        load_dataset(DataConfig(dataset="cifar10", root=str(tmp_path)), seed=0)
    assert wanted == [CIFAR10.url]


@pytest.mark.parametrize("convert", [torch.from_numpy, np.asarray])
def test_an_own_function_gets_the_folder_and_gives_the_data(own, tmp_path, convert):
    images, labels = good_images(), good_labels()
    dataset = load_dataset(own((convert(images), convert(labels))), seed=0)
    assert sys.modules["own_data"].root == tmp_path
    assert np.array_equal(dataset.images.numpy(), images)
    assert dataset.labels.dtype == torch.int64
    assert dataset.labels.tolist() == labels.tolist()
    assert dataset.labels[dataset.is_test].bincount().tolist() == [2, 2, 2]


def test_own_float_images_reach_the_model_unchanged(own):
    images = RNG.normal(size=(30, 1, 4, 5)).astype(np.float32)
    dataset = load_dataset(own((images, good_labels())), seed=0)
    assert np.array_equal(normalize(dataset.images, image_stats(dataset)).numpy(), images)


@pytest.mark.parametrize("labels", ["<u2", ">i8", "<u4", "<u8", "<i1"])
@pytest.mark.parametrize("examples", ["<f2", ">f4", "<f8", "<u2", ">u2"])
def test_own_arrays_of_other_types_are_read(own, examples, labels):
    images = good_images().astype(examples)
    dataset = load_dataset(own((images, good_labels().astype(labels))), seed=0)
    assert dataset.images.dtype == (torch.int32 if "u2" in examples else torch.float32)
    assert np.array_equal(dataset.images.numpy(), images)
    assert dataset.labels.tolist() == good_labels().tolist()


@pytest.mark.parametrize("dtype", [torch.uint16, torch.float64, torch.bfloat16])
def test_own_tensors_of_other_types_are_read(own, dtype):
    images = torch.from_numpy(good_images()).to(dtype)
    dataset = load_dataset(own((images, torch.from_numpy(good_labels()).to(torch.uint16))), seed=0)
    assert torch.equal(dataset.images.float(), images.float())
    assert dataset.labels.tolist() == good_labels().tolist()


def test_sixteen_bits_train_as_eight_do(own):
    eight = load_dataset(own((good_images(), good_labels())), seed=0)
    both = [eight, eight._replace(images=eight.images.to(torch.int32) * 257)]
    stats = [image_stats(each) for each in both]
    for one, other in zip(*stats, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    normalized = [normalize(each.images, of) for each, of in zip(both, stats, strict=True)]
    np.testing.assert_allclose(*normalized, atol=1e-5)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (good_images(), r"returns ndarray, right would be \(examples, labels\)"),
        ((good_images().tolist(), good_labels()), "examples are a list .*tensor or NumPy array"),
        (
            (good_images().astype(str), good_labels()),
            "examples are a ndarray of <U",
        ),
        ((good_images()[:, 0], good_labels()), "examples are 30x4x5, right would be nx1x4x5"),
        ((good_images(), good_labels(29)), r"30 examples .*\(29,\), right would be \(30,\)"),
        ((good_images(), good_labels()[:, None]), r"\(30, 1\), right would be \(30,\)"),
        ((good_images(0), good_labels(0)), "has no examples"),
        ((good_images().astype(np.int16), good_labels()), "int16, right would be uint8, uint16"),
        ((good_images() > 9, good_labels()), "bool, right would be uint8, uint16 or floats"),
        ((np.full((30, 1, 4, 5), np.inf, np.float32), good_labels()), "NaN or infinity"),
        ((good_images(), good_labels().astype(float)), "float64, right would be whole numbers"),
        ((good_images(), good_labels() == 0), "bool, right would be whole numbers"),
        ((good_images(), np.full(30, 2**64 - 1, np.uint64)), "up to 18446744073709551615, right"),
        ((good_images(), good_labels() + 1), "from 1 to 3, right would be 0 to 2"),
        ((good_images(), good_labels() - 1), "from -1 to 1, right would be 0 to 2"),
        ((good_images(4), good_labels(4)), "class 1 has one example, right would be two or more"),
    ],
)
def test_an_own_data_set_is_refused_with_what_would_be_right(own, result, message):
    with pytest.raises(DataError, match=rf"own_data:load: .*{message}"):
        load_dataset(own(result), seed=0)


@pytest.mark.parametrize("name", ["no_such_package.data:load", "own_data:no_such_function"])
def test_an_own_function_that_is_not_there_is_named(own, name):
    config = own(None).model_copy(update={"dataset": name})
    with pytest.raises(DataError, match=rf"{name}: cannot be imported"):
        load_dataset(config, seed=0)


def test_statistics_are_those_of_the_training_pool():
    images = torch.from_numpy(RNG.integers(0, 256, (50, 3, 4, 4), dtype=np.uint8))
    is_test = torch.arange(50) % 3 == 0
    stats = image_stats(sources.Dataset(images, torch.zeros(50, dtype=torch.int64), is_test))
    pool = images[~is_test].numpy().astype(np.float64)
    np.testing.assert_allclose(stats.mean, pool.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(stats.std, pool.std((0, 2, 3)), rtol=1e-6)
    normalized = normalize(images[~is_test], stats)
    assert normalized.dtype == torch.float32
    np.testing.assert_allclose(normalized.mean((0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(normalized.std((0, 2, 3), correction=0), 1, rtol=1e-5)


def test_a_channel_without_contrast_normalizes_to_zero():
    images = torch.full((5, 1, 2, 2), 7, dtype=torch.uint8)
    is_test = torch.zeros(5, dtype=torch.bool)
    stats = image_stats(sources.Dataset(images, torch.zeros(5, dtype=torch.int64), is_test))
    assert normalize(images, stats).unique().tolist() == [0.0]
