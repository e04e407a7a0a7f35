"""A model's state_dict as one vector of generated parameters and an averaged rest."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
# What torch.nn.utils.parametrize puts between a layer and its tensors.
_PARAMETRIZED = re.compile(r"(^|\.)parametrizations\..*$")


def copy_of(state: Mapping[str, Tensor]) -> StateDict:
    """Return a copy of a state_dict, contiguous and on the CPU, free of later training."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


def layer_of(name: str) -> str:
    """Return the layer that an entry of a state_dict belongs to; "" is the model itself.

    A parametrized tensor, such as that of a weight-normed layer, belongs to the layer whose weight
    it makes.
    """
    layer = _PARAMETRIZED.sub("", name)
    return layer if layer != name else name.rpartition(".")[0]


def head_names(names: Iterable[str]) -> list[str]:
    """Return the entries of the last layer in a state_dict.

    That is where a model's head, the classifier, is by custom. `find_head` knows it by what the
    layers do.
    """
    ordered = list(names)
    return [name for name in ordered if layer_of(name) == layer_of(ordered[-1])]


def default_trained(state: Mapping[str, Tensor]) -> frozenset[str]:
    """Return which entries of a state_dict train, as far as names and types tell it.

    These are all of floating point but the statistics of normalization layers.
    """
    return frozenset(
        name
        for name, tensor in state.items()
        if tensor.is_floating_point() and name.rpartition(".")[2] not in _STATISTICS
    )


class ParameterError(ValueError):
    """Parameters that do not belong to the model, or that no one should train on."""


class UnboundedError(ParameterError):
    """Parameters that are NaN, infinite or huge."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a state_dict.

    Attributes
    ----------
    trains
        Whether training changes it by its gradient; otherwise it is a frozen weight or a buffer.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trains: bool = True

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class ParameterLayout:
    """Which tensors of a model are generated, in the order of the vector, and which are averaged.

    A tensor is generated if it trains, a pattern (``fnmatch`` on its name) takes it and float32
    holds it exactly. All others are averaged whatever the patterns say: integers, float64, buffers
    and frozen weights. A tensor with several names has one place in the vector.

    Attributes
    ----------
    entries
        All tensors, in the order of the state_dict.
    generated
        Those in the vector, in its order.
    aliases
        The other names of tied tensors, with the first name of each.
    fixed
        Tensors that never change, by name. Uploads must have them as they are.
    unbounded
        Those buffers whose initial values are infinite or huge, such as masks. Other values than
        these must be finite, as everywhere.
    sends_fixed
        Whether messages contain what is fixed.
    """

    entries: tuple[Entry, ...]
    generated: tuple[Entry, ...]
    aliases: Mapping[str, str] = field(default_factory=dict, compare=False)
    fixed: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    unbounded: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    sends_fixed: bool = True

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

        Parameters
        ----------
        trained
            Names of the tensors that train; `default_trained` where it is not known.
        aliases, fixed, sends_fixed
            As the attributes; of what is fixed the names.

        Raises
        ------
        ParameterError
            If a pattern takes no tensor, or nothing would be generated.
        """
        trained = default_trained(state) if trained is None else trained
        aliases = aliases or {}
        entries = tuple(
            Entry(name, tuple(t.shape), t.dtype, name in trained) for name, t in state.items()
        )
        for pattern in patterns:
            if not any(fnmatchcase(entry.name, pattern) for entry in entries):
                raise ParameterError(
                    f'no tensor of the model fits the pattern "{pattern}": {", ".join(state)}'
                )
        taken = {
            aliases.get(name, name)
            for name in state
            if any(fnmatchcase(name, pattern) for pattern in patterns)
        }
        generated = tuple(
            entry
            for entry in entries
            if entry.trains and entry.dtype in _GENERATED_DTYPES and entry.name in taken
        )
        if not generated:
            raise ParameterError(
                f"nothing to generate: {', '.join(patterns)} takes no float32 or float16 "
                "parameter of the model that trains"
            )
        unbounded = {
            entry.name: state[entry.name]
            for entry in entries
            if not entry.trains and not is_bounded(state[entry.name])
        }
        return cls(
            entries,
            generated,
            aliases,
            {name: state[name] for name in fixed},
            unbounded,
            sends_fixed,
        )

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
        generated = {
            entry.name: piece.reshape(entry.shape).to(entry.dtype)
            for entry, piece in zip(self.generated, pieces, strict=True)
        }
        merged = {**rest, **generated}
        return {e.name: merged[self.aliases.get(e.name, e.name)] for e in self.entries}

    def rest(self, state: Mapping[str, Tensor]) -> StateDict:
        """Return what of a state_dict is averaged."""
        names = {entry.name for entry in self.generated}
        return {
            entry.name: state[entry.name]
            for entry in self.entries
            if self.aliases.get(entry.name, entry.name) not in names
        }

    def to_send(self, state: StateDict) -> StateDict:
        """Return what a message contains of a state_dict: the same object if it is everything."""
        if self.sends_fixed:
            return state
        return {name: tensor for name, tensor in state.items() if name not in self.fixed}

    def received(self, state: Mapping[str, Tensor]) -> StateDict:
        """Return the state_dict of a message that `check` has nothing against.

        What is fixed is taken from here, so that it is in memory once, and tied tensors are one.
        """
        whole = {**state, **self.fixed}
        return {e.name: whole[self.aliases.get(e.name, e.name)] for e in self.entries}

    def check_names(self, state: Iterable[str]) -> None:
        """Refuse names that are not those of this model, as messages have them.

        Raises
        ------
        ParameterError
            Naming what is missing, or what is too much.
        """
        given = set(state)
        names = {entry.name for entry in self.sent}
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
        bounded = (tensor > -MAX_ABSOLUTE) & (tensor < MAX_ABSOLUTE)
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
    """Tell whether all values are finite, and smaller than `MAX_ABSOLUTE`."""
    return bool(((tensor > -MAX_ABSOLUTE) & (tensor < MAX_ABSOLUTE)).all())


def same(left: Tensor, right: Tensor) -> bool:
    """Tell whether two tensors of a shape are the same, NaN included."""
    return bool(_equal(left, right).all())


def _equal(left: Tensor, right: Tensor) -> Tensor:
    """Return where two tensors are the same, NaN included."""
    return (left == right) | (left.isnan() & right.isnan())


def weighted_average(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> StateDict:
    """Return the FedAvg average of state_dicts of one layout, computed in float64.

    Integer tensors are averaged and rounded. What is the same in all states stays so, bit by bit.

    Raises
    ------
    ValueError
        If there is nothing to average or the weights do not sum to a positive number.
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
