"""Arrays of .npz files, which are checked before they are read."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pfedgpa_app import arrays
from pfedgpa_app.arrays import (
    LEVELS,
    ArrayError,
    FileError,
    as_examples,
    as_labels,
    common_dtype,
    read_examples,
    read_labels,
)


def npz(file: Path, header: dict[str, Any], content: bytes = b"") -> Path:
    """Write an .npz file whose header tells something else than what follows."""
    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(member, {"fortran_order": False, **header})
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", member.getvalue() + content)
    return file


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, ">f8"])
@pytest.mark.parametrize("shape", [(30,), (2, 7), (1, 4, 5), (2, 3, 4, 5)])
def test_examples_of_any_shape_are_read(tmp_path: Path, save: Any, dtype: Any, shape: tuple):
    x = np.random.default_rng(0).integers(0, 255, (3, *shape)).astype(dtype)
    save(tmp_path / "a.npz", x=np.asfortranarray(x), y=np.array([1, 0, 1], np.uint16))
    examples = read_examples(tmp_path / "a.npz", shape)
    assert examples.dtype == (torch.uint8 if dtype == np.uint8 else torch.float32)
    assert np.array_equal(examples.numpy(), x)
    labels = read_labels(tmp_path / "a.npz")
    assert labels.dtype == torch.int64
    assert labels.tolist() == [1, 0, 1]


INTEGERS = [f"{order}{kind}{size}" for order in "<>" for kind in "iu" for size in (1, 2, 4, 8)]
FLOATS = [f"{order}f{size}" for order in "<>" for size in (2, 4, 8)]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_labels_of_any_whole_numbers_are_read(tmp_path: Path, dtype: str):
    y = np.array([2, 0, 1, 127]).astype(dtype)
    np.savez(tmp_path / "a.npz", y=y)
    for labels in (as_labels(y), as_labels(y[::-1]).flip(0), read_labels(tmp_path / "a.npz")):
        assert labels.dtype == torch.int64
        assert labels.tolist() == [2, 0, 1, 127]


@pytest.mark.parametrize("dtype", INTEGERS + FLOATS)
def test_a_table_of_any_numbers_is_read(tmp_path: Path, dtype: str):
    x = np.array([[2, 0, 100], [1, 127, 3]]).astype(dtype)
    np.savez(tmp_path / "a.npz", x=x)
    wanted = torch.uint8 if x.dtype == np.uint8 else torch.float32
    for table in (as_examples(x, (3,), to_train=True), read_examples(tmp_path / "a.npz", (3,))):
        assert table.dtype == wanted
        assert table.tolist() == [[2, 0, 100], [1, 127, 3]]


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.uint8, torch.uint16, torch.uint32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float64),
    ],
)
def test_tensors_are_read_as_arrays_are(dtype: torch.dtype):
    x = torch.tensor([[2, 0], [1, 127]]).to(dtype).T
    table = as_examples(x, (2,), to_train=True)
    assert table.tolist() == [[2, 1], [0, 127]]
    assert table.dtype == (torch.uint8 if dtype == torch.uint8 else torch.float32)
    if not dtype.is_floating_point:
        assert as_labels(x[0]).tolist() == [2, 1]


def test_a_tensor_with_a_history_is_read():
    x = torch.ones(2, 3, requires_grad=True)
    assert as_examples(x * 2, (3,), to_train=True).requires_grad is False


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_images_and_signals_of_sixteen_bits_keep_their_levels(tmp_path: Path, dtype: str):
    x = np.array([[[0, 1, 65535]]]).astype(dtype)
    np.savez(tmp_path / "a.npz", x=x)
    for signals in (
        as_examples(x, (1, 3), to_train=True),
        as_examples(torch.from_numpy(x.astype(np.uint16)), (1, 3), to_train=True),
        read_examples(tmp_path / "a.npz", (1, 3)),
    ):
        assert signals.dtype == LEVELS
        assert signals.tolist() == [[[0, 1, 65535]]]


def test_eight_bits_beside_sixteen_are_as_bright():
    eight, sixteen = torch.tensor([255], dtype=torch.uint8), torch.tensor([65535], dtype=LEVELS)
    assert torch.cat(common_dtype([eight, sixteen])).tolist() == [65535, 65535]
    assert common_dtype([eight])[0].dtype == torch.uint8


def test_an_array_that_may_not_be_written_is_copied(recwarn: pytest.WarningsRecorder):
    x = np.zeros((2, 3), np.float32)
    x.setflags(write=False)
    as_examples(x, (3,), to_train=True)[0] = 1
    assert x.sum() == 0
    assert not recwarn.list


MASKED = np.ma.masked_equal(np.array([0, 1, 2]), 1)
BAD_LABELS = {
    "whole floats": (np.array([0.0, 1.0]), "of float64, right would be whole numbers"),
    "truth": (np.array([True]), "of bool, right would be whole numbers"),
    "too large": (np.array([2**63], np.uint64), f"up to {2**63}, right would be 0 to"),
    "masked": (MASKED, "a masked array, right would be"),
    "text": (np.array(["a"]), "of <U1"),
    "a list": ([0, 1], "a list of objects, right would be a tensor or NumPy array"),
    "sparse": (torch.eye(2).to_sparse(), r"a tensor of torch\.float32 that NumPy cannot represent"),
}


@pytest.mark.parametrize("kind", BAD_LABELS)
def test_labels_that_are_none_are_refused(kind: str):
    labels, reason = BAD_LABELS[kind]
    with pytest.raises(ArrayError, match=reason):
        as_labels(labels)


def test_an_npz_file_is_named_whose_numbers_do_not_fit(tmp_path: Path):
    np.savez(tmp_path / "a.npz", x=np.array([[1.0, np.nan]]), y=np.array([2**63], np.uint64))
    with pytest.raises(FileError, match=rf"a\.npz: y is up to {2**63}, right would be 0 to"):
        read_labels(tmp_path / "a.npz")
    with pytest.raises(FileError, match=r"a\.npz: x is NaN or infinity .*first in row 0"):
        read_examples(tmp_path / "a.npz", (2,))


BAD_TABLES = {
    "no table": (np.ones(()), "a number, right would be nx2"),
    "complex": (np.ones((1, 2), complex), "of complex128, right would be whole numbers or floats"),
    "too large for float32": (np.array([[0, 0], [1e300, 0]]), "beyond 1e.12 .first in row 1"),
    "too large": (np.array([[0, 10**18]]), "beyond 1e.12 .first in row 0"),
}


@pytest.mark.parametrize("kind", BAD_TABLES)
def test_tables_that_are_none_are_refused(kind: str):
    table, reason = BAD_TABLES[kind]
    with pytest.raises(ArrayError, match=reason):
        as_examples(table, (2,), to_train=True)


@pytest.mark.parametrize("lost", [1.7e9 + np.arange(50) / 10, np.arange(50) * 1e-50])
def test_a_feature_that_float32_makes_constant_is_refused(
    lost: np.ndarray, monkeypatch: pytest.MonkeyPatch
):
    """Such as the seconds of one minute since 1970, of which float32 knows every 128th."""
    kept = np.random.default_rng(0).normal(size=50)
    constant = np.where(np.arange(50) % 2, 0.1, 0.3 - 0.2)
    table = np.stack([kept, lost, constant, kept * 1e9], axis=1)
    for rows in (2**24, 7):  # in one piece, and in several
        monkeypatch.setattr(arrays, "PIECE", rows * 4)
        with pytest.raises(ArrayError, match=r"float64, and 1 feature.*column 1, from 0"):
            as_examples(table, (4,), to_train=True)
    # Who predicts has the training rows' statistics, and may have one row.
    assert as_examples(table, (4,), to_train=False).shape == (50, 4)
    assert as_examples(table[:, [0, 2, 3]], (3,), to_train=True).shape == (50, 3)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"descr": "<f4", "shape": (10**8, 29)}, r"x is float32 of shape .*right would be .*n, 30"),
        ({"descr": "<f4", "shape": (10**8, 30, 1)}, "right would be whole numbers or floats"),
        ({"descr": "<c8", "shape": (10**8, 30)}, "x is complex64"),
        ({"descr": "|O", "shape": (10**8, 30)}, "x is object"),
        ({"descr": "<f4", "shape": (10**8, 30)}, "x has 12,000,000,000 bytes; right would be 8,"),
        ({"descr": "<f4", "shape": (10**7, 30)}, "should have 1,200,000,000 bytes .*is cut off"),
    ],
)
def test_what_should_not_be_read_is_refused_by_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, header: dict, reason: str
):
    file = npz(tmp_path / "a.npz", header, bytes(1000))
    monkeypatch.setattr(arrays.np.lib.format, "read_array", None)
    with pytest.raises(FileError, match=rf"a\.npz: .*{reason}"):
        read_examples(file, (30,))


def test_of_a_bomb_only_the_beginning_is_decompressed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A header may claim 4 GB, which numpy reads whole before it checks them."""
    monkeypatch.setattr(arrays, "MAX_BYTES", 2**20)
    read: list[int] = []
    original = zipfile.ZipExtFile.read
    monkeypatch.setattr(
        zipfile.ZipExtFile, "read", lambda self, n=-1: (read.append(n), original(self, n))[1]
    )
    long_header = b"\x93NUMPY\x02\x00" + (2**24).to_bytes(4, "little") + b" " * 2**24
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", long_header)
    large = npz(tmp_path / "b.npz", {"descr": "|u1", "shape": (2**20, 30)}, bytes(30 * 2**20))
    for file in (tmp_path / "a.npz", large):
        with pytest.raises(FileError, match=r"(cannot be read|right would be 1,048,576 or less)"):
            read_examples(file, (30,))
    assert 0 < sum(read) < 10_000
    assert all(n > 0 for n in read)
