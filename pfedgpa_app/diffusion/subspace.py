"""The affine subspace of a bank of vectors, where diffusion costs little and loses nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import torch
from torch import Tensor

from pfedgpa_app.diffusion.mixture import pieces_of
from pfedgpa_app.stateful import Vector

# Directions with less than this part of the largest variance are rounding errors.
_RELATIVE_TOLERANCE = 1e-8
# Neighbouring eigenvalues of banks without groups (iid, Dirichlet, pathological) differ by factors
# of up to 2, those on the two sides of a gap by 25 and more.
_MIN_GAP = 3


@dataclass(frozen=True)
class Spectrum:
    """How a bank's vectors differ from each other: their principal component analysis."""

    mean: Tensor
    """``(d,)``."""
    eigenvalues: Tensor
    """Variances along all principal axes, descending, float64, ``(min(num_vectors - 1, d),)``."""
    eigenvectors: Tensor
    """Of the Gram matrix, as columns, float64, ``(num_vectors, min(num_vectors - 1, d))``."""

    @classmethod
    def of(cls, vectors: Sequence[Tensor]) -> "Spectrum":
        """Analyze vectors ``(d,)`` by their Gram matrix, in float64 and one pass over them."""
        mean = torch.empty_like(vectors[0])
        gram = mean.new_zeros(len(vectors), len(vectors), dtype=torch.float64)
        for chunk, rows in pieces_of(vectors):
            mean[chunk] = rows.mean(dim=0).to(mean.dtype)
            rows -= mean[chunk].double()
            gram += rows @ rows.T
        eigenvalues, eigenvectors = torch.linalg.eigh(gram)
        # Without the direction that the mean took away, and each axis with a sign of its own: the
        # side on which a single vector is farthest out is positive.
        num_axes = min(len(vectors) - 1, len(mean))
        eigenvalues = eigenvalues.flip(0)[:num_axes]
        eigenvectors = eigenvectors.flip(1)[:, :num_axes]
        farthest = eigenvectors.abs().argmax(dim=0, keepdim=True)
        eigenvectors = eigenvectors * eigenvectors.gather(0, farthest).sign()
        return cls(mean, eigenvalues.clamp(min=0) / len(vectors), eigenvectors)

    @property
    def floor(self) -> float:
        """Variance of the noise along any axis: the median, which a few strong axes leave alone."""
        return float(self.eigenvalues.median()) if len(self.eigenvalues) else 0.0

    @property
    def max_rank(self) -> int:
        """Number of axes that are not rounding errors."""
        if not len(self.eigenvalues):
            return 0
        return int((self.eigenvalues > _RELATIVE_TOLERANCE * self.eigenvalues[0]).sum())

    def noise_to_signal(self, rank: int) -> float:
        """Return how much noise makes vectors look alike that differ by no more than the floor.

        In ``rank`` dimensions their squared distance is ``2 rank floor`` on average, in units of
        the mean variance of these axes.
        """
        if not rank:
            return 0.0
        return 2 * rank * self.floor / float(self.eigenvalues[:rank].mean())

    @cached_property
    def signal_rank(self) -> int:
        """Number of axes that stand out over the noise.

        Twice the median eigenvalue is the hard threshold of Gavish and Donoho (arXiv 1305.5870)
        for an unknown noise level, in the limit of far fewer vectors than dimensions. If the
        eigenvalues have no gap, each vector is different from all others: what is above the
        threshold then separates no groups, and the rank is 0.
        """
        num_above = min(self.max_rank, int((self.eigenvalues > 2 * self.floor).sum()))
        gaps = self.eigenvalues[:num_above] >= _MIN_GAP * self.eigenvalues[1 : num_above + 1]
        return num_above if bool(gaps.any()) else 0


@dataclass(frozen=True)
class Subspace:
    """Orthonormal principal axes of a bank, with coordinates scaled to unit root mean square.

    Without any axis it is the point where the mean is.
    """

    mean: Vector
    """``(d,)``."""
    basis: Annotated[Tensor, "dim d"]
    """Orthonormal rows, ``(dim, d)``."""
    scale: float
    """Length in R^d of one unit of the coordinates."""

    @classmethod
    def fit(
        cls,
        vectors: Sequence[Tensor],
        rank: int | None = None,
        spectrum: Spectrum | None = None,
    ) -> "Subspace":
        """Fit the subspace of the first ``rank`` principal axes of vectors ``(d,)``, or of all.

        Vectors that are all the same have no axis. ``spectrum`` saves a pass over the vectors
        where it is known already.
        """
        spectrum = spectrum or Spectrum.of(vectors)
        dim = spectrum.max_rank if rank is None else min(rank, spectrum.max_rank)
        eigenvalues = spectrum.eigenvalues[:dim]
        weights = (spectrum.eigenvectors[:, :dim] / (eigenvalues * len(vectors)).sqrt()).T
        basis = spectrum.mean.new_empty(dim, len(spectrum.mean))
        for chunk, rows in pieces_of(vectors):
            rows -= spectrum.mean[chunk].double()
            basis[:, chunk] = (weights @ rows).to(basis.dtype)
        return cls(spectrum.mean, basis, float(eigenvalues.mean().sqrt()) if dim else 1.0)

    @property
    def dim(self) -> int:
        """Number of coordinates."""
        return len(self.basis)

    def project(self, vectors: Sequence[Tensor]) -> Tensor:
        """Return the coordinates ``(num_vectors, dim)`` of vectors ``(d,)``.

        What sticks out of the subspace has no probability under the model and is dropped.
        """
        coordinates = self.mean.new_zeros(len(vectors), self.dim, dtype=torch.float64)
        for chunk, rows in pieces_of(vectors):
            rows -= self.mean[chunk].double()
            coordinates += rows @ self.basis[:, chunk].double().T
        return (coordinates / self.scale).to(self.basis.dtype)

    def displacement(self, coordinates: Tensor) -> Tensor:
        """Return how far vectors ``(..., d)`` of coordinates ``(..., dim)`` are from the mean."""
        return (coordinates * self.scale).to(self.basis.dtype) @ self.basis


def dispersion_ratio(vectors: Sequence[Tensor], origin: Tensor) -> float:
    """Return how far vectors ``(d,)`` went apart, as a part of how far they went together.

    That is their variance in units of the squared way that all went from ``origin`` ``(d,)``: 0 for
    vectors that are all the same, infinite for those that have no direction in common. Both come
    from the median pair of vectors, so that few vectors say the same as many, and a few strange
    ones nothing.
    """
    gram = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for chunk, ways in pieces_of(vectors):
        ways -= origin[chunk].double()
        gram += ways @ ways.T
    one, other = torch.triu_indices(len(vectors), len(vectors), offset=1)
    squares = gram.diagonal()
    variance = (squares[one] + squares[other] - 2 * gram[one, other]).median() / 2
    together = gram[one, other].median()
    return float(variance / together.clamp(min=0)) if variance > 0 else 0.0
