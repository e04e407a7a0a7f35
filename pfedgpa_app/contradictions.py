"""Settings that are each right and cannot go together."""

import math
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pfedgpa_app.files import quoted
from pfedgpa_app.sections import (
    DATASETS,
    MODEL_SHAPES,
    SITES,
    WITH_OWNERS,
    DataConfig,
    DiffusionConfig,
    by_x,
)
from pfedgpa_app.strategies import PLAIN_STRATEGIES

if TYPE_CHECKING:
    from pfedgpa_app.config import Config

# Of the variance of the parameters; float32 cannot divide by less.
_MIN_SIGNAL = 1e-30
# Of a long value so many letters are shown.
_MAX_SHOWN = 200


def contradictions(config: "Config") -> Iterator[tuple[set[str], str]]:
    """Yield settings that are each right and cannot go together, with the keys they concern."""
    yield from _data_contradictions(config.data)
    if config.data.is_known:
        yield from _size_contradictions(config)
    yield from _diffusion_contradictions(config.diffusion)
    yield from _onboarding_contradictions(config)
    if config.privacy.is_on:
        yield from _privacy_contradictions(config)
    if config.client.engine == "vmap":
        yield from _engine_contradictions(config)


def _data_contradictions(data: DataConfig) -> Iterator[tuple[set[str], str]]:
    own_data = data.dataset not in DATASETS
    names = data.named_classes
    if own_data and not data.shape:
        yield (
            {"data.dataset", "data.shape"},
            f'data.shape = "": data.dataset = "{data.dataset}" is an own data set, say how '
            'large its examples are, for example "1x28x28" (channels x height x width) or "30" '
            "(features of a table)",
        )
    if own_data and (data.num_classes or len(names)) < 2:
        yield (
            {"data.dataset", "data.num-classes", "data.class-names"},
            f'data.num-classes = {data.num_classes}: data.dataset = "{data.dataset}" is an own '
            "data set, say how many classes it has (2 or more), or what they are called "
            "(data.class-names)",
        )
    num_classes = DATASETS[data.dataset].num_classes if not own_data else data.num_classes
    if names and num_classes not in (0, len(names)):
        yield (
            {"data.dataset", "data.num-classes", "data.class-names"},
            f'data.class-names = "{_shortened(data.class_names)}": has {len(names)} names for '
            f"{num_classes} classes; right would be one each",
        )
    if data.partition == "natural" and not own_data and data.dataset not in WITH_OWNERS:
        yield (
            {"data.partition", "data.dataset"},
            f'data.partition = "natural": {data.dataset} does not say whose each example is; right '
            f"would be another partition, {' or '.join(WITH_OWNERS)}, or a data set of your own",
        )
    if data.partition == "natural" and data.test_uniform_fraction:
        yield (
            {"data.partition", "data.test-uniform-fraction"},
            f"data.test-uniform-fraction = {data.test_uniform_fraction}: with data.partition = "
            '"natural" each owner\'s test examples are its own; right would be 0.0',
        )
    if data.dataset == SITES and data.shift != "none":
        yield (
            {"data.dataset", "data.shift"},
            f'data.shift = "{data.shift}": changes data that is shared out; with data.dataset = '
            f'"{SITES}" right would be "none"',
        )
    if data.dataset == SITES and data.test_uniform_fraction:
        yield (
            {"data.dataset", "data.test-uniform-fraction"},
            f"data.test-uniform-fraction = {data.test_uniform_fraction}: is of data that is shared "
            f'out; with data.dataset = "{SITES}" right would be 0.0',
        )
    if repeated := sorted(name for name, count in Counter(names).items() if count > 1):
        yield (
            {"data.class-names"},
            f'data.class-names = "{_shortened(data.class_names)}": has '
            f"{', '.join(map(quoted, repeated[:5]))} more than once; right would be each once",
        )


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def _size_contradictions(config: "Config") -> Iterator[tuple[set[str], str]]:
    data = config.data
    num_classes = data.info.num_classes
    shares_out = data.dataset != SITES
    if shares_out and data.partition == "dominant-classes" and data.dominant_classes > num_classes:
        yield (
            {"data.partition", "data.dominant-classes", "data.dataset", "data.num-classes"},
            f"data.dominant-classes = {data.dominant_classes}: {data.dataset} has only "
            f"{num_classes} classes, so at most {num_classes}",
        )
    if shares_out and data.partition == "pathological" and data.classes_per_client > num_classes:
        yield (
            {"data.partition", "data.classes-per-client", "data.dataset", "data.num-classes"},
            f"data.classes-per-client = {data.classes_per_client}: {data.dataset} has only "
            f"{num_classes} classes, so at most {num_classes}",
        )
    if data.shift in ("rotation", "contrast") and not data.info.is_image:
        yield (
            {"data.shift", "data.dataset", "data.shape"},
            f'data.shift = "{data.shift}": is one of images, and {data.dataset} has the shape '
            f'{by_x(data.info.shape)}; right would be "none" or "permuted-labels"',
        )
    if not _takes(config.model.name, data.info.shape):
        fitting = [name for name in MODEL_SHAPES if _takes(name, data.info.shape)]
        own = "a function of your own, package.module:function"
        yield (
            {"model.name", "data.dataset", "data.shape"},
            f'model.name = "{config.model.name}": takes {by_x(MODEL_SHAPES[config.model.name])} '
            f"(* is any) and {data.dataset} has {by_x(data.info.shape)}; right would be "
            f"{' or '.join(fitting) or own}",
        )


