"""State as named tensors, and back: what an object keeps from one process to the next."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

STATE_VERSION = 12
"""Version of the names and types of all that is kept, which files have in their kind."""

T = TypeVar("T")
_KEPT = object()
Kept = Annotated[T, _KEPT]
"""Marks an attribute of a `Stateful` class that is part of its state.

It is a number, a tensor, a module, a dataclass, another `Stateful`, tensors by name, a dictionary
of any of these by client, or None.
"""
Vector = Annotated[Tensor, "d"]
"""A tensor ``(d,)``. Within a state, sizes of the same name are the same."""

_CLIENTS, _VALUES = "clients", "values"
_DTYPES: dict[type, torch.dtype] = {bool: torch.bool, float: torch.float64}


class Stateful:
    """An object whose attributes that are marked `Kept` outlast the process."""

    def state(self) -> dict[str, Tensor]:
        """Return all that is kept as named tensors, which share memory with it."""
        return dict(_flatten("", self))

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned.

        Raises `ValueError` if it is of something else, or damaged; the object is then unchanged.
        """
        reader = _Reader()
        reader.read(type(self), tensors, "", self)
        for take_over in reader.pending:
            take_over()

    def complete_restored(self) -> None:
        """Check what was restored, and set what depends on it.

        It is called on a copy, before anything is taken over; `Stateful` parts of it are unchanged.
        Raises `ValueError` if it cannot be used.
        """


def _flatten(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, bool | int | float):
        yield name, _numbers([value])[0]
    elif isinstance(value, dict) and any(isinstance(key, int) for key in value):
        yield f"{name}.{_CLIENTS}", torch.tensor(list(value))
        some = next(iter(value.values()))
        if isinstance(some, bool | int | float):
            yield f"{name}.{_VALUES}", _numbers(list(value.values()))
        elif is_dataclass(some):  # field by field: few tensors for thousands of clients
            for field in fields(some):
                column = {key: getattr(each, field.name) for key, each in value.items()}
                known = {key: each for key, each in column.items() if each is not None}
                yield from _flatten(f"{name}.{field.name}", known)
        else:
            for key, each in value.items():
                yield from _flatten(f"{name}.{key}", each)
    elif value is not None:
        if isinstance(value, nn.Module):
            value = value.state_dict()
        elif not isinstance(value, dict):
            value = {field: getattr(value, field) for field in _kept(type(value))}
        for key, each in value.items():
            yield from _flatten(f"{name}.{key}".lstrip("."), each)


def _numbers(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=_DTYPES.get(type(values[0]), torch.long))


def _kept(kind: type) -> dict[str, Any]:
    """Return the types of what is kept of a class by name: of a dataclass, all fields."""
    hints = get_type_hints(kind, include_extras=True)
    if is_dataclass(kind):
        return {field.name: hints[field.name] for field in fields(kind)}
    return {name: hint for name, hint in hints.items() if _KEPT in get_args(hint)}


