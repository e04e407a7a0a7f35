"""Images from files."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pfedgpa_app.arrays import LEVELS, FileError
from pfedgpa_app.images import find_files, read_images


def picture(file: Path, pixels: np.ndarray, mode: str | None = None) -> Path:
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(file)
    return file


def read(file: Path, shape: tuple[int, int, int] = (1, 8, 8)) -> tuple[list[torch.Tensor], list]:
    notes: list[str] = []
    return [image for _, image in read_images([file], shape, notes.append)], notes


GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
RGB = np.stack([GREY, GREY[::-1], 255 - GREY], axis=-1)


@pytest.mark.parametrize("mode", [None, "LA", "P", "RGB"])
def test_a_grey_picture_is_read_pixel_by_pixel(tmp_path: Path, mode: str | None):
    (image,), notes = read(picture(tmp_path / "a.png", GREY, mode))
    assert image.dtype == torch.uint8
    assert torch.equal(image, torch.from_numpy(GREY)[None])
    assert notes == []


def test_a_picture_of_sixteen_bits_is_read_as_one_of_eight(tmp_path: Path):
    (image,), _ = read(picture(tmp_path / "a.png", GREY.astype(np.uint16) * 257))
    assert torch.equal(image, torch.from_numpy(GREY)[None])


def test_a_picture_of_sixteen_bits_keeps_its_levels(tmp_path: Path):
    levels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    picture(tmp_path / "a.png", levels)
    for channels in (1, 3):
        (image,), _ = read(tmp_path / "a.png", (channels, 8, 8))
        assert image.dtype == LEVELS
        assert np.array_equal(image, np.stack([levels] * channels))


def png_of_sixteen_bits(file: Path, colour_type: int, channels: int) -> None:
    """Write what Pillow cannot: 16 bits a channel of more than one."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 8, 8, 16, colour_type, 0, 0, 0)
    rows = zlib.compress((bytes(1) + b"\x12\x34" * 8 * channels) * 8)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def grey_with_alpha(file: Path) -> None:
    Image.fromarray(np.dstack([GREY, 255 - GREY]), "LA").save(file)


LOSSES = {
    "16 bits a colour": (lambda file: png_of_sixteen_bits(file, 2, 3), "16 bits a channel"),
    "16 bits and alpha": (lambda file: png_of_sixteen_bits(file, 4, 2), "16 bits a channel"),
    "alpha": (grey_with_alpha, "transparent pixels"),
    "a transparent colour": (
        lambda file: Image.fromarray(RGB).save(file, transparency=tuple(map(int, RGB[1, 1]))),
        "transparent pixels",
    ),
    "a transparent level": (
        lambda file: Image.fromarray(GREY.astype(np.uint16) * 100).save(file, transparency=400),
        "transparent pixels",
    ),
    "frames": (
        lambda file: Image.fromarray(GREY).save(
            file, save_all=True, append_images=[Image.fromarray(GREY.T)]
        ),
        "is animated; right would be one file per frame",
    ),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_picture_that_would_lose_something_is_refused(tmp_path: Path, loss: str):
    write, message = LOSSES[loss]
    write(tmp_path / "a.png")
    with pytest.raises(FileError, match=rf"a\.png: .*{message}"):
        read(tmp_path / "a.png", (3, 8, 8))


@pytest.mark.filterwarnings("error")
def test_transparency_of_nothing_that_is_there_is_none(tmp_path: Path):
    palette = Image.fromarray(GREY // 32).convert("P")
    palette.save(tmp_path / "a.png", transparency=bytes([255] * 200 + [0]))
    (image,), _ = read(tmp_path / "a.png")
    assert torch.equal(image, torch.from_numpy(GREY // 32)[None])


def test_a_coloured_picture_is_read_channel_by_channel(tmp_path: Path):
    (image,), _ = read(picture(tmp_path / "a.PNG", RGB), (3, 8, 8))
    assert torch.equal(image, torch.from_numpy(RGB).permute(2, 0, 1))


def test_a_photograph_is_read_upright(tmp_path: Path):
    """Its file holds it lying, with a note on how to turn it."""
    flat = np.zeros((16, 16, 3), np.uint8)
    flat[:8] = 255
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees clockwise: the top becomes the right
    Image.fromarray(flat).save(tmp_path / "a.jpg", exif=turned, quality=95)
    (image,), _ = read(tmp_path / "a.jpg", (1, 16, 16))
    assert float(image[..., 9:].float().mean()) > 240
    assert float(image[..., :7].float().mean()) < 15


def test_images_of_another_size_are_resized_and_that_is_said_once(tmp_path: Path):
    for name in ("a.png", "b.png"):
        picture(tmp_path / name, np.kron(GREY, np.ones((4, 4), np.uint8)))
    notes: list[str] = []
    images = dict(read_images(find_files([tmp_path]), (1, 8, 8), notes.append))
    assert list(images) == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    assert notes == [f"{tmp_path / 'a.png'} is 32x32; images are resized to 8x8"]
    # Without antialiasing, fine stripes would become one of their colours.
    stripes = np.tile(np.array([200, 0, 0, 200], np.uint8), (32, 8))
    (image,), _ = read(picture(tmp_path / "c.png", stripes))
    assert (image.float() - 100).abs().max() < 20
    assert (images[str(tmp_path / "a.png")].float() - torch.from_numpy(GREY)).abs().mean() < 15


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_an_array_is_read_as_it_is(tmp_path: Path, dtype: type):
    x = np.random.default_rng(0).integers(0, 255, (3, 2, 8, 8)).astype(dtype)
    np.savez(tmp_path / "a.npz", x=x)
    images, _ = read(tmp_path / "a.npz", (2, 8, 8))
    assert len(images) == 3
    assert images[0].dtype == (torch.uint8 if dtype == np.uint8 else torch.float32)
    assert np.array_equal(torch.stack(images).numpy(), x)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"y": np.zeros((1, 1, 8, 8))}, "x cannot be read"),
        ({"x": np.array([{}], dtype=object)}, "x is object"),
        (
            {"x": np.zeros((1, 8, 8))},
            r"right would be uint8, uint16 or floats of shape \(n, 1, height, width\)",
        ),
        ({"x": np.zeros((1, 3, 8, 8))}, r"right would be .*\(n, 1, height, width\)"),
        ({"x": np.full((1, 1, 8, 8), "a")}, "x is <U1"),
    ],
)
def test_an_array_that_holds_no_images_is_refused(tmp_path: Path, arrays: dict, reason: str):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(FileError, match=f"a.npz.*{reason}"):
        read(tmp_path / "a.npz")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.npz"])
