"""Reading images and other examples from files, in the shape that the model takes."""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pfedgpa_app.arrays import FileError, read_examples
from pfedgpa_app.data_section import by_x
from pfedgpa_app.files import composed, is_hidden, open_regular

if TYPE_CHECKING:
    from PIL import Image

PICTURES = (".png", ".jpg", ".jpeg")
SUFFIXES = (*PICTURES, ".npz")
# Of an image. Decoding takes up to 14 bytes a pixel: 700 MB.
MAX_PIXELS = 50_000_000
# Offset of the bit depth in a PNG file; Pillow does not report it.
_PNG_DEPTH = 24


class Found(NamedTuple):
    """The entries of a folder that are not hidden (`is_hidden`)."""

    pictures: list[Path]
    """Sorted by name."""
    others: Counter[str]
    """Number of other files by suffix, and of folders that were not entered."""


def sort_out(paths: Iterable[Path]) -> Found:
    """Separate the images among the entries of a folder from all others."""
    found = Found([], Counter())
    for path in sorted(path for path in paths if not is_hidden(path.name)):
        kind = path.suffix.lower()
        if kind in PICTURES and not path.is_dir():
            found.pictures.append(path)
        else:
            found.others["folder" if path.is_dir() else kind or "without a suffix"] += 1
    return found


def counted(others: Counter[str]) -> str:
    """Format counts by kind, such as ``2 .tif, 1 folder``."""
    return ", ".join(f"{number} {kind}" for kind, number in sorted(others.items()))


