"""The affine subspace of a bank of vectors, where diffusion costs little and loses nothing."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Entries of a vector that are worked on at a time, so that float64 copies stay small.
_CHUNK = 2**18
# Directions with less than this part of the largest variance are rounding errors.
_RELATIVE_TOLERANCE = 1e-8


@dataclass(frozen=True)
class Subspace:
    """Orthonormal principal axes of a bank, with coordinates scaled to unit root mean square.

    Attributes
    ----------
    mean
        ``(d,)``.
    basis
        Orthonormal rows, ``(dim, d)``.
    scale
        Length in R^d of one unit of the coordinates.
    eigenvalues
        Variances along all principal axes of the bank, descending, float64. The axes that were
        left out by ``rank`` are among them.
    """

    mean: Tensor
    basis: Tensor
    scale: float
    eigenvalues: Tensor

    @classmethod
    def fit(cls, vectors: Tensor, rank: int | Callable[[Tensor], int] | None = None) -> "Subspace":
        """Fit the subspace of a bank ``(num_vectors, d)``.

        ``rank`` keeps the first axes only; a function such as `signal_rank` chooses it from the
        eigenvalues. The axes come from the Gram matrix in float64, so d enters in two passes
        over the bank.

        Raises
        ------
        ValueError
            If fewer than two vectors, or vectors that are all the same, leave no direction.
        """
        mean = vectors.mean(dim=0)
        eigenvalues, eigenvectors = torch.linalg.eigh(_gram(vectors, mean))
        eigenvalues, eigenvectors = eigenvalues.flip(0), eigenvectors.flip(1)
        kept = int((eigenvalues > _RELATIVE_TOLERANCE * eigenvalues[0].clamp(min=0)).sum())
        if kept == 0:
            raise ValueError(f"{len(vectors)} vector(s) without any difference have no subspace")
        eigenvalues, eigenvectors = eigenvalues[:kept], eigenvectors[:, :kept]
        if callable(rank):
            rank = rank(eigenvalues / len(vectors))
        dim = kept if rank is None else min(rank, kept)
        weights = (eigenvectors[:, :dim] / eigenvalues[:dim].sqrt()).T
        basis = vectors.new_empty(dim, vectors.shape[1])
        for chunk in _chunks(vectors.shape[1]):
            centered = vectors[:, chunk].double() - mean[chunk].double()
            basis[:, chunk] = (weights @ centered).to(vectors.dtype)
        scale = float((eigenvalues[:dim].sum() / (len(vectors) * dim)).sqrt())
        return cls(mean, basis, scale, eigenvalues / len(vectors))

    def state(self) -> dict[str, Tensor]:
        """Return the subspace as named tensors."""
        tensors = {"mean": self.mean, "basis": self.basis, "eigenvalues": self.eigenvalues}
        return tensors | {"scale": torch.tensor(self.scale, dtype=torch.float64)}

    @classmethod
    def of(cls, state: dict[str, Tensor]) -> "Subspace":
        """Return the subspace of what `state` returned."""
        return cls(state["mean"], state["basis"], float(state["scale"]), state["eigenvalues"])

    @property
    def dim(self) -> int:
        """Number of coordinates."""
        return len(self.basis)

    def project(self, vectors: Tensor) -> Tensor:
        """Return the coordinates ``(num_vectors, dim)`` of vectors ``(num_vectors, d)``.

        What sticks out of the subspace has no probability under the model and is dropped.
        """
        coordinates = vectors.new_zeros(len(vectors), self.dim, dtype=torch.float64)
        for chunk in _chunks(vectors.shape[1]):
            centered = vectors[:, chunk].double() - self.mean[chunk].double()
            coordinates += centered @ self.basis[:, chunk].double().T
        return (coordinates / self.scale).to(vectors.dtype)

    def reconstruct(self, coordinates: Tensor) -> Tensor:
        """Return the vectors ``(num_vectors, d)`` of coordinates ``(num_vectors, dim)``."""
        return self.mean + (coordinates * self.scale).to(self.basis.dtype) @ self.basis


def signal_rank(eigenvalues: Tensor) -> int:
    """Return how many of a bank's descending eigenvalues stand out over the noise floor.

    Twice the median is the hard threshold of Gavish and Donoho (arXiv 1305.5870) for an unknown
    noise level, in the limit of far fewer vectors than dimensions. At least one component is kept.
    """
    return max(1, int((eigenvalues > 2 * eigenvalues.median()).sum()))


def _gram(vectors: Tensor, mean: Tensor) -> Tensor:
    gram = vectors.new_zeros(len(vectors), len(vectors), dtype=torch.float64)
    for chunk in _chunks(vectors.shape[1]):
        centered = vectors[:, chunk].double() - mean[chunk].double()
        gram += centered @ centered.T
    return gram


def _chunks(length: int) -> Iterator[slice]:
    return (slice(begin, begin + _CHUNK) for begin in range(0, length, _CHUNK))
