"""Which part of the differences between clients is their own, and which is noise."""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from pfedgpa_app.randomness import make_generator

SKETCH = 2048
"""Numbers that stand for a move, so that it costs a client next to nothing to tell it."""

# Cosines up to this may be errors of the sketches: two standard deviations of them.
_SKETCH_ERROR = 2 / SKETCH**0.5
# How much more noise than the median client any client can say that it has.
_MAX_NOISE = 4.0
# Axes with less than this part of the largest variance say nothing.
_RELATIVE_TOLERANCE = 1e-12


def sketched(move: Tensor, size: int = SKETCH) -> Tensor:
    """Return a random projection ``(size,)`` of a move ``(d,)``: its count sketch.

    Each entry is added, with a random sign, to one of ``size`` random places, which are the same
    for all moves of a length. Inner products keep their values but for an error of the order of
    ``|a| |b| / sqrt(size)`` (Charikar, Chen and Farach-Colton, 2002).
    """
    generator = make_generator(0, "sketch", size)
    places = torch.randint(size, move.shape, generator=generator)
    signs = torch.randint(2, move.shape, generator=generator) * 2 - 1
    zeros = torch.zeros(size, dtype=torch.float64)
    return zeros.index_add(0, places, signs * move.double()).float()


def normalized(halves: Tensor) -> Tensor:
    """Return the moves of two halves, ``(2, size)``, with a root mean square length of 1.

    How far a client moved then says nothing. Moves of 0 stay so.
    """
    length = float(halves.double().square().sum().div(2).sqrt())
    return halves / length if length else torch.zeros_like(halves)


def centred(halves: Tensor) -> Tensor:
    """Return the moves of clients, ``(num_clients, 2, size)``, less their mean over the clients.

    All start from the same parameters, so that the mean is what all of them did, and what is left
    is a client's own. Moves of 0 say nothing: they are no part of the mean, and stay so.
    """
    tells = halves.flatten(1).any(dim=1)
    if not bool(tells.any()):
        return halves
    return torch.where(tells[:, None, None], halves - halves[tells].double().mean(dim=0), 0.0).to(
        halves
    )


def signal_parts(axes: Tensor, halves: Tensor) -> Tensor:
    """Return the part of the variance between clients that is signal, ``(num_axes,)``, float64.

    Axes are unit vectors over the clients, columns of ``(num_clients, num_axes)``, float64; halves
    are both `centred` moves of each client, ``(num_clients, 2, size)``.

    Every client trained on two halves of its images apart, from what all have in common. What both
    halves ask for is the client's own; what only one asks for is noise of the images that it
    happens to have, and independent of the other's. With the `centred` moves A and B
    ``(num_clients, size)`` and ``H = (A + B) / 2``, the part along an axis q is
    ``q^T A B^T q / q^T H H^T q``, in 0 .. 1.

    A client whose moves are 0, or contradict each other, says nothing about any axis. None counts
    for more than the median client: longer rows of A and B are shortened together. Nobody can make
    of an axis less signal than its own noise explains: the part is at least
    ``1 - 2 sum_i q_i^2 n_i / q^T H H^T q``, where ``n_i = |A_i - B_i|^2 / 4`` is each client's
    noise, at most four times the median client's.
    """
    moves = halves.double()
    tells = cosine_similarity(moves[:, 0], moves[:, 1], dim=1) > -_SKETCH_ERROR
    tells &= moves.flatten(1).any(dim=1)
    if not bool(tells.any()):
        return torch.zeros(axes.shape[1], dtype=torch.float64)
    lengths = moves.square().sum(dim=2).mean(dim=1).sqrt()
    typical = lengths[tells].median()
    scales = torch.where(lengths > typical, typical / lengths, 1.0) * tells
    # What each half of the clients' images says along each axis, (2, num_axes, size).
    first, second = ((axes * scales[:, None]).T @ half for half in moves.unbind(dim=1))
    signal = (first * second).sum(dim=1)
    total = ((first + second) / 2).square().sum(dim=1)
    noise = scales.square() * (moves[:, 0] - moves[:, 1]).square().sum(dim=1) / 4
    noise = axes.square().T @ noise.clamp(max=_MAX_NOISE * float(noise[tells].median()))
    is_said = total > _RELATIVE_TOLERANCE * total.max()
    return torch.where(is_said, torch.maximum(signal, total - 2 * noise) / total, 0.0).clamp(0, 1)


def agreement(halves: Tensor, others: Tensor) -> Tensor:
    """Return how far clients ask for the same: the cosine of what is signal in their moves.

    With the `centred` moves A and B of a client ``(2, size)`` and of others
    ``(num_clients, 2, size)`` it is, in float64,
    ``(A_i^T B_j + B_i^T A_j) / 2 sqrt(A_i^T B_i A_j^T B_j)``. The images of two halves are not the
    same, so that noise is on average in none of these products: clients of one distribution are at
    1, whatever they lack in images. It is 0 for those whose own halves agree by no more than the
    sketches' error, so that no cosine is one of nearly nothing.
    """
    one, many = halves.double(), others.double()
    products = (many[:, 0] @ one[1] + many[:, 1] @ one[0]) / 2
    signal = (many[:, 0] * many[:, 1]).sum(dim=1) * (one[0] @ one[1])
    own = cosine_similarity(one[0], one[1], dim=0)
    agrees = cosine_similarity(many[:, 0], many[:, 1], dim=1).clamp(max=own) > _SKETCH_ERROR
    return torch.where(agrees, products / signal.abs().sqrt(), 0.0).clamp(-1, 1)
