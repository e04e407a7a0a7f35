"""Differential privacy of uploads: noise and privacy accounting."""

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
from pfedgpa_app.model_spec import ModelSpec, gradients_of
from pfedgpa_app.models import mixing_layers
from pfedgpa_app.parameters import StateDict
from pfedgpa_app.randomness import drawing_from, make_generator

Uniform = Callable[[int], Tensor]
"""Returns a number of uniform draws in the open interval (0, 1), float64."""

# One less than float64 has, so that adding a half never rounds to 1.
_RANDOM_BITS = 52
_COLUMNS = ("noise-multipliers", "sample-rates", "steps")
# Tolerance for gradients in another batch, relative to the largest entry.
_ROUNDING = 1e-4


def secure_uniform(size: int) -> Tensor:
    """Draw from the system's cryptographic random source."""
    if not size:
        return torch.empty(0, dtype=torch.float64)
    words = torch.frombuffer(bytearray(os.urandom(8 * size)), dtype=torch.int64)
    return _between(words & (2**_RANDOM_BITS - 1))


def seeded_uniform(generator: torch.Generator) -> Uniform:
    """Return reproducible draws, for experiments: they give no privacy if the seed is known."""
    return lambda size: _between(torch.randint(2**_RANDOM_BITS, (size,), generator=generator))


def gaussian(like: Tensor, uniform: Uniform) -> Tensor:
    """Return standard normal noise of a tensor's shape, dtype and device."""
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

    The update ``state - received`` is clipped to the norm ``clip_norm``, and Gaussian noise of
    `update_deviation` is added. An update that is not finite counts as 0. Frozen weights, buffers
    and counters stay as received. A tied tensor is noised once, since two noises would average out.
    """
    updates = {
        name: tensor.double() - received[name].double()
        for name, tensor in state.items()
        if name in spec.trained and name not in spec.aliases
    }
    norm = math.hypot(*(float(update.norm()) for update in updates.values()))
    deviation = update_deviation(config)
    private = dict(received)
    for name, update in updates.items():
        clipped = update * min(1.0, config.clip_norm / max(norm, 1e-300))
        clipped = clipped if math.isfinite(norm) else torch.zeros_like(update)
        noised = received[name].double() + clipped + deviation * gaussian(update, uniform)
        private |= dict.fromkeys(spec.with_aliases([name]), noised.to(state[name].dtype))
    return private


def sampling_plan(num_examples: int, config: ClientConfig) -> tuple[float, int]:
    """Return the sample rate and the number of steps of DP-SGD.

    Poisson sampling at this rate gives batches of about ``batch_size``.
    """
    steps_per_epoch = math.ceil(num_examples / config.batch_size)
    return 1 / steps_per_epoch, config.local_epochs * steps_per_epoch


def cost_of_round(
    privacy: PrivacyConfig, client: ClientConfig, num_examples: int
) -> tuple[float, float, int]:
    """Return the privacy cost of an upload, as an entry of a `Ledger`."""
    if privacy.mode == "update":
        # 2 clip_norm bounds the distance of two updates, whatever sensitivity is configured.
        return update_deviation(privacy) / (2 * privacy.clip_norm), 1.0, 1
    return privacy.noise_multiplier, *sampling_plan(num_examples, client)


@dataclass(frozen=True)
class Ledger:
    """A client's privacy spending so far, as steps of the sampled Gaussian mechanism."""

    entries: tuple[tuple[float, float, int], ...] = ()
    """Runs of equal steps: noise multiplier (standard deviation by sensitivity), sample rate and
    number of steps."""

    @classmethod
    def of(cls, columns: Mapping[str, Sequence[float]]) -> "Ledger":
        """Return the ledger of the result of `columns`; an empty one if that is empty."""
        rows = zip(*(columns.get(name, ()) for name in _COLUMNS), strict=True)
        return cls(tuple((float(noise), float(rate), int(steps)) for noise, rate, steps in rows))

    def columns(self) -> dict[str, list[float]]:
        """Return the entries as lists by name, for a MetricRecord."""
        return {
            name: [float(entry[column]) for entry in self.entries]
            for column, name in enumerate(_COLUMNS)
        }

    def after(self, noise_multiplier: float, sample_rate: float, steps: int = 1) -> "Ledger":
        """Return the ledger after some more steps."""
        entries = list(self.entries)
        if entries and entries[-1][:2] == (noise_multiplier, sample_rate):
            steps += entries.pop()[2]
        return Ledger((*entries, (noise_multiplier, sample_rate, steps)))

    def epsilon(self, delta: float) -> float:
        """Return the epsilon of all steps together, by Rényi differential privacy (Opacus)."""
        # An optional package.
        from opacus.accountants import RDPAccountant
        from opacus.accountants.analysis.rdp import get_privacy_spent

        if not self.entries:
            return 0.0
        orders = RDPAccountant.DEFAULT_ALPHAS
        each = [steps * _divergences(noise, rate) for noise, rate, steps in self.entries]
        with quiet_opacus():
            epsilon, _ = get_privacy_spent(orders=orders, rdp=np.sum(each, axis=0), delta=delta)
        return float(epsilon)