@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01."], ids=["empty", "pickle"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileError, match=f"{name}: .*cannot be read"):
        read(tmp_path / name)


def make_pipe(file: Path) -> None:
    os.mkfifo(file)


UNUSUAL = {
    "a pipe": make_pipe,
    "a link to a device": lambda file: file.symlink_to("/dev/null"),
    "a link to nothing": lambda file: file.symlink_to("nothing"),
    "a folder": lambda file: file.mkdir(),
}


@pytest.mark.parametrize("name", ["a.png", "a.npz"])
@pytest.mark.parametrize("kind", UNUSUAL)
def test_what_is_no_regular_file_is_refused(tmp_path: Path, kind: str, name: str):
    UNUSUAL[kind](tmp_path / name)
    reason = r"(is no regular file; right would be one|No such file)"
    with pytest.raises(FileError, match=rf"{name}: .*{reason}"):
        read(tmp_path / name)


def test_a_link_to_a_picture_is_read(tmp_path: Path):
    picture(tmp_path / "a.png", GREY)
    (tmp_path / "b.png").symlink_to("a.png")
    (image,), _ = read(tmp_path / "b.png")
    assert torch.equal(image, torch.from_numpy(GREY)[None])


# Pillow has limits of its own, of 89 and 179 million pixels.
@pytest.mark.parametrize(
    ("name", "size"),
    [("a.jpg", (7100, 7100)), ("a.png", (13300, 13300)), ("a.png", (20000, 10000))],
)
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: tuple[int, int]
):
    Image.new("1" if name == "a.png" else "L", size).save(tmp_path / name)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    with pytest.raises(FileError, match=f"{name}: has .*right would be a smaller image"):
        read(tmp_path / name)


def test_pictures_have_one_channel_or_three(tmp_path: Path):
    with pytest.raises(FileError, match=r"2 channels.*right would be an \.npz file"):
        read(picture(tmp_path / "a.png", GREY), (2, 8, 8))


def test_several_images_in_one_file_are_refused(tmp_path: Path):
    frames = [Image.fromarray(GREY), Image.fromarray(GREY.T), Image.fromarray(GREY[::-1])]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "a.gif").rename(tmp_path / "a.png")
    with pytest.raises(FileError, match="cannot be read"):
        read(tmp_path / "a.png")
    with pytest.raises(FileError, match="cannot be read"):
        read(tmp_path / "a.png", (3, 8, 8))


def test_files_are_found_in_folders_by_name(tmp_path: Path):
    folder = tmp_path / "folder"
    folder.mkdir()
    hidden = ("._b.png", ".hidden.jpg", "Thumbs.db")
    for name in ("b.png", "a.JPG", "notes.txt", "c.jpeg", "d.npz", *hidden):
        (folder / name).touch()
    (folder / "@eaDir").mkdir()
    (folder / "more.png").mkdir()
    notes: list[str] = []
    find_files([folder], notes.append)
    assert notes == [f"{folder}: skipped: 1 .npz, 1 .txt, 1 folder"]
    single = tmp_path / "x.npz"
    single.touch()
    assert find_files([single, folder]) == [
        single,
        *(folder / name for name in ("a.JPG", "b.png", "c.jpeg")),
    ]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("none.png", "no such file"),
        ("notes.txt", "right would be .png"),
        ("empty", "no images"),
        ("scans", r"no images \(2 \.tif\); right would be"),
    ],
)
def test_what_cannot_be_images_is_named(tmp_path: Path, name: str, reason: str):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "scans").mkdir()
    for number in "12":
        (tmp_path / "scans" / f"{number}.tif").touch()
    with pytest.raises(FileError, match=f"{name}: .*{reason}"):
        find_files([tmp_path / name])
