"""Differential privacy of what clients upload: noise, and the account of what it tells of them."""

import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from pfedgpa_app.config import ClientConfig, ConfigError, DatasetInfo, PrivacyConfig
from pfedgpa_app.model_spec import ModelSpec
from pfedgpa_app.models import mixing_layers
from pfedgpa_app.parameters import StateDict
from pfedgpa_app.randomness import initialized_by, make_generator

Uniform = Callable[[int], Tensor]
"""Called with a number of draws: returns them, float64, between 0 and 1 and never either."""

# As many as leave room for a half, so that no draw is rounded to 1.
_RANDOM_BITS = 52
# Of the largest entry of a gradient, what rounding may change where a batch is another one.
_ROUNDING = 1e-4


def secure_uniform(size: int) -> Tensor:
    """Draw from the system's randomness, which nobody can know or repeat."""
    if not size:
        return torch.empty(0, dtype=torch.float64)
    words = torch.frombuffer(bytearray(os.urandom(8 * size)), dtype=torch.int64)
    return _between(words & (2**_RANDOM_BITS - 1))


def seeded_uniform(generator: torch.Generator) -> Uniform:
    """Return draws that whoever knows the seed can repeat: for experiments, they protect nobody."""
    return lambda size: _between(torch.randint(2**_RANDOM_BITS, (size,), generator=generator))


def gaussian(like: Tensor, uniform: Uniform) -> Tensor:
    """Return standard normal noise of a tensor's shape, type and device."""
    noise: Tensor = torch.special.ndtri(uniform(like.numel()))
    return noise.reshape(like.shape).to(like)


def update_deviation(config: PrivacyConfig) -> float:
    """Return the standard deviation of an update's noise, as Flower's `LocalDpMod` has it.

    That is ``sensitivity sqrt(2 log(1.25 / delta)) / epsilon``.
    """
    sensitivity = config.sensitivity or 2 * config.clip_norm
    return sensitivity * math.sqrt(2 * math.log(1.25 / config.delta)) / config.epsilon


def private_update(
    state: Mapping[str, Tensor],
    received: Mapping[str, Tensor],
    spec: ModelSpec,
    config: PrivacyConfig,
    uniform: Uniform,
) -> StateDict:
    """Return an upload whose update is clipped and noised (`LocalDpMod` of Flower).

    The update ``state - received`` is shortened to the length ``clip_norm`` where it is longer, and
    noise of `update_deviation` is added to each entry. An update that is not finite counts as 0.
    What does not train, such as frozen weights, buffers and counters, stays as it was received. A
    tied tensor is noised once: two copies with different noise would tell more.
    """
    moves = {
        name: tensor.double() - received[name].double()
        for name, tensor in state.items()
        if name in spec.trained and name not in spec.aliases
    }
    norm = math.hypot(*(float(move.norm()) for move in moves.values()))
    deviation = update_deviation(config)
    private = dict(received)
    for name, move in moves.items():
        kept = move * min(1.0, config.clip_norm / max(norm, 1e-300))
        kept = kept if math.isfinite(norm) else torch.zeros_like(move)
        noised = received[name].double() + kept + deviation * gaussian(move, uniform)
        private |= dict.fromkeys(spec.with_aliases([name]), noised.to(state[name].dtype))
    return private


def sampling_plan(num_examples: int, config: ClientConfig) -> tuple[float, int]:
    """Return the part of the examples that a step of DP-SGD draws, and the number of steps.

    Each step draws every example with this probability, so that a batch has about
    ``batch_size`` of them.
    """
    steps_per_epoch = math.ceil(num_examples / config.batch_size)
    return 1 / steps_per_epoch, config.local_epochs * steps_per_epoch


def cost_of_round(
    privacy: PrivacyConfig, client: ClientConfig, num_examples: int
) -> tuple[float, float, int]:
    """Return what an upload tells of a client's data, as an entry of a `Ledger`."""
    if privacy.mode == "update":
        # Whatever the settings take for its sensitivity: two updates can be so far apart.
        return update_deviation(privacy) / (2 * privacy.clip_norm), 1.0, 1
    return privacy.noise_multiplier, *sampling_plan(num_examples, client)


