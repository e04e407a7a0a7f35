"""Mixtures of clients' parameters, by few passes over them."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Entries of a piece, over all vectors, so that its float64 copy stays small.
_CHUNK = 2**22
# So that it stays in a processor's cache while it is used.
_CACHED = 2**19


def mix(weights: Tensor, vectors: Sequence[Tensor]) -> Tensor:
    """Return sums of vectors ``(d,)`` with weights ``(..., num_vectors)``, ``(..., d)``.

    Many mixtures cost little more than one, whose cost is the pass over the vectors. The sums are
    in float64: rounded to float32, a mixture hardly ever depends on the others of its pass.
    """
    weights = weights.double()
    # Most are 0 where few clients are alike, which spares the pass over the others' vectors.
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
