"""A model's state_dict as one vector of generated parameters and a rest that is averaged."""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor

StateDict = dict[str, Tensor]

# Exact in a float32 vector.
_GENERATED_DTYPES = (torch.float32, torch.float16)
# Squares and sums of larger values overflow float32.
MAX_ABSOLUTE = 1e12
# Buffers of torch's normalization layers: statistics of the data, not parameters.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_NEVER_NEGATIVE = ("running_var", "num_batches_tracked")
# Inserted into names by torch.nn.utils.parametrize.
_PARAMETRIZED = re.compile(r"(^|\.)parametrizations\..*$")


def copy_of(state: Mapping[str, Tensor]) -> StateDict:
    """Return a detached, contiguous copy of a state_dict on the CPU."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


def layer_of(name: str) -> str:
    """Return the layer that an entry of a state_dict belongs to; "" is the model itself.

    A parametrized tensor, such as those of weight normalization, belongs to the parametrized layer.
    """
    layer = _PARAMETRIZED.sub("", name)
    return layer if layer != name else name.rpartition(".")[0]


def head_names(names: Iterable[str]) -> list[str]:
    """Return the entries of the last layer in a state_dict, by convention the head.

    `find_head` finds the head by what layers compute.
    """
    ordered = list(names)
    return [name for name in ordered if layer_of(name) == layer_of(ordered[-1])]


def default_trained(state: Mapping[str, Tensor]) -> frozenset[str]:
    """Guess which entries of a state_dict train, by names and dtypes.

    These are all floating point entries but the statistics of normalization layers.
    """
    return frozenset(
        name
        for name, tensor in state.items()
        if tensor.is_floating_point() and name.rpartition(".")[2] not in _STATISTICS
    )


class ParameterError(ValueError):
    """Parameters that do not fit the model, or have invalid values."""


class UnboundedError(ParameterError):
    """Parameters that are NaN, infinite or huge."""


class Entry(NamedTuple):
    """One tensor of a state_dict."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trains: bool = True
    """Whether it is a trained parameter, and not a frozen weight or a buffer."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ParameterLayout:
    """Which tensors of a model are generated, in the order of the vector, and which are averaged.

    A tensor is generated if it trains, matches a pattern (``fnmatch`` on its name) and is exact in
    float32. All others are averaged: integers, float64, buffers and frozen weights. A tied tensor
    is in the vector once.
    """

    entries: tuple[Entry, ...]
    """All tensors, in the order of the state_dict."""
    generated: tuple[Entry, ...]
    """Those in the vector, in its order."""
    aliases: Mapping[str, str] = field(default_factory=dict, compare=False)
    """The other names of tied tensors, with the first name of each."""
    fixed: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    """Tensors that never change, by name. Uploads must not change them."""
    unbounded: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    """Buffers with infinite or huge initial values, such as masks. Where they differ from these
    values they must be bounded."""
    sends_fixed: bool = True
    """Whether messages contain the fixed tensors."""

    @classmethod
    def of(
        cls,
        state: Mapping[str, Tensor],
        patterns: Sequence[str] = ("*",),
        *,
        trained: Collection[str] | None = None,
        aliases: Mapping[str, str] | None = None,
        fixed: Collection[str] = (),
        sends_fixed: bool = True,
    ) -> "ParameterLayout":
        """Return the layout of a state_dict.

        ``trained`` has the names of the tensors that train (by default `default_trained`), and
        ``fixed`` the names of those that never change. Raises `ParameterError` if a pattern matches
        no tensor, or nothing would be generated.
        """
        trained = default_trained(state) if trained is None else trained
        aliases = aliases or {}
        matched = set[str]()
        for pattern in patterns:
            names = [name for name in state if fnmatchcase(name, pattern)]
            if not names:
                raise ParameterError(
                    f'no tensor of the model matches the pattern "{pattern}": {", ".join(state)}'
                )
            matched.update(aliases.get(name, name) for name in names)
        entries = tuple(
            Entry(name, tuple(t.shape), t.dtype, name in trained) for name, t in state.items()
        )
        generated = tuple(
            entry
            for entry in entries
            if entry.trains and entry.dtype in _GENERATED_DTYPES and entry.name in matched
        )
        if not generated:
            raise ParameterError(
                f"nothing to generate: {', '.join(patterns)} matches no float32 or float16 "
                "parameter of the model that trains"
            )
        unbounded = {
            name: tensor
            for name, tensor in state.items()
            if name not in trained and not is_bounded(tensor)
        }
        kept = {name: state[name] for name in fixed}
        return cls(entries, generated, aliases, kept, unbounded, sends_fixed)

    @property
    def dim(self) -> int:
        """Length d of the vector of generated parameters."""
        return sum(entry.numel for entry in self.generated)

    @property
    def sent(self) -> tuple[Entry, ...]:
        """The tensors that messages contain."""
        return tuple(e for e in self.entries if self.sends_fixed or e.name not in self.fixed)

    def split(self, state: Mapping[str, Tensor]) -> tuple[Tensor, StateDict]:
        """Return the generated parameters as a float32 vector ``(dim,)``, and the rest."""
        vector = torch.cat([state[entry.name].reshape(-1).float() for entry in self.generated])
        return vector, self.rest(state)

    def merge(self, vector: Tensor, rest: Mapping[str, Tensor]) -> StateDict:
        """Return the state_dict of a vector ``(dim,)`` and a rest, the inverse of `split`."""
        pieces = torch.split(vector, [entry.numel for entry in self.generated])
        merged = dict(rest)
        for entry, piece in zip(self.generated, pieces, strict=True):
            merged[entry.name] = piece.reshape(entry.shape).to(entry.dtype)
        return {e.name: merged[self.aliases.get(e.name, e.name)] for e in self.entries}

    def rest(self, state: Mapping[str, Tensor]) -> StateDict:
        """Return the averaged entries of a state_dict."""
        generated = {entry.name for entry in self.generated}
        names = (entry.name for entry in self.entries)
        return {n: state[n] for n in names if self.aliases.get(n, n) not in generated}

    def to_send(self, state: StateDict) -> StateDict:
        """Return the entries that a message contains; the same object if these are all."""
        if self.sends_fixed:
            return state
        return {name: tensor for name, tensor in state.items() if name not in self.fixed}

    def received(self, state: Mapping[str, Tensor]) -> StateDict:
        """Return the complete state_dict of a message that has passed `check`.

        Fixed tensors are taken from the layout, and tied ones are one object, to save memory.
        """
        whole = {**state, **self.fixed}
        return {e.name: whole[self.aliases.get(e.name, e.name)] for e in self.entries}

    def check_names(self, state: Iterable[str]) -> None:
        """Refuse a message whose names differ from those of this model.

        Raises `ParameterError`, naming missing or unknown tensors.
        """
        given, names = set(state), {entry.name for entry in self.sent}
        if missing := names - given:
            raise ParameterError(f"no tensor {', '.join(sorted(missing))}")
        if unknown := given - names:
            raise ParameterError(f"the model has no tensor {', '.join(sorted(unknown)[:5])[:300]}")

    def check(self, state: Mapping[str, Tensor]) -> None:
        """Refuse a message that does not fit this model, or has invalid values.

        Raises `ParameterError`, naming the first wrong tensor, and what would be right.
        """
        self.check_names(state)
        for entry in self.sent:
            self._check_entry(entry, state[entry.name])

    def _check_entry(self, entry: Entry, tensor: Tensor) -> None:
        if tuple(tensor.shape) != entry.shape:
            raise ParameterError(
                f"{entry.name} has the shape {tuple(tensor.shape)} instead of {entry.shape}"
            )
        if tensor.dtype != entry.dtype:
            raise ParameterError(f"{entry.name} is {tensor.dtype} instead of {entry.dtype}")
        if entry.name in self.fixed:
            if not same(tensor, self.fixed[entry.name]):
                raise ParameterError(f"{entry.name} does not train, and was changed")
            return
        bounded = _bounded(tensor)
        if entry.name in self.unbounded:
            bounded |= _equal(tensor, self.unbounded[entry.name])
        if not bool(bounded.all()):
            raise UnboundedError(
                f"{entry.name} has values that are not finite, or beyond {MAX_ABSOLUTE:.0e}"
            )
        is_statistic = not entry.trains and entry.name.rpartition(".")[2] in _NEVER_NEGATIVE
        if is_statistic and bool((tensor < 0).any()):
            raise ParameterError(f"{entry.name} has negative values, and should have none")


def is_bounded(tensor: Tensor) -> bool:
    """Return whether all absolute values are below `MAX_ABSOLUTE`."""
    return bool(_bounded(tensor).all())


def _bounded(tensor: Tensor) -> Tensor:
    return (tensor > -MAX_ABSOLUTE) & (tensor < MAX_ABSOLUTE)


def same(left: Tensor, right: Tensor) -> bool:
    """Return whether two tensors of one shape are equal, with NaN equal to NaN."""
    return bool(_equal(left, right).all())


def _equal(left: Tensor, right: Tensor) -> Tensor:
    """Return where two tensors are equal, with NaN equal to NaN."""
    return (left == right) | (left.isnan() & right.isnan())


def weighted_average(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> StateDict:
    """Return the weighted average of state_dicts of one layout, computed in float64.

    Integer tensors are averaged and rounded. Tensors equal in all states stay bit-identical. Raises
    `ValueError` if there are no states, or the sum of weights is not positive.
    """
    total = sum(weights)
    if not states or not total > 0:
        raise ValueError(f"an average needs states and a positive weight, got weights {weights}")
    weighted = [(state, w / total) for state, w in zip(states, weights, strict=True)]
    averaged = {}
    for name, first in states[0].items():
        if all(torch.equal(first, state[name]) for state in states[1:]):
            averaged[name] = first
            continue
        mean = sum(
            (state[name].double() * part for state, part in weighted),
            start=torch.zeros(first.shape, dtype=torch.float64),
        )
        averaged[name] = (mean if first.is_floating_point() else mean.round()).to(first.dtype)
    return averaged
