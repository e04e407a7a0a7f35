"""A client's personalized model in one self-contained file."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn

from pfedgpa_app.arrays import LEVELS
from pfedgpa_app.config import Config
from pfedgpa_app.data import ClientData, ImageStats, client_data
from pfedgpa_app.errors import described
from pfedgpa_app.evaluation import Evaluation, class_prior, evaluate, log_prior, logits_of
from pfedgpa_app.images import MAX_PIXELS
from pfedgpa_app.model_spec import ModelSpec
from pfedgpa_app.models import MODELS, build_model
from pfedgpa_app.parameters import StateDict
from pfedgpa_app.section import OptionalCount, Positive, Section
from pfedgpa_app.state import Shapes, load_header, load_state, save_state

MODEL_KIND = "pfedgpa-model-2"
# Of an example: three channels of the largest image.
_MAX_NUMBERS = 3 * MAX_PIXELS


class ExportError(ValueError):
    """An exported model that cannot be used; the message says what would be right."""


class _Metadata(Section, extra="ignore"):
    client: OptionalCount
    round: OptionalCount
    partition_id: OptionalCount | None
    num_partitions: OptionalCount | None
    image_mean: list[Annotated[float, Field(allow_inf_nan=False)]] | None
    image_std: list[Positive] | None
    class_counts: list[OptionalCount] | None = None
    run: str = ""
    config: dict[str, Any]


def _read(file: Path, raw: dict[str, Any]) -> tuple[_Metadata, Config]:
    try:
        metadata = _Metadata.model_validate(raw)
        return metadata, Config.from_flat(metadata.config)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ExportError(f"{file} is damaged: {wrong}") from error
    except ValueError as error:
        raise ExportError(f"{file} is damaged, or of another version: {error}") from error


def _check_shapes(file: Path, config: Config, shapes: Shapes) -> None:
    """Refuse a file whose tensors do not have the shapes of the model in its settings.

    The model is built on the meta device, since a damaged file may describe one of any size. Own
    models are not checked here: they are only built if they are trusted.
    """
    info, make = config.data.info, MODELS.get(config.model.name)
    if math.prod(info.shape) > _MAX_NUMBERS:
        raise ExportError(
            f"{file} is damaged: examples of shape {info.shape}; right would be {_MAX_NUMBERS:,} "
            "numbers or less"
        )
    if make is None:
        return
    with torch.device("meta"):
        expected = {name: tuple(each.shape) for name, each in make(info).state_dict().items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            raise ExportError(
                f"{file} is damaged: {name} has the shape {shapes.get(name)}, and with its "
                f'settings model.name = "{config.model.name}" has {expected.get(name)}'
            )


@dataclass(frozen=True)
class ExportedModel:
    """A personalized model and its origin."""

    state: StateDict
    """The state_dict."""
    config: Config
    """The settings of its run."""
    client: int
    """The number of its client in the run."""
    server_round: int
    """The round after which it was exported."""
    stats: ImageStats | None = None
    """Normalization statistics of the client's data; None if the client did not report them."""
    partition: tuple[int, int] | None = None
    """The client's partition and their number; None if the client did not report it."""
    class_counts: tuple[int, ...] | None = None
    """The client's training examples of each class, which predictions with ``client.class-prior``
    need. The server does not know them; `with_class_counts` counts them if it has the data."""
    trusted: bool = False
    """Whether own functions in the settings, code of the file's author, may be called."""
    run: str = ""
    """The id of its run; empty if unknown, as in files of older versions."""

    @classmethod
    def load(cls, file: Path, *, trusted: bool = False) -> "ExportedModel":
        """Read a file of `save`, without running any code.

        Raises `ValueError` if the file is missing, damaged or foreign.
        """
        raw, shapes = load_header(file, MODEL_KIND)
        metadata, config = _read(file, raw)
        _check_shapes(file, config, shapes)
        state, _ = load_state(file, MODEL_KIND)
        stats = partition = None
        if metadata.image_mean is not None and metadata.image_std is not None:
            stats = ImageStats(torch.tensor(metadata.image_mean), torch.tensor(metadata.image_std))
        if metadata.partition_id is not None and metadata.num_partitions is not None:
            partition = (metadata.partition_id, metadata.num_partitions)
        counts = None if metadata.class_counts is None else tuple(metadata.class_counts)
        of_client = (metadata.client, metadata.round, stats, partition, counts)
        return cls(state, config, *of_client, trusted, metadata.run)

    def save(self, file: Path) -> None:
        """Write a safetensors file of the state_dict, atomically.

        Its metadata has JSON under ``fields``: client, round, run, partition-id, num-partitions,
        model, shape, num-classes, image-mean, image-std, class-counts and config, the flat settings
        of the run. Unknown values are null.
        """
        info = self.config.data.info
        partition_id, num_partitions = self.partition or (None, None)
        mean, std = (values.tolist() for values in self.stats) if self.stats else (None, None)
        metadata = {
            "client": self.client,
            "round": self.server_round,
            "run": self.run,
            "partition-id": partition_id,
            "num-partitions": num_partitions,
            "model": self.config.model.name,
            "shape": info.shape,
            "num-classes": info.num_classes,
            "image-mean": mean,
            "image-std": std,
            "class-counts": self.class_counts,
            "config": self.config.to_flat(),
        }
        save_state(file, MODEL_KIND, self.state, **metadata)

    def predict(self, images: Tensor) -> Tensor:
        """Return the probabilities of the classes, ``(num_examples, num_classes)``.

        Images ``(num_examples, *shape)`` are uint8, int32 (16 bits) or float32 like the training
        data; tables are any of these. Raises `ValueError` if the examples do not fit, their
        normalization is unknown, or the model cannot be built.
        """
        shape = self.config.data.info.shape
        if tuple(images.shape[1:]) != shape:
            right = ", ".join(map(str, ("n", *shape)))
            raise ExportError(f"examples of shape {tuple(images.shape)}; right would be ({right})")
        stats = self._known_stats
        # Only float data has trivial statistics.
        is_float = bool((stats.mean == 0).all() and (stats.std == 1).all())
        dtypes = [torch.float32] if is_float else [torch.uint8, LEVELS]
        if len(shape) > 1 and images.dtype not in dtypes:
            raise ExportError(
                f"examples of {images.dtype}; right would be {dtypes[0]}, in the units of the data "
                "that the model was trained on (an .npz file can hold both)"
            )
        offset, module = self._offset, self.module
        with self._named():
            logits = logits_of(module, images, stats, self.config.client.precision)
        return (logits if offset is None else logits + offset).softmax(dim=1)

    def evaluate(self) -> tuple[Evaluation, int]:
        """Return accuracy and loss on the client's own test set, and its size.

        Raises `ValueError` if the test set or the normalization is unknown, or the model cannot be
        built.
        """
        data = self._client_data()
        prior = class_prior(data.train_labels, self.config.data.info.num_classes)
        offset = prior if self.config.client.class_prior else None
        module, stats, precision = self.module, self._known_stats, self.config.client.precision
        with self._named():
            test_set = (data.test_inputs, data.test_labels)
            result = evaluate(module, *test_set, stats, precision, offset=offset)
        return result, len(data.test_labels)

    def with_class_counts(self, counts: Sequence[int] | None = None) -> "ExportedModel":
        """Return the model with the class counts of its client's training examples.

        By default they are counted in the client's partition, if they are needed and it is known.
        Raises `ValueError` if there is not one count per class, or one is negative.
        """
        uses_counts, num_classes = self.config.client.class_prior, self.config.data.info.num_classes
        if counts is None:
            if not uses_counts or self.partition is None:
                return self
            counts = self._client_data().train_labels.bincount(minlength=num_classes).tolist()
        if not uses_counts:
            raise ExportError(
                "class counts: the model was trained without client.class-prior and predicts "
                "without them; right would be to leave them out"
            )
        if len(counts) != num_classes or min(counts) < 0:
            raise ExportError(
                f"class counts {','.join(map(str, counts))}: right would be {num_classes} numbers "
                "from 0, the client's training examples of each class"
            )
        return replace(self, class_counts=tuple(counts))

    def _client_data(self) -> ClientData:
        data = self.config.data
        if self.partition is None:
            raise ExportError(
                f"the examples of client {self.client} are not known here: it has its own data, or "
                "reported no partition; right would be their folder in place of --test-set"
            )
        self._trust(f'data.dataset = "{data.dataset}"')
        if data.root and not self.trusted:
            raise ExportError(
                f'data.root = "{data.root}" is a folder named by the file, where data may be '
                "written; if you trust the file, allow it (--trust)"
            )
        return client_data(data, self.config.seed, *self.partition)

    @cached_property
    def module(self) -> nn.Module:
        """The model itself, on the CPU."""
        config = self.config
        self._trust(f'model.name = "{config.model.name}"')
        module = build_model(config.model.name, config.data.info, config.seed)
        # Frozen weights are those of the file, which may differ from those built here.
        replace(ModelSpec.of(module), fixed=frozenset()).layout().check(self.state)
        module.load_state_dict(self.state)
        return module

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Turn errors of the model into an `ExportError` that names it."""
        try:
            yield
        except Exception as error:  # user code may raise anything
            raise ExportError(
                f'model.name = "{self.config.model.name}": failed with {described(error)}'
            ) from error

    @property
    def _offset(self) -> Tensor | None:
        """The class prior that is added to the logits, ``(num_classes,)``."""
        if not self.config.client.class_prior:
            return None
        if self.class_counts is None:
            raise ExportError(
                "the model was trained with client.class-prior, and predicts with the class counts "
                f"of client {self.client}, which are not in the file; right would be to give them "
                '(--class-counts "12,0,30", one number per class)'
            )
        counts = self.with_class_counts(self.class_counts).class_counts
        return log_prior(torch.tensor(counts))

    @property
    def _known_stats(self) -> ImageStats:
        if self.stats is None:
            raise ExportError(f"client {self.client} did not report how its data is normalized")
        size = self.config.data.info.shape[0]
        if any(values.shape != (size,) for values in self.stats):
            raise ExportError(
                f"client {self.client} reported statistics of {len(self.stats.mean)} channels "
                f"or features; right would be {size}"
            )
        return self.stats

    def _trust(self, setting: str) -> None:
        """Refuse to call a function that the file names, unless the file is trusted."""
        if ":" in setting and not self.trusted:
            raise ExportError(
                f"{setting} is a Python function named by the file; if you trust the file, allow "
                "calling it (--trust)"
            )
