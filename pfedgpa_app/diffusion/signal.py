"""Which part of the differences between clients is their own, and which is noise."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pfedgpa_app.diffusion.subspace import chunks_of, rows_of


def normalized(halves: Tensor) -> Tensor:
    """Return the moves of two halves, ``(2, d)``, scaled to a root mean square length of 1.

    How far a client moved then says nothing, so that none outweighs the others.
    """
    length = float(halves.double().square().sum().div(2).sqrt())
    return halves / length if length else torch.zeros_like(halves)


def signal_parts(eigenvectors: Tensor, halves: Sequence[Tensor]) -> Tensor:
    """Return the part of the variance between clients that is signal, axis by axis.

    Every client trained on two halves of its images apart, from the same model. What both halves
    ask for is the client's own; what only one asks for is noise of the images that it happens to
    have, and independent of the other's. With the moves A and B ``(num_clients, d)`` of all
    clients, without their means, and ``H = (A + B) / 2``, the part along an axis q is
    ``q^T A B^T q / q^T H H^T q``, in 0 .. 1.

    Parameters
    ----------
    eigenvectors
        The axes as unit vectors over the clients, columns of ``(num_clients, num_axes)``, float64,
        as `Spectrum` has them.
    halves
        Both moves of each client, ``(2, d)``.

    Returns
    -------
    Tensor
        ``(num_axes,)``, float64.
    """
    num_clients = len(halves)
    signal = torch.zeros(num_clients, num_clients, dtype=torch.float64)
    total = torch.zeros_like(signal)
    one, other = ([moves[half] for moves in halves] for half in (0, 1))
    for chunk in chunks_of(one):
        a, b = (rows - rows.mean(dim=0) for rows in (rows_of(one, chunk), rows_of(other, chunk)))
        mean = (a + b) / 2
        signal += a @ b.T
        total += mean @ mean.T
    along = (eigenvectors * (total @ eigenvectors)).sum(dim=0)
    parts = (eigenvectors * (signal @ eigenvectors)).sum(dim=0) / along
    # Where nobody moved there is no signal either.
    return torch.where(along > 1e-12 * along.max(), parts, 0.0).clamp(0, 1)
