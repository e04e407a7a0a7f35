"""The sections of the settings, and what they name: data sets and models."""

import csv
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from pfedgpa_app.files import composed, native_path
from pfedgpa_app.section import (
    Count,
    Fraction,
    NonNegative,
    OptionalCount,
    Positive,
    Section,
    UnitInterval,
)

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
    "watch": DatasetInfo((6, 100), 7),
}
WITH_OWNERS = ("watch",)
"""The data sets that say whose each example is."""

ByClass = Literal["dominant-classes", "dirichlet", "pathological", "disjoint", "iid"]
"""The partitions that share out the samples of each class."""
PARTITIONS: tuple[str, ...] = (*get_args(ByClass), "natural")

# The shapes that a model is made for; None is any size.
MODEL_SHAPES: dict[str, tuple[int | None, ...]] = {
    "cnn-8x8": (None, 8, 8),
    "cnn-28x28": (None, 28, 28),
    "cnn-cifar": (None, 32, 32),
    "resnet18": (None, None, None),
    "mlp": (None,),
    "cnn-1d": (None, None),
}


def _split_names(names: str) -> list[str]:
    """Split names at commas; one with a comma stands in double quotes, as in a CSV file."""
    line = " ".join(names.splitlines())
    return next(csv.reader([line], skipinitialspace=True, strict=True), [])


@lru_cache  # asked for again and again, and there may be tens of thousands
def _composed_names(names: str) -> tuple[str, ...]:
    composed_names = (composed(name.strip()) for name in _split_names(names))
    return tuple(name for name in composed_names if name)


def _check_names(names: str) -> str:
    try:
        _split_names(names)
    except csv.Error as error:
        raise PydanticCustomError(
            "names",
            "should be names with commas between them, and one that has a comma in double quotes, "
            """such as '"left, upper",right' ({reason})""",
            {"reason": str(error)},
        ) from error
    return names


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
            "watch",
            "sites",
        ]
        | OwnFunction
    ) = "digits"
    root: str = ""
    shape: Annotated[str, Field(pattern=r"^$|^[1-9]\d*(x[1-9]\d*)*$")] = ""
    num_classes: OptionalCount = 0
    class_names: Annotated[str, AfterValidator(_check_names)] = ""
    partition: ByClass | Literal["natural"] | OwnFunction = "dominant-classes"
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
        """The names of ``class-names``, by label, in Unicode's NFC; none where none are given."""
        return _composed_names(self.class_names)

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

    name: (
        Literal["cnn-8x8", "cnn-28x28", "cnn-cifar", "resnet18", "mlp", "cnn-1d"] | OwnFunction
    ) = "cnn-8x8"
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

    generator: Literal["diffusion", "mean"] = "diffusion"
    generated_layers: Annotated[str, Field(pattern=r"[^\s,]")] = "*"
    space: Literal["subspace", "raw"] = "subspace"
    sharing: Literal["measured", "kin", "none"] = "measured"
    measure_every: Count = 20
    own_weight: UnitInterval = 0.5
    guard: bool = True
    min_kin: Count = 3
    max_members: Annotated[int, Field(ge=2)] = 300
    rank: Count | Literal["auto"] = "auto"
    num_timesteps: Annotated[int, Field(ge=2)] = 1000
    # float32 takes a part of signal that is nearer to 1 for 1, and then divides by 0 noise.
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


def below_home(path: str) -> Path:
    """Return a path in full, relative ones seen from the user's home.

    The working directory of a Flower app is that of whoever started the SuperLink, so nothing may
    depend on it.
    """
    return Path.home() / os.path.expanduser(native_path(path))


def xdg_folder(variable: str, fallback: str) -> Path:
    """Return ``pfedgpa`` below an XDG base directory, ``fallback`` where the variable has none.

    The XDG specification has relative values ignored.
    """
    base = Path(os.environ.get(variable, ""))
    return (base if base.is_absolute() else Path.home() / fallback) / "pfedgpa"


def by_x(shape: Iterable[int | str | None]) -> str:
    """Write a shape as ``data.shape`` has it, with * for any size."""
    return "x".join("*" if size is None else str(size) for size in shape)
