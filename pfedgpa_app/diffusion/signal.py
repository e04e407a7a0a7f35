"""Which part of the differences between clients is their own, and which is noise."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pfedgpa_app.diffusion.subspace import Spectrum, chunks_of, rows_of

# What is kept of an axis is the third power of its part of signal: a model gains more from what
# clients share than the best estimate of its parameters would. Tuned on the digits, seeds 100, 101.
_CAUTION = 3
# Axes with less than this part of the largest variance say nothing.
_RELATIVE_TOLERANCE = 1e-12


class Shrinkage(NamedTuple):
    """How much is kept of what sets clients apart.

    Attributes
    ----------
    axes
        All principal axes as unit vectors over the clients, ``(num_clients, num_axes)``, float64.
    kept
        What is kept of the deviations from the mean along each axis, ``(num_axes,)``, float64,
        0 .. 1.
    share
        What is kept of all deviations together, ``()``, float64.
    """

    axes: Tensor
    kept: Tensor
    share: Tensor

    @classmethod
    def of(cls, spectrum: Spectrum, halves: Sequence[Tensor]) -> "Shrinkage":
        """Return what to keep of vectors with a spectrum, given each one's `normalized` moves."""
        kept = signal_parts(spectrum.eigenvectors, halves) ** _CAUTION
        # Axes that are rounding errors are no deviations from the mean either.
        kept[spectrum.max_rank :] = 0
        variances = spectrum.eigenvalues
        return cls(spectrum.eigenvectors, kept, (kept * variances).sum() / variances.sum())

    def weights(self, row: int, begin: int = 0) -> Tensor:
        """Return what one client is given of all clients' deviations, ``(num_clients,)``.

        ``begin`` leaves out the first axes.
        """
        axes = self.axes[:, begin:]
        return axes @ (self.kept[begin:] * axes[row])

    def company(self, row: int) -> Tensor:
        """Return whose way one client goes while it is away, ``(num_clients,)``.

        That is each one's part in what it is given, without those of whom it is given the opposite.
        """
        return (self.weights(row) + 1 / len(self.axes)).clamp(min=0)


def normalized(halves: Tensor) -> Tensor:
    """Return the moves of two halves, ``(2, d)``, scaled to a root mean square length of 1.

    How far a client moved then says nothing. Moves of 0 stay so.
    """
    length = float(halves.double().square().sum().div(2).sqrt())
    return halves / length if length else torch.zeros_like(halves)


def signal_parts(axes: Tensor, halves: Sequence[Tensor]) -> Tensor:
    """Return the part of the variance between clients that is signal, axis by axis.

    Every client trained on two halves of its images apart, from one model. What both halves ask for
    is the client's own; what only one asks for is noise of the images that it happens to have, and
    independent of the other's. With the moves A and B ``(num_clients, d)``, without their means
    over the clients, and ``H = (A + B) / 2``, the part along an axis q is
    ``q^T A B^T q / q^T H H^T q``, in 0 .. 1.

    A client whose moves are 0 says nothing about any axis. None counts for more than the median
    client: longer rows of A and B are shortened together.

    Parameters
    ----------
    axes
        Unit vectors over the clients, columns of ``(num_clients, num_axes)``, float64.
    halves
        Both moves of each client, ``(2, d)``.

    Returns
    -------
    Tensor
        ``(num_axes,)``, float64.
    """
    num_clients = len(halves)
    moves = [move for half in (0, 1) for move in (pair[half] for pair in halves)]
    gram = torch.zeros(2 * num_clients, 2 * num_clients, dtype=torch.float64)
    for chunk in chunks_of(moves):
        rows = rows_of(moves, chunk)
        gram += rows @ rows.T
    squares = gram.diagonal().view(2, num_clients).sum(dim=0)
    tells = (squares > 0).double()
    # Rows without the mean over those that tell something, for both halves at once.
    centred = torch.diag(tells) - torch.outer(tells, tells) / tells.sum().clamp(min=1)
    gram = torch.block_diag(centred, centred) @ gram @ torch.block_diag(centred, centred)
    lengths = gram.diagonal().view(2, num_clients).mean(dim=0).clamp(min=0).sqrt()
    typical = lengths[tells > 0].median() if bool(tells.any()) else lengths.sum()
    scales = torch.where(lengths > typical, typical / lengths, 1.0).repeat(2)
    blocks = (scales[:, None] * gram * scales).view(2, num_clients, 2, num_clients)
    signal, total = blocks[0, :, 1], blocks.sum(dim=(0, 2)) / 4
    along = (axes * (total @ axes)).sum(dim=0)
    parts = (axes * (signal @ axes)).sum(dim=0) / along
    return torch.where(along > _RELATIVE_TOLERANCE * along.max(), parts, 0.0).clamp(0, 1)