def _takes(model: str, shape: tuple[int, ...]) -> bool:
    """Tell whether a model is made for a shape, as those of one's own are."""
    sizes = MODEL_SHAPES.get(model)
    return sizes is None or (
        len(sizes) == len(shape)
        and all(size in (None, given) for size, given in zip(sizes, shape, strict=True))
    )


def _diffusion_contradictions(diffusion: DiffusionConfig) -> Iterator[tuple[set[str], str]]:
    start = diffusion.num_timesteps - 1 if diffusion.start == "auto" else diffusion.start
    yield from _grid_contradictions("diffusion", start, diffusion.num_steps, diffusion)
    if diffusion.start != "auto":  # which is where something is left
        yield from _signal_contradictions("diffusion", start, diffusion)
    if diffusion.space == "raw" and diffusion.start == "auto":
        yield (
            {"diffusion.space", "diffusion.start"},
            'diffusion.start = "auto": follows from the noise floor of the subspace; with '
            'diffusion.space = "raw" right would be a timestep, such as 200',
        )
    if diffusion.beta_start > diffusion.beta_end:
        yield (
            {"diffusion.beta-start", "diffusion.beta-end"},
            f"diffusion.beta-start = {diffusion.beta_start}: more than diffusion.beta-end = "
            f"{diffusion.beta_end}, but the noise schedule rises",
        )


def _grid_contradictions(
    section: str, start: int, num_steps: int, diffusion: DiffusionConfig
) -> Iterator[tuple[set[str], str]]:
    if start >= diffusion.num_timesteps:
        yield (
            {f"{section}.start", "diffusion.num-timesteps"},
            f"{section}.start = {start}: the forward process has the timesteps 0 to "
            f"{diffusion.num_timesteps - 1} (diffusion.num-timesteps = {diffusion.num_timesteps})",
        )
    elif num_steps > start:
        yield (
            {f"{section}.start", f"{section}.num-steps", "diffusion.num-timesteps"},
            f"{section}.num-steps = {num_steps}: there are only {start} timesteps from "
            f"{section}.start = {start} down to the clean parameters",
        )


def _signal_contradictions(
    section: str, start: int, diffusion: DiffusionConfig
) -> Iterator[tuple[set[str], str]]:
    is_right = start < diffusion.num_timesteps and diffusion.beta_start <= diffusion.beta_end
    if is_right and _signal_left(start, diffusion) < _MIN_SIGNAL:
        yield (
            {f"{section}.start", "diffusion.beta-start", "diffusion.beta-end"},
            f"{section}.start = {start}: nothing of the parameters is left at this timestep; right "
            "would be an earlier one, or less noise than diffusion.beta-end = "
            f"{diffusion.beta_end} adds",
        )


