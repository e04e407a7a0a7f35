"""The base class and the field types of all sections of the settings."""

import csv
from collections.abc import Iterator
from functools import lru_cache
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from pfedgpa_app.files import composed

Scalar = bool | int | float | str
Fraction = Annotated[float, Field(gt=0, le=1)]
UnitInterval = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
NUM_SEEDS = 2**31
Seed = Annotated[int, Field(ge=0, lt=NUM_SEEDS)]
OptionalCount = Annotated[int, Field(ge=0)]
OwnFunction = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")]


def _split_names(names: str) -> list[str]:
    """Split names at commas; one with a comma is in double quotes, as in a CSV file."""
    line = " ".join(names.splitlines())
    return next(csv.reader([line], skipinitialspace=True, strict=True), [])


@lru_cache  # called often, with up to tens of thousands of names
def listed(names: str) -> tuple[str, ...]:
    """Return the names of a `NameList`, in Unicode's NFC."""
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


NameList = Annotated[str, AfterValidator(_check_names)]
"""Names with commas between them, which `listed` returns one by one."""

Contradiction = tuple[set[str], str]
"""Valid settings that exclude each other: their keys, and what would be right."""


class Section(BaseModel):
    """Immutable, strictly typed settings with kebab-case keys."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        populate_by_name=True,
        alias_generator=lambda name: name.replace("_", "-"),
    )

    def contradictions(self) -> Iterator[Contradiction]:
        """Yield contradictions between valid settings."""
        yield from ()

    @model_validator(mode="after")
    def _check_contradictions(self) -> Self:
        if found := list(self.contradictions()):
            text = "; ".join(message for _, message in found)
            context = {"text": text, "contradictions": found}
            raise PydanticCustomError("contradiction", "{text}", context)
        return self