def find_pictures(folder: Path) -> Found:
    """Return the entries of a folder and its subfolders, hidden ones left out.

    Raises `FileError` if a folder is a link, which might make a loop or duplicates. Raises
    `OSError` if one cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    entered = []
    for root, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not is_hidden(name)]
        for name in folders:
            if (Path(root) / name).is_symlink():
                raise FileError(
                    f"{Path(root) / name}: is a link to a folder; right would be the folder itself"
                )
        entered.append((root, files))
    found = Found([], Counter())
    for root, files in sorted(entered):
        inside = sort_out(Path(root) / name for name in files)
        found.pictures.extend(inside.pictures)
        found.others.update(inside.others)
    return found


def find_labelled(
    paths: Iterable[Path],
    labels: Mapping[str, int],
    note: Callable[[str], None] = lambda text: None,
) -> tuple[list[Path], dict[Path, int]]:
    """Return pictures in folders that are named after classes, with their ``labels``.

    Such a folder is in one of the paths, and may have folders in turn. ``note`` is called with what
    else is beside it. The first result is what remains for `find_files`. Raises `FileError` if a
    folder is a link.
    """
    others, found = [], dict[Path, int]()
    for path in paths:
        inside = sorted(path.iterdir()) if path.is_dir() else []
        label_of = {
            each: labels[composed(each.name)]
            for each in inside
            if each.is_dir() and composed(each.name) in labels
        }
        pictures = {
            picture: label
            for folder, label in label_of.items()
            for picture in find_pictures(folder).pictures
        }
        if not pictures:
            others.append(path)
            continue
        found |= pictures
        beside = sort_out(set(inside) - label_of.keys())
        others += beside.pictures
        if beside.others:
            note(f"{path}: skipped: {counted(beside.others)}")
    return others, found


def find_files(
    paths: Iterable[Path], note: Callable[[str], None] = lambda text: None
) -> list[Path]:
    """Return the files, with each folder replaced by its images, sorted by name.

    ``note`` is called with what else is in a folder. Raises `FileError` if there is no such file,
    it has another suffix, or a folder has no images.
    """
    paths, files = list(paths), list[Path]()
    arrays = {path for path in paths if path.suffix.lower() == ".npz"}
    for path in paths:
        if not path.exists():
            raise FileError(f"{path}: no such file")
        if path.is_dir():
            pictures, others = sort_out(set(path.iterdir()) - arrays)
        else:
            is_one = path.suffix.lower() in SUFFIXES
            pictures, others = [path] if is_one else [], Counter()
        if not pictures:
            there = f" ({counted(others)})" if others else ""
            raise FileError(f"{path}: no images{there}; right would be {', '.join(SUFFIXES)}")
        if others:
            note(f"{path}: skipped: {counted(others)}")
        files += pictures
    return files


def read_images(
    files: Iterable[Path], shape: tuple[int, ...], note: Callable[[str], None]
) -> Iterator[tuple[str, Tensor]]:
    """Yield images ``(channels, height, width)``, or examples of another shape, with their names.

    Image files are converted to grey or RGB, as uint8 or 16-bit `LEVELS`. The array ``x`` of an
    .npz file is read by `read_examples`. Images of another height or width are resized, and
    ``note`` is called for the first. Raises `FileError` if a file cannot be read or converted to
    ``shape``.
    """
    size, is_noted = list(shape[1:]), False
    for name, image in _read_all(files, shape):
        given = list(image.shape[1:])
        if given != size:
            from torchvision.transforms.functional import resize

            if not is_noted:
                is_noted = True
                note(f"{name} is {by_x(given)}; images are resized to {by_x(size)}")
            image = resize(image, size, antialias=True)
        yield name, image


def _read_all(files: Iterable[Path], shape: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    is_image = len(shape) == 3
    for file in files:
        if file.suffix.lower() == ".npz":
            images = read_examples(file, (shape[0], "height", "width") if is_image else shape)
            yield from ((f"{file}[{row}]", image) for row, image in enumerate(images))
        elif is_image:
            yield str(file), read_picture(file, shape[0])
        else:
            raise FileError(
                f"{file}: is an image, and the model takes examples of shape {shape}; right would "
                "be an .npz file with an array x of them"
            )


def read_picture(file: Path, channels: int, size: Sequence[int] | None = None) -> Tensor:
    """Return the image of a PNG or JPEG file, ``(channels, height, width)``, upright.

    It is uint8, or `LEVELS` for 16-bit grey that 8 bits cannot represent. Size (``(height,
    width)``, if given) and `MAX_PIXELS` are checked in the header, before decoding. Raises
    `FileError` if it cannot be read or converted to ``channels``, has another size or too many
    pixels, or would lose frames, transparency or 16-bit colours.
    """
    from PIL import Image, ImageOps

    if channels not in (1, 3):
        raise FileError(
            f"{file}: the model takes images of {channels} channels, and image files have 1 or 3; "
            f"right would be an .npz file with an array x of shape (n, {channels}, height, width)"
        )
    try:
        # Pillow warns of sizes that are checked below, or raises.
        with (
            open_regular(file) as stream,
            warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning),
        ):
            picture: Image.Image = Image.open(stream, formats=("PNG", "JPEG"))
            # In any order: it may have to be rotated.
            if size is not None and sorted(picture.size) != sorted(size):
                raise _size_error(file, picture.size, size)
            if picture.width * picture.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            has_levels = picture.mode.startswith("I")  # 16 bits a pixel, which convert would clip
            if problem := _what_is_lost(file, picture, has_levels):
                raise FileError(f"{file}: {problem}")
            picture.info.pop("transparency", None)  # no pixel uses it
            ImageOps.exif_transpose(picture, in_place=True)
            if size is not None and picture.size != (size[1], size[0]):
                raise _size_error(file, picture.size, size)
            if has_levels:
                grey = np.asarray(picture).astype(np.int32)
                eight, rest = np.divmod(grey, 257)
                exact = torch.from_numpy(grey if rest.any() else eight.astype(np.uint8))
                return exact.expand(channels, *exact.shape).contiguous()
            pixels = np.array(picture.convert("L" if channels == 1 else "RGB"))
    except FileError:
        raise
    except Image.DecompressionBombError as error:
        raise FileError(
            f"{file}: has more than {MAX_PIXELS:,} pixels; right would be a smaller image"
        ) from error
    except (OSError, ValueError, SyntaxError) as error:
        raise FileError(f"{file}: cannot be read ({error})") from error
    return torch.from_numpy(pixels).view(*pixels.shape[:2], channels).permute(2, 0, 1)


def _what_is_lost(file: Path, picture: "Image.Image", has_levels: bool) -> str | None:
    """Return what the conversion to an array would lose; None if nothing."""
    if picture.format == "PNG" and getattr(picture, "is_animated", False):
        return "is animated; right would be one file per frame"
    if picture.format == "PNG" and not has_levels:
        with file.open("rb") as stream:
            header = stream.read(_PNG_DEPTH + 1)
        if header[_PNG_DEPTH:] == bytes([16]):
            return (
                f"has 16 bits a channel and is {picture.mode}, of which 8 could be read; right "
                "would be 16 bits of grey, 8 bits a channel, or an .npz file of uint16"
            )
    hidden = picture.info.get("transparency")
    is_opaque = hidden is None and "A" not in picture.getbands()
    if has_levels and hidden is not None:
        is_opaque = not bool((np.asarray(picture) == hidden).any())
    elif not is_opaque:
        is_opaque = picture.convert("RGBA").getchannel("A").getextrema()[0] == 255
    if not is_opaque:
        return "has transparent pixels; right would be an image without transparency"
    return None


def _size_error(file: Path, given: tuple[int, int], size: Sequence[int]) -> FileError:
    width, height = given
    return FileError(
        f"{file}: is {by_x([height, width])}; right would be {by_x(size)} (height x width)"
    )
