"""Mixtures of clients' parameters, and how much of one client may be in them."""

from collections.abc import Sequence

import torch
from torch import Tensor


def withheld(weights: Tensor, min_kin: int, own: int | None = None) -> Tensor:
    """Return by how much the weights of a mixture are too large for the privacy of others.

    Who knows its own part of a mixture knows the rest of it. So none of the others may have more
    than ``1 / (min_kin - 1)`` of their weight. Where one has, the largest are cut down to the
    ``(min_kin - 1)``-th largest, so that as many others have the largest part.

    Parameters
    ----------
    weights
        Of the clients, ``(num_clients,)``.
    min_kin
        1 or 2 withholds nothing.
    own
        The place of who gets the mixture, if it is one of them.

    Returns
    -------
    Tensor
        What is to be taken from the weights, ``(num_clients,)``, 0 for most.
    """
    if min_kin < 3:
        return torch.zeros_like(weights)
    sizes = weights.abs()
    if own is not None:
        sizes[own] = 0
    ordered = sizes.sort(descending=True).values
    if ordered[0] * (min_kin - 1) <= ordered.sum():
        return torch.zeros_like(weights)
    cap = float(ordered[min_kin - 2]) if min_kin - 2 < len(ordered) else 0.0
    return weights.sign() * (sizes - cap).clamp(min=0)


def mix(weights: Tensor, vectors: Sequence[Tensor]) -> Tensor:
    """Return the sum of vectors ``(d,)`` with weights ``(num_vectors,)``."""
    mixture = torch.zeros_like(vectors[0])
    for weight, vector in zip(weights.tolist(), vectors, strict=True):
        if weight:  # most are exactly 0, which spares passes over large vectors
            mixture += weight * vector
    return mixture
