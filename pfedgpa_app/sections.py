"""The sections of the settings, without ``data`` and those of the baselines."""

import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from pfedgpa_app.section import (
    Contradiction,
    Count,
    Fraction,
    NameList,
    NonNegative,
    OptionalCount,
    OwnFunction,
    Positive,
    Section,
    UnitInterval,
)

Device = Literal["auto", "cpu", "cuda"]

# Of the parameters' variance; float32 cannot divide by less.
_MIN_SIGNAL = 1e-30

ModelName = Literal["cnn-8x8", "cnn-28x28", "cnn-cifar", "resnet18", "mlp", "cnn-1d"]
# The input shapes of each model; None is any size.
MODEL_SHAPES: dict[str, tuple[int | None, ...]] = {
    "cnn-8x8": (None, 8, 8),
    "cnn-28x28": (None, 28, 28),
    "cnn-cifar": (None, 32, 32),
    "resnet18": (None, None, None),
    "mlp": (None,),
    "cnn-1d": (None, None),
}


class ModelConfig(Section):
    """The model that every client trains."""

    name: ModelName | OwnFunction = "cnn-8x8"
    send_frozen: bool = True


class ClientConfig(Section):
    """Local training: SGD on the client's own data."""

    local_epochs: Count = 5
    batch_size: Count = 10
    learning_rate: Positive = 0.03
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5
    weight_decay: NonNegative = 5e-4
    class_prior: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Device = "auto"
    engine: Literal["loop", "vmap"] = "loop"
    torch_threads: OptionalCount = 1


class ServerConfig(Section):
    """Participation in rounds, timeouts and server momentum."""

    fraction_train: Fraction = 1.0
    fraction_evaluate: UnitInterval = 1.0
    evaluate_every: OptionalCount = 1
    min_available_nodes: Count = 2
    round_timeout: Positive = 3600.0
    join_timeout: Positive = 3600.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    bank: Literal["memory", "disk"] = "memory"
    include: NameList = ""
    exclude: NameList = ""
    required: NameList = ""
    stop_at: UnitInterval = 0.0
    patience: OptionalCount = 0
    cross_site: bool = False

    def contradictions(self) -> Iterator[Contradiction]:
        """Yield contradictions between valid settings."""
        for key, value in (("stop-at", self.stop_at), ("patience", self.patience)):
            if value and not (self.fraction_evaluate and self.evaluate_every):
                yield (
                    {f"server.{key}", "server.fraction-evaluate", "server.evaluate-every"},
                    f"server.{key} = {value}: follows from evaluations during the run; right would "
                    "be server.fraction-evaluate above 0 and server.evaluate-every = 1 or more",
                )


