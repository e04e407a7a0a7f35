"""The raw space: standardized parameters as they are, for small models or a GPU."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pfedgpa_app.stateful import Vector


@dataclass(frozen=True)
class RawSpace:
    """Every parameter on its own, of zero mean and unit variance over the bank."""

    mean: Vector
    """``(d,)``."""
    std: Vector
    """``(d,)``, 0 where the bank does not vary: what all have in common stays as it is."""
    dim: int
    """Number of coordinates: d, padded with zeros to what the denoiser can halve again and
    again."""

    @classmethod
    def fit(cls, vectors: Sequence[Tensor], multiple: int) -> "RawSpace":
        """Fit the space of vectors ``(d,)``, padded to a multiple of ``multiple``."""
        dtype = vectors[0].dtype
        mean = sum(vectors, start=torch.zeros_like(vectors[0], dtype=torch.float64)) / len(vectors)
        squares = torch.zeros_like(mean)
        for vector in vectors:
            squares += (vector - mean).square()
        std = (squares / len(vectors)).sqrt()
        # What varies less than it is rounded does not vary.
        least = (1e-6 * mean.abs()).clamp(min=torch.finfo(dtype).tiny)
        std = torch.where(std > least, std, 0.0)
        dim = -(-len(mean) // multiple) * multiple
        return cls(mean.to(dtype), std.to(dtype), dim)

    def project(self, vectors: Sequence[Tensor]) -> Tensor:
        """Return the coordinates ``(num_vectors, dim)`` of vectors ``(d,)``."""
        padding = (0, self.dim - len(self.mean))
        units = torch.where(self.std > 0, self.std, 1.0)
        return torch.stack(
            [functional.pad((vector - self.mean) / units, padding) for vector in vectors]
        )

    def displacement(self, coordinates: Tensor) -> Tensor:
        """Return how far vectors ``(..., d)`` of coordinates ``(..., dim)`` are from the mean."""
        return coordinates[..., : len(self.mean)].to(self.std) * self.std
