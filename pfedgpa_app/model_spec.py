"""The structure of a model: trained, tied and fixed tensors, and its head."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm

from pfedgpa_app.config import DatasetInfo
from pfedgpa_app.files import count_of
from pfedgpa_app.parameters import (
    ParameterLayout,
    StateDict,
    copy_of,
    default_trained,
    head_names,
    is_bounded,
    layer_of,
)


class ModelError(ValueError):
    """A model that cannot be built or trained."""


def check_logits(output: object, number: int, num_classes: int) -> None:
    """Raise a `ModelError` unless a model's output is ``(number, num_classes)``."""
    expected = (number, num_classes)
    if isinstance(output, Tensor) and tuple(output.shape) == expected:
        return
    found = type(output).__name__
    if isinstance(output, Tensor):
        found = f"an output of shape {tuple(output.shape)}"
    raise ModelError(
        f"{count_of(number, 'example')} gave {found}; right would be {expected}, one logit per "
        "class, in training and evaluation"
    )


class Head(NamedTuple):
    """The layer of a model that computes the logits."""

    layer: str
    """Its name, "" for the model itself."""
    names: tuple[str, ...]
    """Its entries of the state_dict, aliases of tied tensors included."""
    size: tuple[int, int] = (0, 0)
    """Numbers of classes and features of a linear layer; (0, 0) for others."""
    weights: tuple[str, ...] = ()
    """All names of its weight if that can be replaced: float32, trained, not parametrized."""


@dataclass(frozen=True, eq=False)
class ModelSpec:
    """What the server must know of the clients' model."""

    initial: StateDict
    """The state_dict before the first round."""
    trained: frozenset[str]
    """Names of the trained parameters."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """The other names of tied tensors, with the first name of each."""
    fixed: frozenset[str] = frozenset()
    """Names of the tensors that never change: frozen weights, and infinite buffers such as masks,
    except those that a trial of the training changes, such as a momentum encoder."""
    head: Head | None = None
    """Its head; None if it was not searched or not found."""
    sends_fixed: bool = True
    """Whether messages contain the fixed tensors. Otherwise clients use their own."""
    idle: tuple[str, ...] = ()
    """Names of the parameters without gradient in a trial."""
    singular_vectors: "SingularVectors | None" = None
    """The buffers of spectral normalization, if the model has any."""

    @classmethod
    def of_state(cls, state: StateDict) -> "ModelSpec":
        """Guess the structure from names and dtypes: the head is the last layer."""
        names = tuple(head_names(state))
        weight = state[names[0]]
        head = Head(layer_of(names[0]), names)
        if weight.ndim == 2:
            head = head._replace(size=(weight.shape[0], weight.shape[1]), weights=names[:1])
        return cls(state, default_trained(state), head=head)

    @classmethod
    def of(cls, model: nn.Module, initial: StateDict | None = None) -> "ModelSpec":
        """Return the structure of a model without running it: its head is not searched.

        ``initial`` is the state_dict before the first round, by default the model's own.
        """
        state = copy_of(model.state_dict()) if initial is None else initial
        parameters = dict(model.named_parameters(remove_duplicate=False))
        tensors = parameters | dict(model.named_buffers(remove_duplicate=False))
        trained = {name for name, each in parameters.items() if each.requires_grad}
        trained |= default_trained(state) - tensors.keys()
        first: dict[int, str] = {}
        firsts = {n: first.setdefault(id(tensors[n]), n) for n in state if n in tensors}
        aliases = {name: original for name, original in firsts.items() if original != name}
        fixed = {name for name, each in parameters.items() if not each.requires_grad}
        fixed |= {name for name in state.keys() - parameters.keys() if not is_bounded(state[name])}
        return cls(
            state,
            frozenset(trained & state.keys()),
            aliases,
            frozenset(fixed & state.keys()),
            singular_vectors=SingularVectors.of(model),
        )

    def layout(self, patterns: Sequence[str] = ("*",)) -> ParameterLayout:
        """Return the layout of the tensors in vectors and messages.

        Raises `ParameterError` if a pattern matches no tensor, or nothing would be generated.
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
        """Return the names with all their aliases, in the order of the state_dict."""
        first = {self.aliases.get(name, name) for name in names}
        return tuple(name for name in self.initial if self.aliases.get(name, name) in first)

    @property
    def linear_head(self) -> Head:
        """The head; raises `ModelError` if it is unknown or not linear."""
        if self.head is None or self.head.size == (0, 0):
            raise ModelError(
                "the layer that makes the logits is not a torch.nn.Linear; right would be a model "
                "that ends in one"
            )
        return self.head

    def refreshed(self, state: StateDict) -> StateDict:
        """Return a state_dict with recomputed buffers of spectral normalization."""
        return self.singular_vectors.refreshed(state) if self.singular_vectors else state

    @property
    def fingerprint(self) -> str:
        """A hash of the fixed tensors, which clients compare with that of their own."""
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


class Call(NamedTuple):
    """A call of a layer in a forward pass, with its first input and its output."""

    name: str
    inputs: Tensor | None
    output: Tensor


