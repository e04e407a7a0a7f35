"""What the server learned in a round, in few enough numbers to write them down every time."""

import torch
from torch import Tensor

from pfedgpa_app.aggregation import GenerativeAggregator
from pfedgpa_app.diffusion.mixing import capped, kept_of, limited
from pfedgpa_app.diffusion.subspace import Spectrum, Subspace
from pfedgpa_app.randomness import repeatable
from pfedgpa_app.rounds import Row

MAX_CLIENTS = 100
"""So many members have coordinates, those with the lowest numbers. More have no mixing weights."""
MAX_AXES = 100
"""So many axes of the spectrum are written down."""


def trace_of(aggregator: GenerativeAggregator) -> Row:
    """Return what the last `fit` found, as numbers that JSON takes; nothing for one member.

    ``clients``
        The members that have coordinates, by number; ``members`` is how many there are.
    ``uploads``, ``generated``
        Two coordinates of each one's last upload, brought up to date, and of what was generated
        for it: along the first two principal axes of all members' uploads of this round, from
        their mean, in units of parameters. ``explained`` is the part of the variance on each axis.
    ``mixing-weights``
        A row a client: the part of each client's upload in what it receives.
    ``parameters``, ``spectrum``, ``floor``, ``rank``, ``start``, ``noise``, ``kept``
        How many parameters are generated, variances along the principal axes, the floor, how many
        axes the denoiser has, its first timestep, the variance of the noise there along each axis
        in the same units, and what is kept of each axis. Where everyone keeps its upload there are
        none of the last four.
    """
    members = aggregator.bank.members
    clients = sorted(members)
    if len(clients) < 2:
        return {}
    with repeatable(num_threads=1):
        vectors = [members[client] for client in clients]
        spectrum = aggregator.spectrum or Spectrum.of(vectors)
        plane = Subspace.fit(vectors, 2, spectrum)
        mixing = limited(aggregator.mixing, aggregator.config.min_contributors)[:MAX_CLIENTS]
        uploads, generated = _seen_in(plane, aggregator, vectors, mixing)
        total = float(spectrum.eigenvalues.sum())
        row: Row = {
            "members": len(clients),
            "clients": clients[:MAX_CLIENTS],
            "uploads": [_shorts(point) for point in uploads[:MAX_CLIENTS]],
            "generated": [_shorts(point) for point in generated],
            "explained": _shorts(spectrum.eigenvalues[:2] / (total or 1.0)),
        }
        if len(clients) <= MAX_CLIENTS:
            # Without -0.0.
            row["mixing-weights"] = [[round(w, 4) + 0.0 for w in each] for each in mixing.tolist()]
        return row | _spectrum_of(aggregator, len(vectors[0]))


def _seen_in(
    plane: Subspace, aggregator: GenerativeAggregator, vectors: list[Tensor], mixing: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the coordinates of uploads ``(n, 2)`` and of generated models, a row of ``mixing``."""
    axes = torch.zeros(2, len(plane.mean))
    axes[: plane.dim] = plane.basis
    uploads = torch.stack([axes @ (vector - plane.mean) for vector in vectors]).double()
    generated, model = mixing @ uploads, aggregator.model
    if model is not None:
        all_rows = aggregator.mixing
        left = capped(all_rows, aggregator.config.min_contributors, range(len(all_rows))).left
        changes = [axes @ model.space.displacement(change) for change in model.changes]
        generated += (left[:, None] * (all_rows @ torch.stack(changes).double()))[: len(generated)]
    return uploads, generated


def _spectrum_of(aggregator: GenerativeAggregator, num_parameters: int) -> Row:
    spectrum, model = aggregator.spectrum, aggregator.model
    if spectrum is None:
        return {}
    row: Row = {
        "parameters": num_parameters,
        "spectrum": _shorts(spectrum.eigenvalues[:MAX_AXES]),
        "floor": _short(spectrum.floor),
    }
    if model is None:
        return row
    if isinstance(model.space, Subspace):
        rank, noise = model.space.dim, _short(model.noise_to_signal * model.space.scale**2)
        row |= {"rank": rank, "start": model.start, "noise": noise if rank else None}
    return row | {"kept": _shorts(kept_of(aggregator.mixing, spectrum)[:MAX_AXES])}


def _short(value: float) -> float:
    """Return a number with five significant digits."""
    return float(f"{value:.5g}")


def _shorts(values: Tensor) -> list[float]:
    return [_short(value) for value in values.tolist()]
