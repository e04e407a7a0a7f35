"""A client's personalized model in one file, with all that its use elsewhere takes."""

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
from pfedgpa_app.state import Shapes, load_state, save_state

MODEL_KIND = "pfedgpa-model-1"
# Of an example: as many as the largest picture has in three channels.
_MAX_NUMBERS = 3 * MAX_PIXELS


class ExportError(ValueError):
    """A model that cannot be used so; the message says why, and what would be right."""


class _Facts(Section, extra="ignore"):
    """What is read of the metadata of a file."""

    client: OptionalCount
    round: OptionalCount
    partition_id: OptionalCount | None
    num_partitions: OptionalCount | None
    image_mean: list[Annotated[float, Field(allow_inf_nan=False)]] | None
    image_std: list[Positive] | None
    class_counts: list[OptionalCount] | None = None
    run: str = ""
    config: dict[str, Any]


def _read(file: Path, raw: dict[str, Any]) -> tuple[_Facts, Config]:
    """Return the metadata of a file, and the settings of its run.

    Raises
    ------
    ExportError
        If they are damaged.
    """
    try:
        facts = _Facts.model_validate(raw)
        return facts, Config.from_flat(facts.config)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ExportError(f"{file} is damaged: {wrong}") from error
    except ValueError as error:
        raise ExportError(f"{file} is damaged, or of another version: {error}") from error