class DiffusionConfig(Section):
    """The diffusion model on the clients' parameters."""

    denoise: bool = True
    generated_layers: Annotated[str, Field(pattern=r"[^\s,]")] = "*"
    space: Literal["subspace", "raw"] = "subspace"
    sharing: Literal["measured", "affinity", "none"] = "measured"
    measure_every: Count = 20
    own_weight: UnitInterval = 0.5
    guard: bool = True
    min_contributors: Count = 3
    max_members: Annotated[int, Field(ge=2)] = 300
    rank: Count | Literal["auto"] = "auto"
    num_timesteps: Annotated[int, Field(ge=2)] = 1000
    # For smaller values 1 - beta is 1 in float32, and the noise 0.
    beta_start: Annotated[float, Field(ge=1e-6, lt=1)] = 1e-4
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 2e-2
    start: Count | Literal["auto"] = "auto"
    num_steps: Count = 20
    fidelity: UnitInterval = 0.3
    num_draws: Count = 4
    hidden_size: Annotated[int, Field(ge=2)] = 64
    num_blocks: OptionalCount = 2
    train_steps: Count = 200
    batch_size: Count = 256
    learning_rate: Positive = 1e-2
    device: Device = "auto"

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns of ``generated-layers``, one by one."""
        return tuple(part.strip() for part in self.generated_layers.split(",") if part.strip())

    def contradictions(self) -> Iterator[Contradiction]:
        """Yield contradictions between valid settings."""
        is_auto = self.start == "auto"
        start = self.num_timesteps - 1 if self.start == "auto" else self.start
        yield from self.contradictions_of_steps("diffusion", start, self.num_steps, is_auto)
        if self.space == "raw" and is_auto:
            yield (
                {"diffusion.space", "diffusion.start"},
                'diffusion.start = "auto": follows from the noise floor of the subspace; with '
                'diffusion.space = "raw" right would be a timestep, such as 200',
            )
        if self.beta_start > self.beta_end:
            yield (
                {"diffusion.beta-start", "diffusion.beta-end"},
                f"diffusion.beta-start = {self.beta_start}: more than diffusion.beta-end = "
                f"{self.beta_end}, but the noise schedule rises",
            )

    def contradictions_of_steps(
        self, section: str, start: int, num_steps: int, is_auto: bool = False
    ) -> Iterator[Contradiction]:
        """Yield contradictions of a section's ``start`` and ``num_steps``.

        An automatic start always keeps some signal.
        """
        key, timesteps = f"{section}.start", self.num_timesteps
        if start >= timesteps:
            yield (
                {key, "diffusion.num-timesteps"},
                f"{key} = {start}: the forward process has the timesteps 0 to {timesteps - 1} "
                f"(diffusion.num-timesteps = {timesteps})",
            )
            return
        if num_steps > start:
            yield (
                {key, f"{section}.num-steps", "diffusion.num-timesteps"},
                f"{section}.num-steps = {num_steps}: there are only {start} timesteps from "
                f"{key} = {start} down to the clean parameters",
            )
        rise = (self.beta_end - self.beta_start) / (timesteps - 1)
        if is_auto or rise < 0:
            return
        # alphas_cumprod at the start, as in `NoiseSchedule.linear`
        signal = math.prod(1 - (self.beta_start + rise * step) for step in range(start + 1))
        if signal < _MIN_SIGNAL:
            yield (
                {key, "diffusion.beta-start", "diffusion.beta-end"},
                f"{key} = {start}: nothing of the parameters is left at this timestep; right "
                "would be an earlier one, or less noise than diffusion.beta-end = "
                f"{self.beta_end} adds",
            )


class OnboardingConfig(Section):
    """Treatment of clients that join late."""

    rounds: OptionalCount = 1
    guidance: NonNegative = 20.0
    start: Count = 400
    num_steps: Count = 20
    late_clients: OptionalCount = 0
    join_round: OptionalCount = 0

    def contradictions(self) -> Iterator[Contradiction]:
        """Yield contradictions between valid settings."""
        if self.join_round and not self.late_clients:
            yield (
                {"onboarding.late-clients", "onboarding.join-round"},
                f"onboarding.join-round = {self.join_round}: no client joins late; right would be "
                "onboarding.late-clients = 1 or more",
            )


class PrivacyConfig(Section):
    """Differential privacy of what clients upload."""

    mode: Literal["none", "update", "example"] = "none"
    epsilon: NonNegative = 0.0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    clip_norm: Positive = 1.0
    sensitivity: NonNegative = 0.0
    noise_multiplier: Positive = 1.0
    max_grad_norm: Positive = 1.0
    seeded_noise: bool = False

    @property
    def is_on(self) -> bool:
        """Whether uploads are to be private."""
        return self.mode != "none"

    def contradictions(self) -> Iterator[Contradiction]:
        """Yield contradictions between valid settings."""
        if self.mode == "update" and not self.epsilon:
            yield (
                {"privacy.mode", "privacy.epsilon"},
                f'privacy.epsilon = {self.epsilon}: with privacy.mode = "update" it decides about '
                "the noise on each upload; right would be, for example, 1.0",
            )


class CheckpointConfig(Section):
    """Checkpoints, from which a run can resume."""

    every: OptionalCount = 1
