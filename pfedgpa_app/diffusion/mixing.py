"""The mixing matrix: the weights of all uploads in each client's model.

A client's model is its row of the matrix times the uploads of all. Rows sum to 1; entries may be
negative. The matrix is made from halves that the clients reported, or from distances of uploads.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pfedgpa_app.diffusion.signal import signal_parts
from pfedgpa_app.diffusion.subspace import Spectrum

# What is kept of an axis is the square of its part of signal: accuracy gains more from sharing
# than the mean squared error of parameters does. Tuned on the digits, seeds 100 and 101.
_CAUTION = 2
# Weights of others, in all, that are too small to reveal anything, as a part of the row.
_NEGLIGIBLE = 0.01


def mixing_from_halves(spectrum: Spectrum, halves: Tensor) -> Tensor:
    """Return the matrix that keeps of the deviations from the mean what both halves agree on.

    With the principal axes q of the uploads as unit vectors over the clients, it is
    ``1/n + sum_q kept_q q q^T``, ``(num_clients, num_clients)``, float64, where ``kept`` is the
    square of `signal_parts`. Halves of clients without a report are 0.
    """
    axes = spectrum.eigenvectors
    kept = signal_parts(axes, halves) ** _CAUTION
    # Axes that are rounding errors are no deviations from the mean either.
    kept[spectrum.max_rank :] = 0
    return (axes * kept) @ axes.T + 1 / len(axes)


def affinities(here: Tensor, there: Tensor, noise_to_signal: float) -> Tensor:
    """Return the affinity of points ``(n, dim)`` with others ``(m, dim)``.

    ``softmax(-|c_i - c_j|^2 / 2 noise_to_signal)``, the weights of the optimal denoiser of a finite
    set of points, as rows ``(n, m)``, float64, that sum to 1. In zero dimensions they are equal.
    """
    left, right = here.double(), there.double()
    # |c_i - c_j|^2 without |c_i|^2, which the softmax does not see.
    distances = right.square().sum(dim=1) - 2 * left @ right.T
    return torch.softmax(-distances / (2 * noise_to_signal), dim=1)


def kept_of(mixing: Tensor, spectrum: Spectrum) -> Tensor:
    """Return what is kept of the deviations from the mean along each principal axis.

    ``q^T W q`` of each axis q, ``(num_axes,)``, float64.
    """
    axes = spectrum.eigenvectors
    return (axes * (mixing @ axes)).sum(dim=0)


def share_of(mixing: Tensor, spectrum: Spectrum) -> float:
    """Return what is kept of the variance of all deviations from the mean together."""
    variances = spectrum.eigenvalues
    # Of vectors that are all the same there is nothing to keep, and no 0 / 0.
    return float((kept_of(mixing, spectrum) * variances).sum() / (variances.sum() or 1.0))


def excess_weights(weights: Tensor, min_contributors: int, own: int | None = None) -> Tensor:
    """Return by how much weights ``(num_clients,)`` exceed the cap for the privacy of others.

    A client that subtracts its own part from a mixture knows the rest of it. So none of the others
    may have more than ``1 / (min_contributors - 1)`` of their total weight. Where one has, the
    largest are cut down to the ``(min_contributors - 1)``-th largest; 1 or 2 cuts nothing.
    ``own`` is the place of the receiver, if it is one of the clients.
    """
    if min_contributors < 3:
        return torch.zeros_like(weights)
    sizes = weights.abs()
    if own is not None:
        sizes[own] = 0
    ordered = sizes.sort(descending=True).values
    if ordered[0] * (min_contributors - 1) <= ordered.sum():
        return torch.zeros_like(weights)
    cap = float(ordered[min_contributors - 2]) if min_contributors - 2 < len(ordered) else 0.0
    return weights.sign() * (sizes - cap).clamp(min=0)


class Capped(NamedTuple):
    """Rows of a mixing matrix without `excess_weights`."""

    weights: Tensor
    """What is left of the rows, ``(n, num_clients)``."""
    own: Tensor
    """What was taken, ``(n,)``: it goes to the receiver's own upload."""
    left: Tensor
    """How much of the others' part is left, ``(n,)``, 0 .. 1. The denoiser's changes are learned
    from the others too, and are scaled by it."""


def capped(rows: Tensor, min_contributors: int, own: Sequence[int | None]) -> Capped:
    """Return rows ``(n, num_clients)`` without `excess_weights`.

    ``own`` has the receivers' places among the clients, None for those that are not among them.
    """
    excess = torch.stack(
        [excess_weights(row, min_contributors, place) for row, place in zip(rows, own, strict=True)]
    )
    sizes = rows.abs()
    totals = sizes.sum(dim=1)
    others = totals.clone()
    for number, place in enumerate(own):
        if place is not None:
            others[number] -= sizes[number, place]
    # Without a noticeable part of others, their changes are left out too.
    taken = excess.abs().sum(dim=1) / torch.maximum(others, _NEGLIGIBLE * totals)
    return Capped(rows - excess, excess.sum(dim=1), 1 - taken)


def limited(mixing: Tensor, min_contributors: int) -> Tensor:
    """Return the matrix with each client's own upload in place of its `excess_weights`."""
    rows = capped(mixing, min_contributors, range(len(mixing)))
    return rows.weights + torch.diag(rows.own)


def are_alone(mixing: Tensor, min_contributors: int) -> Tensor:
    """Return which clients the cap leaves without any part of others, ``(num_clients,)``, bool.

    Less than a hundredth of all counts as none.
    """
    before, after = (
        (rows - torch.diag(rows.diagonal())).abs().sum(dim=1)
        for rows in (mixing, limited(mixing, min_contributors))
    )
    return (before >= _NEGLIGIBLE) & (after < _NEGLIGIBLE)