def _signal_left(timestep: int, diffusion: DiffusionConfig) -> float:
    """Return ``alphas_cumprod`` of a timestep, as `NoiseSchedule.linear` has it."""
    first, last = diffusion.beta_start, diffusion.beta_end
    rise = (last - first) / (diffusion.num_timesteps - 1)
    return math.prod(1 - (first + rise * step) for step in range(timestep + 1))


def _onboarding_contradictions(config: "Config") -> Iterator[tuple[set[str], str]]:
    yield from _grid_contradictions(
        "onboarding", config.onboarding.start, config.onboarding.num_steps, config.diffusion
    )
    yield from _signal_contradictions("onboarding", config.onboarding.start, config.diffusion)
    late, join = config.onboarding.late_clients, config.onboarding.join_round
    keys = {"onboarding.late-clients", "onboarding.join-round", "num-server-rounds"}
    if late and not 2 <= join <= config.num_server_rounds:
        yield (
            keys,
            f"onboarding.join-round = {join}: with onboarding.late-clients = {late}, the round in "
            f"which they join should be 2 to num-server-rounds = {config.num_server_rounds}",
        )
    if join and not late:
        yield (
            keys,
            f"onboarding.join-round = {join}: no client joins late; right would be "
            "onboarding.late-clients = 1 or more",
        )


def _privacy_contradictions(config: "Config") -> Iterator[tuple[set[str], str]]:
    privacy, client = config.privacy, config.client
    mode = f'privacy.mode = "{privacy.mode}"'
    if config.strategy not in PLAIN_STRATEGIES:
        yield (
            {"privacy.mode", "strategy"},
            f'strategy = "{config.strategy}": with {mode} right would be '
            f"{', '.join(PLAIN_STRATEGIES)}, whose clients train by plain SGD and upload nothing "
            "but parameters",
        )
    if config.resume_from:
        yield (
            {"privacy.mode", "resume-from"},
            f'resume-from = "{config.resume_from}": with {mode} a run cannot go on, since its '
            "clients forget with the run how much they told",
        )
    if privacy.mode == "update" and not privacy.epsilon:
        yield (
            {"privacy.mode", "privacy.epsilon"},
            f"privacy.epsilon = {privacy.epsilon}: with {mode} it decides about the noise on each "
            "upload; right would be, for example, 1.0",
        )
    if privacy.mode == "example" and client.class_prior:
        yield (
            {"privacy.mode", "client.class-prior"},
            f"client.class-prior = true: with {mode} the gradient of an image must not depend on "
            "other images, whose labels are counted there; right would be false",
        )
    if privacy.mode == "example" and client.precision != "fp32":
        yield (
            {"privacy.mode", "client.precision"},
            f'client.precision = "{client.precision}": with {mode} right would be "fp32"',
        )


def _engine_contradictions(config: "Config") -> Iterator[tuple[set[str], str]]:
    engine = 'client.engine = "vmap"'
    if config.strategy not in PLAIN_STRATEGIES:
        yield (
            {"client.engine", "strategy"},
            f'{engine}: with strategy = "{config.strategy}" right would be "loop"; only the '
            f"clients of {', '.join(PLAIN_STRATEGIES)} train by plain SGD, as one graph",
        )
    if config.privacy.mode == "example":
        yield (
            {"client.engine", "privacy.mode"},
            f'{engine}: with privacy.mode = "example" right would be "loop"; Opacus trains one '
            "model at a time",
        )
    if config.client.precision != "fp32":
        yield (
            {"client.engine", "client.precision"},
            f'{engine}: with client.precision = "{config.client.precision}" right would be "loop"; '
            "models that train as one graph do so in fp32",
        )