class _Reader:
    """Reads a state, and changes no object before ``pending`` is called."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.pending: list[Callable[[], object]] = []

    def read(self, hint: Any, tensors: Mapping[str, Tensor], where: str, like: Any = None) -> Any:
        """Return what has the type ``hint``; ``like`` is what is in its place so far."""
        origin, args = get_origin(hint), get_args(hint)
        if origin is Annotated:
            value = self.read(args[0], tensors, where, like)
            for shape in args[1:]:
                if isinstance(shape, str):
                    if not value.is_floating_point():
                        raise ValueError(f"{where} has {value.dtype}; right would be floats")
                    sizes = [int(e) if e.isdigit() else e for e in shape.split()]
                    self._check_shape(value, sizes, where)
            return value
        if origin in (Union, UnionType):
            if NoneType in args and not tensors:
                return None
            return self.read(_option(args, tensors, like), tensors, where, like)
        if origin is dict and args[0] is int:
            return self._read_clients(args[1], tensors, where)
        if origin is dict:
            return dict(tensors)
        if issubclass(hint, Tensor):
            return _single(tensors, where)
        if issubclass(hint, bool | int | float):
            return _values(hint, tensors, 1, where)[0]
        if issubclass(hint, nn.Module):
            expected = like.state_dict()
            _check_names(tensors, expected, where)
            for name, tensor in expected.items():
                found = _single({"": tensors[name]} if name in tensors else {}, f"{where}.{name}")
                self._check_shape(found, tensor.shape, f"{where}.{name}")
            self.pending.append(lambda: like.load_state_dict(tensors))
            return like
        return self._read_object(hint, tensors, where, like)

    def _read_object(
        self, kind: type, tensors: Mapping[str, Tensor], where: str, like: Any
    ) -> object:
        kept, groups = _kept(kind), _grouped(tensors)
        _check_names(groups, kept, where)
        values = {
            name: self.read(
                kept[name],
                groups.get(name, {}),
                f"{where}.{name}".lstrip("."),
                getattr(like, name, None),
            )
            for name in kept
        }
        if is_dataclass(kind):
            return kind(**values)
        restored = copy.copy(like)
        vars(restored).update(values)
        restored.complete_restored()
        self.pending.append(lambda: vars(like).update(vars(restored)))
        return like

    def _read_clients(self, hint: Any, tensors: Mapping[str, Tensor], where: str) -> dict[int, Any]:
        """Return what is kept client by client, in the order in which it was."""
        if not tensors:
            return {}
        groups = _grouped(tensors)
        clients = _values(int, groups.pop(_CLIENTS, {}), None, f"{where}.{_CLIENTS}")
        plain = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        if isinstance(plain, type) and issubclass(plain, bool | int | float):
            values = _values(plain, groups.pop(_VALUES, {}), len(clients), f"{where}.{_VALUES}")
            _check_names(groups, (), where)
            return dict(zip(clients, values, strict=True))
        if is_dataclass(plain):
            return self._read_records(plain, clients, groups, where)
        _check_names(groups, map(str, clients), where)
        return {
            client: self.read(hint, groups.get(str(client), {}), f"{where}.{client}")
            for client in clients
        }

    def _read_records(
        self, kind: Any, clients: list[int], groups: Mapping[str, dict[str, Tensor]], where: str
    ) -> dict[int, Any]:
        """Return a dataclass for each client, from a group of tensors for each field."""
        kept = _kept(kind)
        _check_names(groups, kept, where)
        values: dict[int, dict[str, Any]] = {client: {} for client in clients}
        for name, hint in kept.items():
            is_optional = NoneType in get_args(hint)
            some = _option(get_args(hint), {}, None) if is_optional else hint
            column = self._read_clients(some, groups.get(name, {}), f"{where}.{name}")
            if not (column.keys() <= values.keys() if is_optional else list(column) == clients):
                raise ValueError(f"{where}.{name} is of other clients than {where}.{_CLIENTS}")
            for client in clients:
                values[client][name] = column.get(client)
        return {client: kind(**values[client]) for client in clients}

    def _check_shape(self, tensor: Tensor, shape: Sequence[str | int], where: str) -> None:
        """Check a tensor's shape, of numbers or names of sizes, which are taken note of."""
        sizes = list(tensor.shape)
        right = [
            self.sizes.setdefault(each, size) if isinstance(each, str) else each
            for each, size in zip(shape, sizes, strict=False)
        ]
        if len(sizes) != len(shape) or sizes != right:
            expected = ", ".join(str(self.sizes.get(str(each), each)) for each in shape)
            raise ValueError(f"{where} has the shape {tuple(sizes)}; right would be ({expected})")


def _option(args: tuple[Any, ...], tensors: Mapping[str, Tensor], like: Any) -> Any:
    """Return the type of ``like`` among several, or the one with the names of ``tensors``."""
    options = [each for each in args if each is not NoneType]
    names = _grouped(tensors).keys()
    fitting = (each for each in options[1:] if type(like) is each or names == _kept(each).keys())
    return next(fitting, options[0])


def _grouped(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return tensors by the first part of their names, then by the rest, which may be nothing."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        first, _, rest = name.partition(".")
        groups.setdefault(first, {})[rest] = tensor
    return groups


def _single(tensors: Mapping[str, Tensor], where: str) -> Tensor:
    if tensors.keys() != {""}:
        raise ValueError(f"{where} is missing; right would be one tensor of that name")
    return tensors[""]


def _values(kind: type, tensors: Mapping[str, Tensor], number: int | None, where: str) -> list[Any]:
    """Return so many numbers of a kind, all if None; a single one has no dimension."""
    tensor, dtype = _single(tensors, where), _DTYPES.get(kind, torch.long)
    right = tensor.numel() if number is None else number
    if tensor.dtype != dtype or tensor.dim() > 1 or tensor.numel() != right:
        raise ValueError(
            f"{where} has {tensor.numel()} values of {tensor.dtype}; right would be {right} of "
            f"{dtype}"
        )
    return [kind(value) for value in tensor.flatten().tolist()]


def _check_names(found: Iterable[str], right: Iterable[str], where: str) -> None:
    if unknown := sorted(set(found).difference(right)):
        raise ValueError(f"{where or 'the state'} has {unknown[0]!r}, which nothing here is called")