@dataclass(frozen=True)
class Ledger:
    """What a client has told of its data so far, as steps of the Gaussian mechanism.

    Attributes
    ----------
    entries
        Of equal steps one after the other: the noise's standard deviation in units of what one
        client or example can change, the part of the examples that was drawn, the number of steps.
    """

    entries: tuple[tuple[float, float, int], ...] = ()

    @classmethod
    def of(cls, columns: Mapping[str, Sequence[float]]) -> "Ledger":
        """Return the ledger of what `columns` returned, or an empty one of nothing."""
        rows = zip(
            columns.get("noise-multipliers", ()),
            columns.get("sample-rates", ()),
            columns.get("steps", ()),
            strict=True,
        )
        return cls(tuple((float(noise), float(rate), int(steps)) for noise, rate, steps in rows))

    def columns(self) -> dict[str, list[float]]:
        """Return the entries as lists of numbers by their names."""
        names = ("noise-multipliers", "sample-rates", "steps")
        return {
            name: [float(entry[column]) for entry in self.entries]
            for column, name in enumerate(names)
        }

    def after(self, noise_multiplier: float, sample_rate: float, steps: int = 1) -> "Ledger":
        """Return the ledger after some more steps."""
        last = self.entries[-1:]
        if last and last[0][:2] == (noise_multiplier, sample_rate):
            merged = (noise_multiplier, sample_rate, last[0][2] + steps)
            return Ledger((*self.entries[:-1], merged))
        return Ledger((*self.entries, (noise_multiplier, sample_rate, steps)))

    def epsilon(self, delta: float) -> float:
        """Return the epsilon of all steps together, by Rényi differential privacy (Opacus)."""
        # A package that only privacy needs.
        from opacus.accountants import RDPAccountant
        from opacus.accountants.analysis.rdp import get_privacy_spent

        if not self.entries:
            return 0.0
        divergences = np.sum(
            [steps * _divergences(noise, rate) for noise, rate, steps in self.entries], axis=0
        )
        with quiet_opacus():
            epsilon, _ = get_privacy_spent(
                orders=RDPAccountant.DEFAULT_ALPHAS, rdp=divergences, delta=delta
            )
        return float(epsilon)


@lru_cache  # a tenth of a second, and the same in each round
def _divergences(noise_multiplier: float, sample_rate: float) -> NDArray[np.float64]:
    """Return the Rényi divergence of one step for each of Opacus' orders, ``(orders,)``."""
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import compute_rdp

    return np.asarray(
        compute_rdp(
            q=sample_rate,
            noise_multiplier=noise_multiplier,
            steps=1,
            orders=RDPAccountant.DEFAULT_ALPHAS,
        )
    )


