"""Images from files, and what else models take, in their shape."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pfedgpa_app.arrays import FileError, check_regular, read_examples

PICTURES = (".png", ".jpg", ".jpeg")
SUFFIXES = (*PICTURES, ".npz")
# Of a picture. Decoding takes up to 14 bytes a pixel, which are then 700 MB.
MAX_PIXELS = 50_000_000


def find_files(paths: Iterable[Path]) -> list[Path]:
    """Return files as they are, and in place of a folder its pictures by name.

    Raises
    ------
    FileError
        If there is no such file, its suffix tells of no images, or a folder has no pictures.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)
        else:
            found = [path] if path.suffix.lower() in SUFFIXES else []
        if not path.exists():
            raise FileError(f"{path}: no such file")
        if not found:
            raise FileError(f"{path}: no images; right would be {', '.join(SUFFIXES)}")
        files += found
    return files


def read_images(
    files: Iterable[Path], shape: tuple[int, ...], note: Callable[[str], None]
) -> Iterator[tuple[str, Tensor]]:
    """Yield images ``(channels, height, width)``, or examples of another shape, with their names.

    Pictures are uint8, grey or RGB whatever their files have. The array ``x`` of an .npz file,
    ``(n, *shape)``, is uint8 or becomes float32. Images of another height or width are resized,
    and ``note`` is told of the first.

    Raises
    ------
    FileError
        If a file cannot be read, there is no way to so many channels, or no picture has the shape.
    """
    is_image = len(shape) == 3
    size = list(shape[1:])
    is_noted = False
    for name, image in _read_all(files, (shape[0], "height", "width") if is_image else shape):
        given = list(image.shape[1:])
        if given != size and not is_noted:
            is_noted = True
            note(f"{name} is {_by(given)}; images are resized to {_by(size)}")
        yield name, image if given == size else _resize(image, size)


def _read_all(files: Iterable[Path], shape: tuple[int | str, ...]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        if file.suffix.lower() == ".npz":
            images = read_examples(file, shape)
            yield from ((f"{file}[{row}]", image) for row, image in enumerate(images))
        elif len(shape) == 3:
            yield str(file), read_picture(file, int(shape[0]))
        else:
            raise FileError(
                f"{file}: is a picture, and the model takes examples of shape {shape}; right would "
                "be an .npz file with an array x of them"
            )


def _resize(image: Tensor, size: list[int]) -> Tensor:
    from torchvision.transforms.functional import resize

    resized: Tensor = resize(image, size, antialias=True)
    return resized


def _by(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def read_picture(file: Path, channels: int, size: Sequence[int] | None = None) -> Tensor:
    """Return a PNG or JPEG file as uint8, ``(channels, height, width)``, upright.

    Nothing is decoded whose header tells of another ``size``, ``(height, width)``, if one is given,
    or of more than `MAX_PIXELS`.

    Raises
    ------
    FileError
        If it cannot be read, has another size or too many pixels, or there is no way to so many
        channels.
    """
    from PIL import Image, ImageOps

    if channels not in (1, 3):
        raise FileError(
            f"{file}: the model takes images of {channels} channels, and pictures have 1 or 3; "
            f"right would be an .npz file with an array x of shape (n, {channels}, height, width)"
        )
    check_regular(file)
    try:
        # Pillow has limits of its own: it warns of a size that is judged below, or gives up.
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            opened = Image.open(file, formats=("PNG", "JPEG"))
        with opened:
            picture: Image.Image = opened
            if size is not None and {*picture.size} != {*size}:  # it may yet have to be turned
                raise _size_error(file, picture.size, size)
            if picture.width * picture.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            ImageOps.exif_transpose(picture, in_place=True)
            if size is not None and picture.size != (size[1], size[0]):
                raise _size_error(file, picture.size, size)
            if picture.mode.startswith("I"):  # 16 bits a pixel, which convert would cut off
                picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
            pixels = np.array(picture.convert("L" if channels == 1 else "RGB"))
    except FileError:
        raise
    except Image.DecompressionBombError as error:
        raise FileError(
            f"{file}: has more than {MAX_PIXELS:,} pixels; right would be a smaller picture"
        ) from error
    except (OSError, ValueError, SyntaxError) as error:
        raise FileError(f"{file}: cannot be read ({error})") from error
    return torch.from_numpy(pixels).view(*pixels.shape[:2], channels).permute(2, 0, 1)


def _size_error(file: Path, given: tuple[int, int], size: Sequence[int]) -> FileError:
    width, height = given
    return FileError(
        f"{file}: is {_by([height, width])}; right would be {_by(size)} (height x width)"
    )
