"""Mixtures of clients' parameters, and how much of one client may be in them."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Entries of a piece, over all vectors, so that its float64 copy stays small.
_CHUNK = 2**22
# So that it stays in a processor's cache while it is used.
_CACHED = 2**19


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
    """Return sums of vectors ``(d,)`` with weights ``(..., num_vectors)``, ``(..., d)``.

    Many mixtures cost little more than one, whose cost is the pass over the vectors. The sums are
    in float64: rounded to float32, a mixture hardly ever depends on the others of its pass.
    """
    weights = weights.double()
    # Most are 0 where clients have few kin, which spares the pass over the others' vectors.
    used = weights.reshape(-1, len(vectors)).any(dim=0).nonzero()[:, 0].tolist()
    mixtures = vectors[0].new_zeros(*weights.shape[:-1], len(vectors[0]))
    parts, weights = [vectors[place] for place in used], weights[..., used]
    for chunk, rows in pieces_of(parts, _CACHED) if parts else ():
        mixtures[..., chunk] = (weights @ rows).to(mixtures.dtype)
    return mixtures


def pieces_of(vectors: Sequence[Tensor], size: int = _CHUNK) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of vectors ``(d,)``, and these pieces as rows ``(num_vectors, width)``, float64.

    All pieces are copied to one place of ``size`` entries: a new one each time costs as much as
    the work on it.
    """
    width = max(1, min(size // len(vectors), len(vectors[0])))
    place = torch.empty(len(vectors) * width, dtype=torch.float64)
    for begin in range(0, len(vectors[0]), width):
        chunk = slice(begin, begin + width)
        pieces = [vector[chunk] for vector in vectors]
        rows = place[: len(pieces) * len(pieces[0])].view(len(pieces), -1)
        for row, piece in zip(rows, pieces, strict=True):
            row.copy_(piece)
        yield chunk, rows
