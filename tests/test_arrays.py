"""Arrays of .npz files, which are judged before they are read."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pfedgpa_app import arrays
from pfedgpa_app.arrays import FileError, read_examples, read_labels


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


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"descr": "<f4", "shape": (10**8, 29)}, r"x is float32 of shape .*right would be .*n, 30"),
        ({"descr": "<f4", "shape": (10**8, 30, 1)}, "right would be uint8 or floating point"),
        ({"descr": "<i8", "shape": (10**8, 30)}, "x is int64"),
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
    """A header may be told to have 4 GB, which numpy reads whole before it judges them."""
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
