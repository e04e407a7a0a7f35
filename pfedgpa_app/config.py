"""The settings of a run: one tree of pydantic models, built once from Flower's flat run config.

The keys, their defaults and what they mean stand in ``[tool.flwr.app.config]`` of pyproject.toml.
"""

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationError

from pfedgpa_app.section import (
    Count,
    Fraction,
    NonNegative,
    OptionalCount,
    Positive,
    Scalar,
    Section,
    UnitInterval,
)
from pfedgpa_app.strategies import PLAIN_STRATEGIES, STRATEGY_INFO, StrategySections

OwnFunction = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")]
Device = Literal["auto", "cpu", "cuda"]

SITES = "sites"
"""The data set of which every site brings its own part."""


class DatasetInfo(NamedTuple):
    """What a model must know of a data set: the shape of an example, and how many classes it has.

    The shape is ``(channels, height, width)`` of images, ``(features,)`` of a table's rows,
    ``(channels, length)`` of signals, or any other.
    """

    shape: tuple[int, ...]
    num_classes: int

    @property
    def is_image(self) -> bool:
        """Whether an example is an image."""
        return len(self.shape) == 3


DATASETS: dict[str, DatasetInfo] = {
    "digits": DatasetInfo((1, 8, 8), 10),
    "fashion-mnist": DatasetInfo((1, 28, 28), 10),
    "emnist-balanced": DatasetInfo((1, 28, 28), 47),
    "emnist-byclass": DatasetInfo((1, 28, 28), 62),
    "cifar10": DatasetInfo((3, 32, 32), 10),
    "breast-cancer": DatasetInfo((30,), 2),
}

# The shapes that a model is made for; None is any size.
MODEL_SHAPES: dict[str, tuple[int | None, ...]] = {
    "cnn-8x8": (None, 8, 8),
    "cnn-28x28": (None, 28, 28),
    "cnn-cifar": (None, 32, 32),
    "resnet18": (None, None, None),
    "mlp": (None,),
}

# Settings that had another name in earlier versions, whose runs and models are there still.
_RENAMED = {"data.image-shape": "data.shape"}


# Settings of earlier versions, which the folders of their runs name, and what is done now.
_REMOVED = {"diffusion.blocks": "whole", "diffusion.old-uploads": "kin"}


class ConfigError(ValueError):
    """Settings that a run cannot start with; the message lists every problem, one a line."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        lines = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"The configuration has {len(problems)} problem(s):\n{lines}")


class DataConfig(Section):
    """Which data, and how the clients share it."""

    dataset: (
        Literal[
            "digits",
            "fashion-mnist",
            "emnist-balanced",
            "emnist-byclass",
            "cifar10",
            "breast-cancer",
            "sites",
        ]
        | OwnFunction
    ) = "digits"
    root: str = ""
    shape: Annotated[str, Field(pattern=r"^$|^[1-9]\d*(x[1-9]\d*)*$")] = ""
    num_classes: OptionalCount = 0
    class_names: str = ""
    partition: Literal["dominant-classes", "dirichlet", "pathological", "disjoint", "iid"] = (
        "dominant-classes"
    )
    train_samples: OptionalCount = 30
    test_samples: OptionalCount = 0
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    num_groups: Count = 2
    dominant_classes: Count = 5
    uniform_fraction: UnitInterval = 0.0
    dirichlet_alpha: Positive = 0.5
    classes_per_client: Count = 2
    test_uniform_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    shift: Literal["none", "rotation", "contrast", "permuted-labels"] = "none"
    shift_by: Literal["group", "client"] = "group"

    @property
    def info(self) -> DatasetInfo:
        """Shape and number of classes, of the named data set or as given for an own one."""
        if self.dataset in DATASETS:
            return DATASETS[self.dataset]
        shape = tuple(int(part) for part in self.shape.split("x"))
        return DatasetInfo(shape, self.num_classes or len(self.named_classes))

    @property
    def is_known(self) -> bool:
        """Whether `info` can tell."""
        num_classes = self.num_classes or len(self.named_classes)
        return self.dataset in DATASETS or (self.shape != "" and num_classes >= 2)

    @property
    def named_classes(self) -> tuple[str, ...]:
        """The names of ``class-names``, by label; none where none are given."""
        return tuple(name.strip() for name in self.class_names.split(",") if name.strip())

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, by label; where none are given, the labels themselves."""
        return self.named_classes or tuple(map(str, range(self.info.num_classes)))

    @property
    def root_path(self) -> Path:
        """The folder of the data sets, absolute."""
        return below_home(self.root) if self.root else xdg_folder("XDG_CACHE_HOME", ".cache")


class ModelConfig(Section):
    """The model that every client trains."""

    name: Literal["cnn-8x8", "cnn-28x28", "cnn-cifar", "resnet18", "mlp"] | OwnFunction = "cnn-8x8"


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
    """Who takes part in a round, and how long the server waits."""

    fraction_train: Fraction = 1.0
    fraction_evaluate: UnitInterval = 1.0
    evaluate_every: OptionalCount = 1
    min_available_nodes: Count = 2
    round_timeout: Positive = 3600.0
    join_timeout: Positive = 3600.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    bank: Literal["memory", "disk"] = "memory"


