"""A model's state_dict as one vector of generated parameters and an averaged rest."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

StateDict = dict[str, Tensor]

# What fits into a float32 vector without rounding.
_GENERATED_DTYPES = (torch.float32, torch.float16)
# Squares and sums of anything larger leave float32; no model has such parameters.
MAX_ABSOLUTE = 1e12
# Buffers of torch's normalization layers: statistics of the data, not parameters.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_NEVER_NEGATIVE = ("running_var", "num_batches_tracked")


def copy_of(state: Mapping[str, Tensor]) -> StateDict:
    """Return a copy of a state_dict, contiguous and on the CPU, free of later training."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


def head_names(names: Iterable[str]) -> list[str]:
    """Return those of the last module among a state_dict's names: its head, the classifier."""
    ordered = list(names)
    prefix = ordered[-1].rpartition(".")[0]
    return [name for name in ordered if name.rpartition(".")[0] == prefix]


class ParameterError(ValueError):
    """Parameters that do not belong to the model, or that no one should train on."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a state_dict."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class ParameterLayout:
    """Which tensors of a model are generated, in the order of the vector, and which are averaged.

    A tensor is generated if a pattern (``fnmatch`` on its name) takes it and float32 holds it
    exactly. Integer tensors, float64 tensors and the statistics of normalization layers are
    averaged whatever the patterns say.
    """

    entries: tuple[Entry, ...]
    generated: tuple[Entry, ...]

    @classmethod
    def of(cls, state: Mapping[str, Tensor], patterns: Sequence[str] = ("*",)) -> "ParameterLayout":
        """Return the layout of a state_dict.

        Raises
        ------
        ParameterError
            If a pattern takes no tensor, or nothing would be generated.
        """
        entries = tuple(Entry(name, tuple(t.shape), t.dtype) for name, t in state.items())
        for pattern in patterns:
            if not any(fnmatchcase(entry.name, pattern) for entry in entries):
                raise ParameterError(
                    f'no tensor of the model fits the pattern "{pattern}": {", ".join(state)}'
                )
        generated = tuple(
            entry
            for entry in entries
            if entry.dtype in _GENERATED_DTYPES
            and entry.name.rpartition(".")[2] not in _STATISTICS
            and any(fnmatchcase(entry.name, pattern) for pattern in patterns)
        )
        if not generated:
            raise ParameterError(
                f"nothing to generate: {', '.join(patterns)} takes no float32 or float16 "
                "parameter of the model"
            )
        return cls(entries, generated)

    @property
    def dim(self) -> int:
        """Length d of the vector of generated parameters."""
        return sum(entry.numel for entry in self.generated)

    def split(self, state: Mapping[str, Tensor]) -> tuple[Tensor, StateDict]:
        """Return the generated parameters as a float32 vector ``(dim,)``, and the rest."""
        vector = torch.cat([state[entry.name].reshape(-1).float() for entry in self.generated])
        return vector, self.rest(state)

    def merge(self, vector: Tensor, rest: Mapping[str, Tensor]) -> StateDict:
        """Return the state_dict of a vector ``(dim,)`` and a rest, the inverse of `split`."""
        pieces = torch.split(vector, [entry.numel for entry in self.generated])
        generated = {
            entry.name: piece.reshape(entry.shape).to(entry.dtype)
            for entry, piece in zip(self.generated, pieces, strict=True)
        }
        merged = {**rest, **generated}
        return {entry.name: merged[entry.name] for entry in self.entries}

    def rest(self, state: Mapping[str, Tensor]) -> StateDict:
        """Return what of a state_dict is averaged."""
        names = {entry.name for entry in self.generated}
        return {entry.name: state[entry.name] for entry in self.entries if entry.name not in names}

    def check_names(self, state: Iterable[str]) -> None:
        """Refuse names that are not those of this model.

        Raises
        ------
        ParameterError
            Naming what is missing, or what is too much.
        """
        given = set(state)
        names = {entry.name for entry in self.entries}
        if missing := names - given:
            raise ParameterError(f"no tensor {', '.join(sorted(missing))}")
        if unknown := given - names:
            raise ParameterError(f"the model has no tensor {', '.join(sorted(unknown)[:5])[:300]}")

    def check(self, state: Mapping[str, Tensor]) -> None:
        """Refuse a state_dict that is not one of this model, or that no one can compute with.

        Raises
        ------
        ParameterError
            Naming the first tensor that is wrong, and what would be right.
        """
        self.check_names(state)
        for entry in self.entries:
            tensor = state[entry.name]
            if tuple(tensor.shape) != entry.shape:
                raise ParameterError(
                    f"{entry.name} has the shape {tuple(tensor.shape)} instead of {entry.shape}"
                )
            if tensor.dtype != entry.dtype:
                raise ParameterError(f"{entry.name} is {tensor.dtype} instead of {entry.dtype}")
            if not bool(((tensor > -MAX_ABSOLUTE) & (tensor < MAX_ABSOLUTE)).all()):
                raise ParameterError(
                    f"{entry.name} has values that are not finite, or beyond {MAX_ABSOLUTE:.0e}"
                )
            if entry.name.rpartition(".")[2] in _NEVER_NEGATIVE and bool((tensor < 0).any()):
                raise ParameterError(f"{entry.name} has negative values, and should have none")


def weighted_average(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> StateDict:
    """Return the FedAvg average of state_dicts of one layout, computed in float64.

    Integer tensors are averaged and rounded.

    Raises
    ------
    ValueError
        If there is nothing to average or the weights do not sum to a positive number.
    """
    total = sum(weights)
    if not states or not total > 0:
        raise ValueError(f"an average needs states and a positive weight, got weights {weights}")
    averaged = {}
    for name, first in states[0].items():
        mean = sum(
            (
                state[name].double() * (weight / total)
                for state, weight in zip(states, weights, strict=True)
            ),
            start=torch.zeros(first.shape, dtype=torch.float64),
        )
        averaged[name] = (mean if first.is_floating_point() else mean.round()).to(first.dtype)
    return averaged