@contextmanager
def quiet_opacus() -> Iterator[None]:
    """Leave out warnings that say nothing here.

    The bound on epsilon holds although the best order is at the end of those that are tried, and
    images need no gradient.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal order is the")
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield


def require_opacus(config: PrivacyConfig) -> None:
    """See to it that Opacus is installed where it is needed.

    Raises
    ------
    ConfigError
        If it is not.
    """
    if config.is_on and importlib.util.find_spec("opacus") is None:
        raise ConfigError(
            [
                f'privacy.mode = "{config.mode}": the package opacus is not installed; right would '
                'be pip install ".[privacy]"'
            ]
        )


def unfit_layers(
    build: Callable[[], nn.Module],
    info: DatasetInfo,
    config: PrivacyConfig,
    changed: Collection[str],
) -> list[str]:
    """Say which layers of a model cannot be trained, or uploaded, with differential privacy.

    ``changed`` are the buffers that a trial of the training changes.
    """
    if mixing := mixing_layers(build()):
        return [
            f"layers that mix or remember the images of a batch are out: {', '.join(mixing)}; "
            "right would be torch.nn.GroupNorm or LayerNorm"
        ]
    if config.mode != "example":
        return []
    if changed:
        return [
            "buffers that training changes are out, since they tell of the images and are not "
            f"uploaded: {', '.join(sorted(changed))}; right would be a model without them"
        ]
    return _refused_by_opacus(build()) or _unfit_gradients(build(), info)


def _refused_by_opacus(model: nn.Module) -> list[str]:
    from opacus.validators import ModuleValidator

    errors = ModuleValidator.validate(model.train())
    return list(dict.fromkeys(f"Opacus cannot train it: {error}" for error in errors))


def _unfit_gradients(model: nn.Module, info: DatasetInfo) -> list[str]:
    """Try steps on random images: each needs a gradient of its own, whatever else is in its batch.

    The noise of DP-SGD hides one image, which may change the sum of the clipped gradients by its
    own and not by those of others.
    """
    generator = make_generator(0, "trial")
    first = torch.randn(1, *info.shape, generator=generator)
    # The second batch has images that are unlike those of the first in their size too.
    others = [scale * torch.randn(3, *info.shape, generator=generator) for scale in (1.0, 10.0)]
    batch, other = (torch.cat([first, each]) for each in others)
    try:
        model.train()
        by_opacus = _gradients_by_opacus(model, batch)
        if missing := [name for name, each in by_opacus.items() if each is None]:
            return [
                f"{name} gets no gradient of each image apart; right would be layers of torch.nn, "
                "each of whose parameters has a part in the logits"
                for name in missing
            ]
        in_batch = _gradients(model, batch)
        changing = _differing(in_batch, _gradients(model, other))
        changing += _differing(in_batch, by_opacus)
        if not changing:
            if _differing(in_batch, _gradients(model, batch, seed=1)):
                # Layers that draw at random draw other numbers for a batch of another size.
                in_batch = _gradients(model.eval(), batch)
            changing = _differing(in_batch, _gradients(model, first))
    except Exception as error:  # Opacus and the user's model raise whatever they like
        return [f"Opacus cannot train it: {error}"]
    if not changing:
        return []
    names = ", ".join(list(dict.fromkeys(changing))[:5])
    return [
        "what it computes of an image must not depend on the other images of its batch, and does: "
        f"{names}. Right would be a forward without statistics over the batch, such as "
        "torch.nn.GroupNorm or LayerNorm in place of batch normalization"
    ]


_LOGITS = "the logits"


def _gradients_by_opacus(model: nn.Module, batch: Tensor) -> dict[str, Tensor | None]:
    """Return what Opacus takes for the gradient of a batch's first image, by parameter."""
    from opacus import GradSampleModule

    with initialized_by(make_generator(0, "trial")), quiet_opacus():
        wrapped = GradSampleModule(model)
        labels = torch.zeros(len(batch), dtype=torch.long)
        functional.cross_entropy(wrapped(batch), labels).backward()
    found: dict[str, Tensor | None] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradients = getattr(parameter, "grad_sample", None)
            found[name] = None if gradients is None else gradients[0].clone()
    wrapped.to_standard_module()
    return found


def _gradients(model: nn.Module, batch: Tensor, seed: int = 0) -> dict[str, Tensor | None]:
    """Return the logits of a batch's first image, and the gradient of its loss by parameter."""
    named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    with initialized_by(make_generator(seed, "trial")):
        logits = model(batch)[:1]
        loss = functional.cross_entropy(logits, torch.zeros(1, dtype=torch.long))
        gradients = torch.autograd.grad(loss, [each for _, each in named], allow_unused=True)
    found = {name: each for (name, _), each in zip(named, gradients, strict=True)}
    return {_LOGITS: logits.detach(), **found}


def _differing(left: Mapping[str, Tensor | None], right: Mapping[str, Tensor | None]) -> list[str]:
    """Return the names of what both have, and differs by more than rounding does."""
    differing = []
    for name, one in left.items():
        other = right.get(name)
        if one is None or other is None:
            continue
        atol = _ROUNDING * float(one.abs().max())
        if not torch.allclose(one, other, rtol=0.0, atol=atol, equal_nan=True):
            differing.append(name)
    return differing


def _between(bits: Tensor) -> Tensor:
    return (bits.double() + 0.5) * 2.0**-_RANDOM_BITS