class DiffusionConfig(Section):
    """The diffusion model on the clients' parameters."""

    generator: Literal["diffusion", "kin-mean", "shrinkage", "upload"] = "diffusion"
    generated_layers: Annotated[str, Field(pattern=r"[^\s,]")] = "*"
    space: Literal["subspace", "raw"] = "subspace"
    sharing: Literal["kin", "measured"] = "measured"
    measure_every: Count = 20
    guard: bool = True
    min_kin: Count = 3
    max_members: Annotated[int, Field(ge=2)] = 300
    rank: Count | Literal["auto"] = "auto"
    num_timesteps: Annotated[int, Field(ge=2)] = 1000
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 1e-4
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


class OnboardingConfig(Section):
    """What becomes of clients that appear when others have been trained already."""

    rounds: OptionalCount = 1
    guidance: NonNegative = 20.0
    start: Count = 400
    num_steps: Count = 20
    late_clients: OptionalCount = 0
    join_round: OptionalCount = 0


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


class CheckpointConfig(Section):
    """What the server writes down so that a run can go on after its end."""

    every: OptionalCount = 1


class Config(StrategySections):
    """Everything a run depends on: the strategy and the sections of all, and what follows here."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    num_server_rounds: Count = 10
    output_dir: str = ""
    resume_from: str = ""
    tracking: Literal["", "tensorboard", "mlflow"] = ""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    client: ClientConfig = ClientConfig()
    server: ServerConfig = ServerConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    onboarding: OnboardingConfig = OnboardingConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any]) -> "Config":
        """Build the settings from a flat run config such as ``{"diffusion.start": 200}``.

        What an earlier version wrote is passed over where it asks for what is done now anyway.

        Raises
        ------
        ConfigError
            With every problem: unknown keys, wrong types, values out of range, contradictions.
        """
        known = cls().to_flat().keys()
        problems = {
            key: _unknown(key, value, known) for key, value in flat.items() if key not in known
        }
        sound = {key: value for key, value in flat.items() if key in known}
        try:
            config = cls.model_validate(_nest(sound))
        except ValidationError as error:
            problems |= _describe(error, sound)
            # The rest is judged as if the wrong values had not been given.
            config = cls.model_validate(
                _nest({k: v for k, v in sound.items() if k not in problems})
            )
        contradictions = [
            message for keys, message in _contradictions(config) if not keys & problems.keys()
        ]
        if problems or contradictions:
            raise ConfigError([*problems.values(), *contradictions])
        return config

    def to_flat(self) -> dict[str, Scalar]:
        """Return the settings as a flat run config, the inverse of `from_flat`."""
        return dict(flatten(self.model_dump(by_alias=True)))

    @classmethod
    def from_older(cls, flat: Mapping[str, Any]) -> "Config":
        """Build the settings from what `to_flat` returned, perhaps in an earlier version.

        Raises
        ------
        ConfigError
            As `from_flat`, of settings that are no longer there too.
        """
        return cls.from_flat(
            {
                _RENAMED.get(key, key): value
                for key, value in flat.items()
                if (key, value) not in _REMOVED.items()
            }
        )

    @property
    def changed(self) -> dict[str, Scalar]:
        """The settings that differ from the defaults, as a flat run config."""
        defaults = Config().to_flat()
        return {key: value for key, value in self.to_flat().items() if value != defaults[key]}

    @property
    def output_path(self) -> Path:
        """The folder of the runs, absolute."""
        if self.output_dir:
            return below_home(self.output_dir)
        return xdg_folder("XDG_DATA_HOME", ".local/share") / "runs"

    @property
    def earlier_path(self) -> Path | None:
        """The folder of the run to go on from, absolute; None if there is none."""
        if not self.resume_from:
            return None
        return self.output_path / os.path.expanduser(self.resume_from)

    @property
    def decisive(self) -> dict[str, Scalar]:
        """The settings that decide about results, as a flat run config.

        Where the output goes, who else is told, how far the run goes, what it goes on from, how
        long it waits for clients and when it judges are not among them, nor are the settings of
        strategies that the run does not have.
        """
        free = {
            "output-dir",
            "num-server-rounds",
            "resume-from",
            "tracking",
            "checkpoint.every",
            "server.min-available-nodes",
            "server.round-timeout",
            "server.join-timeout",
            "server.evaluate-every",
        }
        if STRATEGY_INFO[self.strategy].depends_on_length:
            free.remove("num-server-rounds")
        sections = STRATEGY_INFO.keys() - {self.strategy}
        if self.strategy != "pfedgpa":
            free |= {f"onboarding.{name}" for name in ("rounds", "guidance", "start", "num-steps")}
            sections.add("diffusion")
        return {
            key: value
            for key, value in self.to_flat().items()
            if key not in free and key.partition(".")[0] not in sections
        }

    def differences(self, other: "Config") -> dict[str, tuple[Scalar, Scalar]]:
        """Return the settings that decide about results and differ, with both values."""
        theirs = other.to_flat()
        return {
            key: (value, theirs[key])
            for key, value in self.decisive.items()
            if value != theirs[key]
        }


def below_home(path: str) -> Path:
    """Return a path in full, relative ones seen from the user's home.

    The working directory of a Flower app is that of whoever started the SuperLink, so nothing may
    depend on it.
    """
    return Path.home() / os.path.expanduser(path)


def xdg_folder(variable: str, fallback: str) -> Path:
    """Return ``pfedgpa`` below an XDG base directory, ``fallback`` where the variable has none.

    The XDG specification has relative values ignored.
    """
    base = Path(os.environ.get(variable, ""))
    return (base if base.is_absolute() else Path.home() / fallback) / "pfedgpa"


def _contradictions(config: Config) -> Iterator[tuple[set[str], str]]:
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
            f'data.class-names = "{data.class_names}": has {len(names)} names for {num_classes} '
            "classes; right would be one each",
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
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield (
            {"data.class-names"},
            f'data.class-names = "{data.class_names}": has "{name}" more than once',
        )


def _size_contradictions(config: Config) -> Iterator[tuple[set[str], str]]:
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


def by_x(shape: Iterable[int | None]) -> str:
    """Write a shape as ``data.shape`` has it, with * for any size."""
    return "x".join("*" if size is None else str(size) for size in shape)


def _diffusion_contradictions(diffusion: DiffusionConfig) -> Iterator[tuple[set[str], str]]:
    start = diffusion.num_timesteps - 1 if diffusion.start == "auto" else diffusion.start
    yield from _grid_contradictions("diffusion", start, diffusion.num_steps, diffusion)
    if diffusion.space == "raw" and diffusion.start == "auto":
        yield (
            {"diffusion.space", "diffusion.start"},
            'diffusion.start = "auto": follows from the noise floor of the subspace; with '
            'diffusion.space = "raw" right would be a timestep, such as 200',
        )
    if diffusion.space == "raw" and diffusion.generator in ("kin-mean", "shrinkage"):
        yield (
            {"diffusion.space", "diffusion.generator"},
            f'diffusion.generator = "{diffusion.generator}": works along principal axes; with '
            'diffusion.space = "raw" right would be "diffusion"',
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


def _onboarding_contradictions(config: Config) -> Iterator[tuple[set[str], str]]:
    yield from _grid_contradictions(
        "onboarding", config.onboarding.start, config.onboarding.num_steps, config.diffusion
    )
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


def _privacy_contradictions(config: Config) -> Iterator[tuple[set[str], str]]:
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


def _engine_contradictions(config: Config) -> Iterator[tuple[set[str], str]]:
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


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn ``{"seed": 0, "a.b": 1}`` into ``{"seed": 0, "a": {"b": 1}}``."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return nested


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the flat keys and the values of nested settings, the way Flower flattens them."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _unknown(key: str, value: object, known: Iterable[str]) -> str:
    if key in _REMOVED:
        return f'{key} = {_show(value)}: is no setting any more; every run does "{_REMOVED[key]}"'
    close = difflib.get_close_matches(key, known, n=1)
    hint = f", did you mean {close[0]}?" if close else ""
    return f"{key} = {_show(value)}: no such setting{hint}"


def _describe(error: ValidationError, flat: Mapping[str, Any]) -> dict[str, str]:
    """Turn pydantic's errors into one sentence a key; a union reports one error an alternative."""
    wanted: dict[str, list[str]] = {}
    for item in error.errors():
        location = [str(part) for part in item["loc"]]
        key = next(key for n in (1, 2) if (key := ".".join(location[:n])) in flat)
        wanted.setdefault(key, []).append(_wanted(item))
    return {
        key: f"{key} = {_show(flat[key])}: "
        + " or ".join(dict.fromkeys(texts)).replace(" or should be ", " or ")
        for key, texts in wanted.items()
    }


def _wanted(item: Any) -> str:
    """Say what would have been right instead of one of pydantic's errors."""
    match item["type"]:
        case "literal_error":
            return f"should be {item['ctx']['expected']}"
        case "string_pattern_mismatch" if "x[1-9]" in item["ctx"]["pattern"]:
            return (
                'should read like "1x28x28" (channels x height x width) or "30" (features of a '
                "table)"
            )
        case "string_pattern_mismatch" if ":" not in item["ctx"]["pattern"]:
            return 'should be patterns of parameter names, such as "*" or "fc.*,head.*"'
        case "string_pattern_mismatch":
            return 'should read like "package.module:function"'
        case _:
            message: str = item["msg"]
            return (
                message.removeprefix("Input ")
                .replace("a valid integer", "a whole number")
                .replace("valid ", "")
            )


def _show(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
