"""The base class and the field types of all sections of the settings."""

from collections.abc import Iterator
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

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

Contradiction = tuple[set[str], str]
"""Valid settings that exclude each other: their keys, and what would be right."""


class ContradictionError(ValueError):
    """Settings that exclude each other."""

    def __init__(self, contradictions: list[Contradiction]) -> None:
        self.contradictions = contradictions
        super().__init__("; ".join(message for _, message in contradictions))


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
            raise ContradictionError(found)
        return self