def _check_shapes(file: Path, config: Config, shapes: Shapes) -> None:
    """Refuse a file whose settings name a model of other shapes than its tensors have.

    Nothing is allocated for it: a model of the app would take as much memory as the settings ask
    for, whatever is in the file. Models of one's own are only built where they are trusted.

    Raises
    ------
    ExportError
        If it is one, or its examples are too large.
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
        wanted = {name: tuple(each.shape) for name, each in make(info).state_dict().items()}
    for name in sorted(wanted.keys() | shapes.keys()):
        if wanted.get(name) != shapes.get(name):
            raise ExportError(
                f"{file} is damaged: {name} has the shape {shapes.get(name)}, and with its "
                f'settings model.name = "{config.model.name}" has {wanted.get(name)}'
            )


@dataclass(frozen=True)
class ExportedModel:
    """A personalized model and where it comes from.

    Attributes
    ----------
    state
        The state_dict.
    config
        The settings of its run.
    client
        The number of its client in the run.
    server_round
        The round after which it was written.
    stats
        Mean and standard deviation of each channel of the client's images, ``(channels,)``, or of
        each feature of its table. None if the client did not tell.
    partition
        Which partition of the data the client has, and of how many. None if it did not tell.
    class_counts
        How many examples of each class the client trained on. Clients never tell the server;
        `with_class_counts` counts where the data is at hand. A run with ``client.class-prior``
        needs them to predict.
    trusted
        Whether own functions that the settings name may be imported and called. They are code of
        whoever wrote the file's settings.
    run
        The id of its run; empty if that is not known, as in files of older versions.
    """

    state: StateDict
    config: Config
    client: int
    server_round: int
    stats: ImageStats | None = None
    partition: tuple[int, int] | None = None
    class_counts: tuple[int, ...] | None = None
    trusted: bool = False
    run: str = ""

    @classmethod
    def load(cls, file: Path, *, trusted: bool = False) -> "ExportedModel":
        """Read what `save` wrote, as data alone.

        Raises
        ------
        ValueError
            If the file is missing, damaged or foreign.
        """

        def check(raw: dict[str, Any], shapes: Shapes) -> None:
            _check_shapes(file, _read(file, raw)[1], shapes)

        state, raw = load_state(file, MODEL_KIND, check)
        facts, config = _read(file, raw)
        stats = partition = None
        if facts.image_mean is not None and facts.image_std is not None:
            stats = ImageStats(torch.tensor(facts.image_mean), torch.tensor(facts.image_std))
        if facts.partition_id is not None and facts.num_partitions is not None:
            partition = (facts.partition_id, facts.num_partitions)
        counts = None if facts.class_counts is None else tuple(facts.class_counts)
        of_client = (facts.client, facts.round, stats, partition, counts)
        return cls(state, config, *of_client, trusted, facts.run)

    def save(self, file: Path) -> None:
        """Write a safetensors file of the state_dict, in place of an older file in one step.

        What is known beside the tensors is its metadata under ``facts``, in JSON: client, round,
        run, partition-id, num-partitions, model, shape, num-classes, image-mean, image-std,
        class-counts and config, the flat settings of the run. What is not known is null.
        """
        info = self.config.data.info
        partition_id, num_partitions = self.partition or (None, None)
        mean, std = (values.tolist() for values in self.stats) if self.stats else (None, None)
        facts = {
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
        save_state(file, MODEL_KIND, self.state, **facts)

    def predict(self, images: Tensor) -> Tensor:
        """Return the probabilities of the classes, ``(num_examples, num_classes)``.

        Parameters
        ----------
        images
            ``(num_examples, *shape)``: images ``(channels, height, width)`` or another shape, uint8
            or int32 (16 bits), or float32 like the data set that the model was trained on. A table
            may be of either.

        Raises
        ------
        ValueError
            If the model does not take such examples, their normalization is not known, or it cannot
            be built.
        """
        shape = self.config.data.info.shape
        if tuple(images.shape[1:]) != shape:
            right = ", ".join(map(str, ("n", *shape)))
            raise ExportError(f"examples of shape {tuple(images.shape)}; right would be ({right})")
        stats = self._known_stats
        # Float data counts as normalized, which no uint8 data is.
        is_float = not bool(stats.mean.any()) and bool((stats.std == 1).all())
        dtypes = [torch.float32] if is_float else [torch.uint8, LEVELS]
        if len(shape) > 1 and images.dtype not in dtypes:
            raise ExportError(
                f"examples of {images.dtype}; right would be {dtypes[0]}, in the units of the data "
                "that the model was trained on (an .npz file can hold both)"
            )
        offset = self._offset
        module = self.module
        with self._named():
            logits = logits_of(module, images, stats, self.config.client.precision)
        return (logits if offset is None else logits + offset).softmax(dim=1)

    def evaluate(self) -> tuple[Evaluation, int]:
        """Return accuracy and loss on the client's own test set, and how many images it has.

        Raises
        ------
        ValueError
            If the test set or the normalization is not known, or the model cannot be built.
        """
        data = self._client_data()
        prior = class_prior(data.train_labels, self.config.data.info.num_classes)
        module, stats = self.module, self._known_stats
        with self._named():
            result = evaluate(
                module,
                data.test_inputs,
                data.test_labels,
                stats,
                self.config.client.precision,
                offset=prior if self.config.client.class_prior else None,
            )
        return result, len(data.test_labels)

    def with_class_counts(self, counts: Sequence[int] | None = None) -> "ExportedModel":
        """Return the model with the class counts of its client's training images.

        Without ``counts`` they are taken from the data of the run, if the file needs them and
        its settings tell which data that is.

        Raises
        ------
        ValueError
            If there is not one count a class, or one is negative.
        """
        if counts is None:
            if not self.config.client.class_prior or self.partition is None:
                return self
            labels = self._client_data().train_labels
            counts = torch.bincount(labels, minlength=self.config.data.info.num_classes).tolist()
        if not self.config.client.class_prior:
            raise ExportError(
                "class counts: the model was trained without client.class-prior and predicts "
                "without them; right would be to leave them out"
            )
        num_classes = self.config.data.info.num_classes
        if len(counts) != num_classes or min(counts) < 0:
            raise ExportError(
                f"class counts {','.join(map(str, counts))}: right would be {num_classes} numbers "
                "from 0, how many images of each class the client trained on"
            )
        return replace(self, class_counts=tuple(counts))

    def _client_data(self) -> ClientData:
        """Load the partition of the run's data that the client had."""
        if self.partition is None:
            raise ExportError(
                f"client {self.client} did not tell which partition its data is, or has data of "
                "its own; right would be its images and their classes"
            )
        self._trust(f'data.dataset = "{self.config.data.dataset}"')
        if self.config.data.root and not self.trusted:
            raise ExportError(
                f'data.root = "{self.config.data.root}" is a folder that the file names, where '
                "data may be written; if you know where the file comes from, let it be used "
                "(--trust)"
            )
        return client_data(self.config.data, self.config.seed, *self.partition)

    @cached_property
    def module(self) -> nn.Module:
        """The model itself, on the CPU."""
        config = self.config
        self._trust(f'model.name = "{config.model.name}"')
        module = build_model(config.model.name, config.data.info, config.seed)
        # Frozen weights may be other ones here: those of the run are in the file.
        replace(ModelSpec.of(module), fixed=frozenset()).layout().check(self.state)
        module.load_state_dict(self.state)
        return module

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Name the model if it fails, in an `ExportError`."""
        try:
            yield
        except Exception as error:  # one of the user's raises whatever it likes
            raise ExportError(
                f'model.name = "{self.config.model.name}": failed with {described(error)}'
            ) from error

    @property
    def _offset(self) -> Tensor | None:
        """What is added to the logits, ``(num_classes,)``."""
        if not self.config.client.class_prior:
            return None
        if self.class_counts is None:
            raise ExportError(
                "the model was trained with client.class-prior, and predicts with the class counts "
                f"of client {self.client}, which stay with it; right would be to name them "
                '(--class-counts "12,0,30", a number a class)'
            )
        counts = self.with_class_counts(self.class_counts).class_counts
        return log_prior(torch.tensor(counts))

    @property
    def _known_stats(self) -> ImageStats:
        if self.stats is None:
            raise ExportError(f"client {self.client} did not tell how its data is normalized")
        size = self.config.data.info.shape[0]
        if any(values.shape != (size,) for values in self.stats):
            raise ExportError(
                f"client {self.client} told mean and deviation of {len(self.stats.mean)} channels "
                f"or features; right would be {size}"
            )
        return self.stats

    def _trust(self, setting: str) -> None:
        """Refuse to call what a file names, unless whoever loaded it said that it may be."""
        if ":" in setting and not self.trusted:
            raise ExportError(
                f"{setting} is a function of Python code that the file names; if you know where "
                "the file comes from, let it be called (--trust)"
            )
