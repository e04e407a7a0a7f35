"""Split-half estimates of signal and noise in the differences between clients."""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from pfedgpa_app.randomness import make_generator

SKETCH = 2048
"""Size of the sketch of an update: 8 kB to send, whatever the model's size."""

# Cosines up to this may be errors of the sketches: two standard deviations of them.
_SKETCH_ERROR = 2 / SKETCH**0.5
# Largest noise that a client can claim, in units of the median client's.
_MAX_NOISE = 4.0
# Axes with less than this part of the largest variance have no estimate.
_RELATIVE_TOLERANCE = 1e-12


def sketched(move: Tensor) -> Tensor:
    """Return a random projection ``(SKETCH,)`` of an update ``(d,)``: its count sketch.

    Each entry is added, with a random sign, to one of ``SKETCH`` random places, which are the same
    for all updates of a length. Inner products keep their values but for an error of the order of
    ``|a| |b| / sqrt(SKETCH)`` (Charikar, Chen and Farach-Colton, 2002).
    """
    generator = make_generator(0, "sketch", SKETCH)
    places = torch.randint(SKETCH, move.shape, generator=generator)
    signs = torch.randint(2, move.shape, generator=generator) * 2 - 1
    zeros = torch.zeros(SKETCH, dtype=torch.float64)
    return zeros.index_add(0, places, signs * move.double()).float()


def normalized(halves: Tensor) -> Tensor:
    """Return the updates of two halves, ``(2, size)``, with a root mean square length of 1.

    Clients with long updates then count no more than others. Zeros stay zeros.
    """
    length = float(halves.double().square().sum().div(2).sqrt())
    return halves / length if length else torch.zeros_like(halves)


def centred(halves: Tensor) -> Tensor:
    """Return the updates of clients, ``(num_clients, 2, size)``, less their mean over the clients.

    All start from the same parameters: the mean is their common update, the rest a client's own.
    Zeros stand for a missing report: they are no part of the mean, and stay zeros.
    """
    present = halves.flatten(1).any(dim=1)
    if not bool(present.any()):
        return halves
    mean = halves[present].double().mean(dim=0)
    return torch.where(present[:, None, None], halves - mean, 0.0).to(halves)


def signal_parts(axes: Tensor, halves: Tensor) -> Tensor:
    """Return the part of the variance between clients that is signal, ``(num_axes,)``, float64.

    Axes are unit vectors over the clients, columns of ``(num_clients, num_axes)``, float64; halves
    are both `centred` updates of each client, ``(num_clients, 2, size)``.

    Every client trained on two halves of its examples apart, from common parameters. What both
    updates share is the client's signal; the rest is sampling noise, independent between the
    halves. With the `centred` updates A and B
    ``(num_clients, size)`` and ``H = (A + B) / 2``, the part along an axis q is
    ``q^T A B^T q / q^T H H^T q``, in 0 .. 1.

    A client whose updates are zero, or contradict each other, is left out. None counts for more
    than the median client: longer rows of A and B are shortened together. Nobody can lower the
    signal of an axis by more than its own noise explains: the part is at least
    ``1 - 2 sum_i q_i^2 n_i / q^T H H^T q``, where ``n_i = |A_i - B_i|^2 / 4`` is each client's
    noise, at most four times the median client's.
    """
    moves = halves.double()
    counts = cosine_similarity(moves[:, 0], moves[:, 1], dim=1) > -_SKETCH_ERROR
    counts &= moves.flatten(1).any(dim=1)
    if not bool(counts.any()):
        return torch.zeros(axes.shape[1], dtype=torch.float64)
    lengths = moves.square().sum(dim=2).mean(dim=1).sqrt()
    typical = lengths[counts].median()
    scales = torch.where(lengths > typical, typical / lengths, 1.0) * counts
    # The projections of both halves onto each axis, (num_axes, size).
    first, second = ((axes * scales[:, None]).T @ half for half in moves.unbind(dim=1))
    signal = (first * second).sum(dim=1)
    total = ((first + second) / 2).square().sum(dim=1)
    noise = scales.square() * (moves[:, 0] - moves[:, 1]).square().sum(dim=1) / 4
    noise = axes.square().T @ noise.clamp(max=_MAX_NOISE * float(noise[counts].median()))
    is_known = total > _RELATIVE_TOLERANCE * total.max()
    return torch.where(is_known, torch.maximum(signal, total - 2 * noise) / total, 0.0).clamp(0, 1)


def agreement(halves: Tensor, others: Tensor) -> Tensor:
    """Return the cosine between the signal in a client's updates and in those of others.

    With the `centred` updates A and B of a client ``(2, size)`` and of others
    ``(num_clients, 2, size)`` it is, in float64,
    ``(A_i^T B_j + B_i^T A_j) / 2 sqrt(A_i^T B_i A_j^T B_j)``. The noise of two halves is
    independent and averages out of these products: clients of one distribution have 1, however few
    examples they have. It is 0 where a client's own halves agree by no more than the sketches'
    error, for then there is no signal to compare.
    """
    one, many = halves.double(), others.double()
    products = (many[:, 0] @ one[1] + many[:, 1] @ one[0]) / 2
    signal = (many[:, 0] * many[:, 1]).sum(dim=1) * (one[0] @ one[1])
    own = cosine_similarity(one[0], one[1], dim=0)
    agrees = cosine_similarity(many[:, 0], many[:, 1], dim=1).clamp(max=own) > _SKETCH_ERROR
    return torch.where(agrees, products / signal.abs().sqrt(), 0.0).clamp(-1, 1)