@lru_cache  # 0.1 s, and equal in each round
def _divergences(noise_multiplier: float, sample_rate: float) -> NDArray[np.float64]:
    """Return the Rényi divergence of one step at each of Opacus' orders, ``(orders,)``."""
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import compute_rdp

    orders = RDPAccountant.DEFAULT_ALPHAS
    return np.asarray(
        compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=orders)
    )


@contextmanager
def quiet_opacus() -> Iterator[None]:
    """Suppress irrelevant warnings of Opacus and torch.

    The bound on epsilon is valid at any order, and inputs need no gradient.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal order is the")
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield


def require_opacus(config: PrivacyConfig) -> None:
    """Raise a `ConfigError` if Opacus is needed and not installed."""
    if config.is_on and importlib.util.find_spec("opacus") is None:
        problem = f'privacy.mode = "{config.mode}": the package opacus is not installed'
        raise ConfigError([f'{problem}; right would be pip install ".[privacy]"'])


def unfit_layers(
    build: Callable[[], nn.Module],
    info: DatasetInfo,
    config: PrivacyConfig,
    changed: Collection[str],
) -> list[str]:
    """Return why a model cannot be trained or uploaded with privacy; empty if it can.

    ``changed`` are the buffers that a trial of the training changes.
    """
    if mixing := mixing_layers(build()):
        return [
            f"layers with batch statistics are not supported: {mixing}; "
            "right would be torch.nn.GroupNorm or LayerNorm"
        ]
    if config.mode != "example":
        return []
    if changed:
        return [
            "buffers that training changes are not supported, since they depend on the examples "
            f"without noise: {', '.join(sorted(changed))}; right would be a model without them"
        ]
    from opacus.validators import ModuleValidator

    errors = [
        f"Opacus cannot train it: {each}" for each in ModuleValidator.validate(build().train())
    ]
    return list(dict.fromkeys(errors)) or _unfit_gradients(build(), info)


def _unfit_gradients(model: nn.Module, info: DatasetInfo) -> list[str]:
    """Check that per-example gradients exist and do not depend on the rest of the batch.

    DP-SGD's noise covers the change of one example's gradient alone.
    """
    generator = make_generator(0, "trial")
    first = torch.randn(1, *info.shape, generator=generator)
    # The second batch also differs in scale.
    others = [scale * torch.randn(3, *info.shape, generator=generator) for scale in (1.0, 10.0)]
    batch, other = (torch.cat([first, each]) for each in others)
    try:
        model.train()
        by_opacus = _gradients_by_opacus(model, batch)
        if missing := [name for name, each in by_opacus.items() if each is None]:
            return [
                f"{name} has no per-example gradient; right would be layers of torch.nn, with "
                "parameters that all affect the logits"
                for name in missing
            ]
        in_batch = _gradients(model, batch)
        changing = _differing(in_batch, _gradients(model, other))
        changing += _differing(in_batch, by_opacus)
        if not changing:
            if _differing(in_batch, _gradients(model, batch, seed=1)):
                # Random layers draw other numbers in a batch of another size.
                in_batch = _gradients(model.eval(), batch)
            changing = _differing(in_batch, _gradients(model, first))
    except Exception as error:  # user code may raise anything
        return [f"Opacus cannot train it: {error}"]
    if not changing:
        return []
    names = ", ".join(list(dict.fromkeys(changing))[:5])
    return [
        "the gradient of an example must not depend on the rest of its batch, but does: "
        f"{names}. Right would be a forward without statistics over the batch, such as "
        "torch.nn.GroupNorm or LayerNorm in place of batch normalization"
    ]


def _gradients_by_opacus(model: nn.Module, batch: Tensor) -> dict[str, Tensor | None]:
    """Return Opacus' gradient of the first example of a batch, by parameter."""
    from opacus import GradSampleModule

    with drawing_from(make_generator(0, "trial")), quiet_opacus():
        wrapped = GradSampleModule(model)
        labels = torch.zeros(len(batch), dtype=torch.long)
        functional.cross_entropy(wrapped(batch), labels).backward()
    samples = {
        name: getattr(parameter, "grad_sample", None)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    found = {name: None if each is None else each[0].clone() for name, each in samples.items()}
    wrapped.to_standard_module()
    return found


def _gradients(model: nn.Module, batch: Tensor, seed: int = 0) -> dict[str, Tensor | None]:
    """Return the logits of the first example of a batch, and its gradient by parameter."""
    with drawing_from(make_generator(seed, "trial")):
        logits = model(batch)[:1]
        loss = functional.cross_entropy(logits, torch.zeros(1, dtype=torch.long))
        return {"the logits": logits.detach(), **gradients_of(loss, model)}


def _differing(left: Mapping[str, Tensor | None], right: Mapping[str, Tensor | None]) -> list[str]:
    """Return the names of common tensors that differ beyond rounding."""
    return [
        name
        for name, one in left.items()
        if one is not None
        and (other := right.get(name)) is not None
        and not torch.allclose(
            one, other, rtol=0.0, atol=_ROUNDING * float(one.abs().max()), equal_nan=True
        )
    ]


def _between(bits: Tensor) -> Tensor:
    return (bits.double() + 0.5) * 2.0**-_RANDOM_BITS
