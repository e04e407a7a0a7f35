"""What of a model trains, what is one tensor, what never changes, and where its head is."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pfedgpa_app.config import DatasetInfo
from pfedgpa_app.parameters import (
    ParameterLayout,
    StateDict,
    copy_of,
    default_trained,
    head_names,
    is_bounded,
    layer_of,
)
from pfedgpa_app.randomness import drawing_from, make_generator

# Forward passes in which buffers that follow from the parameters, such as the singular vectors of
# spectral normalization, must come to rest; and the relative change that counts as rest.
_MAX_PASSES = 100
_AT_REST = 1e-3


class ModelError(ValueError):
    """A model that cannot be built, or that clients cannot train."""


class Head(NamedTuple):
    """The layer of a model that makes the logits.

    Attributes
    ----------
    layer
        Its name, "" for the model itself.
    names
        The entries of the state_dict that belong to it, all names of tied tensors among them.
    size
        Numbers of classes and of features of a linear layer; (0, 0) of another one.
    weights
        All names of its weight, where that is a tensor ``size`` that trains; none elsewhere.
    """

    layer: str
    names: tuple[str, ...]
    size: tuple[int, int] = (0, 0)
    weights: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class ModelSpec:
    """What a server must know of the model that its clients train.

    Attributes
    ----------
    initial
        The state_dict before the first round.
    trained
        Names of the tensors that training changes by their gradients.
    aliases
        The other names of tied tensors, with the first name of each.
    fixed
        Names of the tensors that never change: frozen weights, and infinite buffers such as masks.
    head
        Its head; None where it was not looked for, or not found.
    sends_fixed
        Whether messages contain what is fixed. Otherwise every client's model has it by itself.
    derived
        Buffers that follow from the parameters.
    """

    initial: StateDict
    trained: frozenset[str]
    aliases: Mapping[str, str] = field(default_factory=dict)
    fixed: frozenset[str] = frozenset()
    head: Head | None = None
    sends_fixed: bool = True
    derived: "DerivedBuffers | None" = None

    @classmethod
    def of_state(cls, state: StateDict) -> "ModelSpec":
        """Return what names and types alone tell of a model: its head is the last layer."""
        names = tuple(head_names(state))
        weight = state[names[0]]
        head = Head(layer_of(names[0]), names)
        if weight.ndim == 2:
            head = head._replace(size=(weight.shape[0], weight.shape[1]), weights=names[:1])
        return cls(state, default_trained(state), head=head)

    @classmethod
    def of(cls, model: nn.Module, initial: StateDict | None = None) -> "ModelSpec":
        """Return what a model tells of itself without an example.

        Parameters
        ----------
        initial
            The state_dict before the first round, the model's own by default.
        """
        state = copy_of(model.state_dict()) if initial is None else initial
        parameters = dict(model.named_parameters(remove_duplicate=False))
        tensors = parameters | dict(model.named_buffers(remove_duplicate=False))
        unknown = state.keys() - tensors.keys()
        trained = {name for name, each in parameters.items() if each.requires_grad}
        trained |= unknown & default_trained(state)
        first: dict[int, str] = {}
        aliases = {}
        for name in state:
            if name in tensors:
                original = first.setdefault(id(tensors[name]), name)
                if original != name:
                    aliases[name] = original
        frozen = {name for name, each in parameters.items() if not each.requires_grad}
        return cls(
            state, frozenset(trained & state.keys()), aliases, frozenset(frozen & state.keys())
        )

    def layout(self, patterns: Sequence[str] = ("*",)) -> ParameterLayout:
        """Return how the tensors lie in vectors and messages.

        Raises
        ------
        ParameterError
            If a pattern takes no tensor, or nothing would be generated.
        """
        return ParameterLayout.of(
            self.initial,
            patterns,
            trained=self.trained,
            aliases=self.aliases,
            fixed=self.fixed,
            sends_fixed=self.sends_fixed,
        )

    def with_aliases(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return tensors with all their names, in the order of the state_dict."""
        first = {self.aliases.get(name, name) for name in names}
        return tuple(name for name in self.initial if self.aliases.get(name, name) in first)

    @property
    def linear_head(self) -> Head:
        """The head.

        Raises
        ------
        ModelError
            If it is not known, or not linear.
        """
        if self.head is None or self.head.size == (0, 0):
            raise ModelError(
                "the layer that makes the logits is not a torch.nn.Linear; right would be a model "
                "that ends in one"
            )
        return self.head

    def refreshed(self, state: StateDict) -> StateDict:
        """Return a state_dict whose derived buffers are those of its parameters."""
        return self.derived.refreshed(state) if self.derived else state

    @property
    def fingerprint(self) -> str:
        """A hash of what is fixed, by which clients see that they have the same."""
        return fingerprint({name: self.initial[name] for name in self.fixed})


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of tensors: SHA-256 of names, types, shapes and bytes, in hex."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def find_head(model: nn.Module, info: DatasetInfo) -> Head | None:
    """Return the head of a model: the layer that makes the logits, wherever it was registered.

    Two blank examples are sent through the model, in evaluation mode. The head is the first layer
    whose output is the logits or, where something without parameters follows it, the last layer
    that has a part in them. None if there is no such layer.
    """
    outputs: list[tuple[str, Tensor]] = []

    def keep(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(layer: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor):
                outputs.append((name, output))

        return hook

    state = model.state_dict()
    owners = {layer_of(name) for name in state}
    handles = [
        layer.register_forward_hook(keep(name))
        for name, layer in model.named_modules()
        if name in owners
    ]
    # A copy, since a layer may change its input in place.
    examples = torch.zeros(2, *info.shape, requires_grad=True).clone()
    try:
        with _evaluating(model), torch.enable_grad():
            logits = model(examples)
            # The model itself comes last: its layers tell more.
            outputs.sort(key=lambda each: each[0] == "")
            direct = [name for name, output in outputs if output is logits]
            found = direct[:1] or [
                name
                for name, output in reversed(outputs)
                if name != "" and _has_part(output, logits)
            ]
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        return None
    layer = found[0]
    prefix = f"{layer}." if layer else ""
    own = [name for name in state if (name.startswith(prefix) if layer else layer_of(name) == "")]
    spec = ModelSpec.of(model)
    names = spec.with_aliases(own)
    head = model.get_submodule(layer)
    if not isinstance(head, nn.Linear):
        return Head(layer, names)
    weight = f"{prefix}weight"
    weights = spec.with_aliases([weight]) if weight in spec.trained else ()
    return Head(layer, names, (head.out_features, head.in_features), weights)


@dataclass(frozen=True, eq=False)
class DerivedBuffers:
    """Buffers that follow from a model's parameters, such as those of spectral normalization.

    A forward pass in training mode brings them nearer to what they should be, whatever the
    examples. So what became of an average, or of what was generated, is mended by some passes.

    Parameters
    ----------
    model
        In which this is done; its own parameters have no meaning.
    names
        Of the buffers.
    shape
        Of an example.
    """

    model: nn.Module
    names: tuple[str, ...]
    shape: tuple[int, ...]

    def refreshed(self, state: StateDict) -> StateDict:
        """Return a state_dict with the buffers of its parameters."""
        self.model.load_state_dict(state)
        self.come_to_rest()
        moved = self.model.state_dict()
        return state | {name: moved[name].clone() for name in self.names}

    def come_to_rest(self) -> bool:
        """Go on until the buffers change no more, and tell whether they came so far."""
        before = self._buffers()
        for _ in range(_MAX_PASSES):
            train_pass(self.model, torch.zeros(2, *self.shape))
            after = self._buffers()
            if float((after - before).norm()) <= _AT_REST * float(after.norm()):
                return True
            before = after
        return False

    def _buffers(self) -> Tensor:
        state = self.model.state_dict()
        return torch.cat([state[name].flatten().double() for name in self.names])


def train_pass(model: nn.Module, examples: Tensor) -> None:
    """Send examples ``(n, *shape)`` through a model in training mode, without gradients."""
    was_training = model.training
    with drawing_from(make_generator(0, "trial"), examples.device), torch.no_grad():
        model.train()(examples)
    model.train(was_training)


class Changes(NamedTuple):
    """What forward passes in training mode change.

    Attributes
    ----------
    statistics
        Names of what depends on the examples, and of counters.
    derived
        Buffers that follow from the parameters.
    """

    statistics: frozenset[str]
    derived: DerivedBuffers | None


def changes_in_training(build: Callable[[], nn.Module], info: DatasetInfo) -> Changes:
    """Try what of a model changes in training beside its parameters, on two kinds of examples.

    Parameters
    ----------
    build
        Makes the model.
    """
    model = build()
    spec = ModelSpec.of(model)
    if spec.trained == spec.initial.keys():
        return Changes(frozenset(), None)
    after = []
    shape = (2, *info.shape)
    drawn = torch.randn(shape, generator=make_generator(0, "trial"))
    for examples in (torch.zeros(shape), drawn, torch.ones(shape)):
        model.load_state_dict(spec.initial)
        try:
            train_pass(model, examples)
        except Exception:  # a model of the user's may take only some numbers, such as words
            continue
        after.append(copy_of(model.state_dict()))
    changed = {
        name
        for name, tensor in spec.initial.items()
        if any(not _same(tensor, state[name]) for state in after)
    }
    buffers = dict(model.named_buffers())
    candidates = tuple(
        sorted(
            name
            for name in changed & buffers.keys()
            if buffers[name].is_floating_point()
            and all(_same(after[0][name], state[name]) for state in after)
            and len(after) > 1
        )
    )
    derived = DerivedBuffers(model, candidates, info.shape) if candidates else None
    if derived is not None and not derived.come_to_rest():
        derived = None  # such as a counter, which goes on and on
    return Changes(frozenset(changed) - set(derived.names if derived else ()), derived)


def inspect_model(build: Callable[[], nn.Module], info: DatasetInfo) -> ModelSpec:
    """Return all that can be told of a model by trying it on blank examples.

    Parameters
    ----------
    build
        Makes the model, each time the same.
    """
    model = build()
    spec = ModelSpec.of(model)
    changes = changes_in_training(build, info)
    buffers = spec.initial.keys() - spec.trained
    unbounded = {name for name in buffers if not is_bounded(spec.initial[name])}
    return replace(
        spec,
        fixed=(spec.fixed | unbounded) - changes.statistics,
        head=find_head(model, info),
        derived=changes.derived,
    )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _has_part(output: Tensor, logits: Tensor) -> bool:
    """Tell whether logits were computed from the output of a layer."""
    if not (output.requires_grad and logits.requires_grad):
        return False
    (gradient,) = torch.autograd.grad(logits.sum(), output, retain_graph=True, allow_unused=True)
    return gradient is not None


def _same(left: Tensor, right: Tensor) -> bool:
    """Tell whether two tensors are the same, NaN included."""
    return bool(((left == right) | (left.isnan() & right.isnan())).all())