def find_head(model: nn.Module, info: DatasetInfo) -> Head | None:
    """Return the head of a model: the layer that computes the logits.

    It is found in a forward pass of two blank examples in evaluation mode, in which it is left,
    as the innermost layer with a weight whose output is the logits. If something follows it,
    such as a scale, it is the last linear layer or convolution with one output per class, and
    trained parameters after it belong to it. None if there is no such layer, or a parallel
    branch bypasses it.
    """
    examples = torch.zeros(2, *info.shape)
    after = set[str]()
    model.eval()
    with torch.enable_grad():
        logits, calls = _calls(model, examples)
        layers = {call.name: model.get_submodule(call.name) for call in calls}
        makers = (
            call
            for call in calls
            if call.output is logits and any(p.ndim > 1 for p in layers[call.name].parameters())
        )
        classifiers = (
            call for call in reversed(calls) if _is_classifier(layers[call.name], call, info)
        )
        found = next(makers, None)
        if found is None:
            found = next(classifiers, None)
            if found is None:
                return None
            bypassing = _trained_after(layers[found.name], model, examples)
            if bypassing is None or bypassing & _with_gradient(found.output.sum(), model):
                return None
            after = bypassing
    spec, layer = ModelSpec.of(model), layers[found.name]
    owners = {layer_of(name) for name in after} - {""}
    prefix = f"{found.name}." if found.name else ""
    own = [
        name
        for name in spec.initial
        if name.startswith(prefix) or name in after or layer_of(name) in owners
    ]
    head = Head(found.name, spec.with_aliases(own))
    if (
        sum(call.name == found.name for call in calls) > 1
        or not isinstance(layer, nn.Linear)
        or found.inputs is None
        or found.inputs.shape[:-1] != (2,)
        or found.output.shape != (2, info.num_classes)
    ):
        return head
    weight = f"{prefix}weight"
    is_plain = (
        found.output is logits
        and type(layer).forward is nn.Linear.forward
        and weight in spec.trained
        and spec.initial[weight].dtype == torch.float32
    )
    return head._replace(
        size=(info.num_classes, found.inputs.shape[-1]),
        weights=spec.with_aliases([weight]) if is_plain else (),
    )


def _calls(model: nn.Module, examples: Tensor) -> tuple[object, list[Call]]:
    calls: list[Call] = []

    def keep(name: str, layer: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        if isinstance(output, Tensor):
            first = inputs[0] if inputs and isinstance(inputs[0], Tensor) else None
            calls.append(Call(name, first, output))

    # The model itself counts as a layer only if it has no submodules.
    with ExitStack() as hooks:
        for name, layer in model.named_modules():
            if name or not any(model.children()):
                hooks.enter_context(layer.register_forward_hook(partial(keep, name)))
        return model(examples), calls


def _is_classifier(layer: nn.Module, call: Call, info: DatasetInfo) -> bool:
    """Return whether a layer is linear or a convolution, with one output per class."""
    if isinstance(layer, nn.Linear):
        return call.output.shape[-1] == info.num_classes
    is_convolution = isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return is_convolution and call.output.shape[1] == info.num_classes


def _trained_after(layer: nn.Module, model: nn.Module, examples: Tensor) -> set[str] | None:
    """Return the parameters that affect the logits other than through a layer's output.

    None if this layer does not affect the logits.
    """
    cut: list[Tensor] = []

    def detach(layer: nn.Module, inputs: object, output: Tensor) -> Tensor:
        cut.append(output.detach().requires_grad_())
        return cut[-1]

    with layer.register_forward_hook(detach):
        total = model(examples).sum()
    parts = torch.autograd.grad(total, cut, allow_unused=True, retain_graph=True)
    return None if all(part is None for part in parts) else _with_gradient(total, model)


def _with_gradient(total: Tensor, model: nn.Module) -> set[str]:
    if not total.requires_grad:
        return set()
    return {name for name, each in gradients_of(total, model).items() if each is not None}


def gradients_of(total: Tensor, model: nn.Module) -> dict[str, Tensor | None]:
    """Return the gradient of ``total`` by each trained parameter, None where there is none.

    The graph is retained.
    """
    named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    if not named:
        return {}
    names, parameters = zip(*named, strict=True)
    gradients = torch.autograd.grad(total, parameters, allow_unused=True, retain_graph=True)
    return dict(zip(names, gradients, strict=True))


class SingularVectors(NamedTuple):
    """The buffers of spectral normalization: the first singular vectors of a layer's weight.

    They depend on the weight, so they are recomputed where it is averaged, generated or noised, in
    ``model``, a scratch copy. ``names`` are those of the buffers.
    """

    model: nn.Module
    names: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module) -> "SingularVectors | None":
        """Find those of both implementations in torch; None if there are none."""
        vectors = {
            id(vector)
            for layer in model.modules()
            for _, *both in _spectral(layer)
            for vector in both
        }
        names = frozenset(name for name, each in model.named_buffers() if id(each) in vectors)
        return cls(model, names) if names else None

    def refreshed(self, state: StateDict) -> StateDict:
        """Return a state_dict with the singular vectors of its weights."""
        self.model.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
        for layer in self.model.modules():
            for weight, left, right in _spectral(layer):
                # The smaller Gram matrix, in float64, is precise enough.
                matrix = weight.detach().double()
                wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
                vector = torch.linalg.eigh(wide @ wide.T).eigenvectors[:, -1]
                other = functional.normalize(wide.T @ vector, dim=0)
                first, second = (vector, other) if wide is matrix else (other, vector)
                left.copy_(first)
                right.copy_(second)
        moved = self.model.state_dict()
        return {
            name: moved[name].clone() if name in self.names else tensor
            for name, tensor in state.items()
        }


def _spectral(layer: nn.Module) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the weight matrices that a layer normalizes, with their buffers ``u`` and ``v``."""
    if is_parametrized(layer):
        for chain in cast(Any, layer.parametrizations).values():
            # Inputs of later parametrizations in the chain are not in the state_dict.
            weight, first = getattr(chain, "original", None), chain[0]
            if isinstance(first, _SpectralNorm) and weight is not None and weight.ndim > 1:
                yield first._reshape_weight_to_matrix(weight), first._u, first._v
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm):
            weight = getattr(layer, f"{hook.name}_orig")
            buffers = (getattr(layer, f"{hook.name}_{each}") for each in "uv")
            yield (hook.reshape_weight_to_matrix(weight), *buffers)
