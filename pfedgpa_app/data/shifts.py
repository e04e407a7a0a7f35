"""Feature and label shifts between clients: rotation, contrast, permuted labels."""

import math

import torch
from torch import Tensor

from pfedgpa_app.arrays import LEVELS
from pfedgpa_app.config import DataConfig
from pfedgpa_app.randomness import make_generator

# Of ``shift-by = "client"``.
_MIN_CONTRAST = 0.25


def shifted(
    config: DataConfig, seed: int, client: int, images: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a client's shifted images and labels, of unchanged dtypes.

    By group, client i is in group ``g = i % num_groups`` of G and

    - ``rotation`` turns its images by ``360 g / G`` degrees, quarter turns exactly;
    - ``contrast`` maps a pixel p to ``m + f (p - m)``, with the middle m of the range (127.5; 0 for
      floats; 32767.5 for 16 bits) and ``f = (-1)^g / 2^(g // 2)``: unchanged, negative, half the
      contrast, and so on;
    - ``permuted-labels`` keeps the labels of group 0, and permutes those of each other group.

    By client, angle, contrast (1/4 to 1, either sign) and permutation are drawn from the seed.
    Images are ``(n, channels, height, width)``, but for ``permuted-labels`` of any shape.
    """
    group = None if config.shift_by == "client" else client % config.num_groups
    generator = make_generator(seed, "shift", client if group is None else group)
    match config.shift:
        case "rotation":
            angle = 360 * group / config.num_groups if group is not None else _draw(generator, 360)
            return rotated(images, angle), labels
        case "contrast":
            if group is None:
                size = _MIN_CONTRAST + _draw(generator, 1 - _MIN_CONTRAST)
                factor = math.copysign(size, _draw(generator, 2) - 1)
            else:
                factor = (-1) ** group / 2 ** (group // 2)
            return with_contrast(images, factor), labels
        case "permuted-labels":
            order = torch.randperm(config.info.num_classes, generator=generator)
            return images, labels if group == 0 else order[labels]
        case _:
            return images, labels


def rotated(images: Tensor, degrees: float) -> Tensor:
    """Return images turned counterclockwise, with empty corners 0."""
    height, width = images.shape[2:]
    turns, rest = divmod(degrees, 90)
    if rest == 0 and (height == width or turns % 2 == 0):
        return images.rot90(int(turns), dims=(2, 3)).contiguous()
    # Imported here: it takes seconds.
    from torchvision.transforms.functional import InterpolationMode, rotate

    turned: Tensor = rotate(images, degrees, InterpolationMode.BILINEAR)
    return turned


def with_contrast(images: Tensor, factor: float) -> Tensor:
    """Return images with the contrast scaled by ``factor`` around the middle of the range."""
    if images.is_floating_point():
        return images * factor
    end = 2**16 - 1 if images.dtype == LEVELS else 2**8 - 1
    return (end / 2 + factor * (images.float() - end / 2)).round().clamp(0, end).to(images.dtype)


def _draw(generator: torch.Generator, end: float) -> float:
    return end * float(torch.rand(1, generator=generator, dtype=torch.float64))
