"""State as named tensors: what is restored is what was kept, and what cannot be is refused."""

from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Annotated

import pytest
import torch
from torch import Tensor, nn

from pfedgpa_app.state import load_state, save_state
from pfedgpa_app.stateful import Kept, Stateful, Vector


class Colour(IntEnum):
    RED = 1
    BLUE = 2


@dataclass
class Record:
    colour: Colour = Colour.RED
    is_new: bool = True
    vector: Vector | None = None
    age: int | None = None


@dataclass(frozen=True)
class Line:
    slope: float
    matrix: Annotated[Tensor, "k d"]


@dataclass(frozen=True)
class Point:
    x: float


class Part(Stateful):
    numbers: Kept[dict[int, int]]

    def __init__(self) -> None:
        self.numbers, self.setting = {}, 0

    def complete_restored(self) -> None:
        if 13 in self.numbers:
            raise ValueError("13 is refused")
        self.setting = len(self.numbers)


class Whole(Stateful):
    part: Kept[Part]
    shape: Kept[Point | Line | None]
    records: Kept[dict[int, Record]]
    states: Kept[dict[int, dict[str, Tensor]]]
    vectors: Kept[dict[int, Vector]]
    layer: Kept[nn.Linear]
    vector: Kept[Vector]

    def __init__(self) -> None:
        self.part, self.shape, self.records, self.states, self.vectors = Part(), None, {}, {}, {}
        self.layer, self.vector, self.other = nn.Linear(2, 1), torch.zeros(3), "as it was"


def filled() -> Whole:
    whole = Whole()
    whole.part.numbers = {7: 1, 3: 2}
    whole.shape = Line(0.1, torch.rand(2, 3))
    whole.records = {5: Record(Colour.BLUE, False, torch.rand(3), 0), 2: Record()}
    whole.states = {4: {"a.weight": torch.rand(2), "b": torch.tensor(3)}, 1: {}}
    whole.vectors = {4: torch.rand(3)}
    whole.vector = torch.rand(3)
    return whole


def test_what_is_restored_from_a_file_is_what_was_kept(tmp_path: Path):
    whole, again = filled(), Whole()
    part = again.part
    save_state(tmp_path / "file", "kind", whole.state())
    again.restore(load_state(tmp_path / "file", "kind")[0])
    assert again.part is part  # whoever else holds it has what was restored
    assert (list(part.numbers.items()), part.setting) == ([(7, 1), (3, 2)], 2)
    assert isinstance(again.shape, Line)
    assert again.shape.slope == 0.1
    assert list(again.records) == [5, 2]
    five, two = again.records[5], again.records[2]
    assert (five.colour, five.is_new, five.age) == (Colour.BLUE, False, 0)
    assert (two.colour, two.is_new, two.vector, two.age) == (Colour.RED, True, None, None)
    before, after = whole.state(), again.state()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_nothing_is_kept_of_what_is_empty():
    again = filled()
    again.restore(Whole().state())
    assert (again.part.numbers, again.shape, again.records, again.states) == ({}, None, {}, {})


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("vector", None, "vector is missing; right would be one tensor"),
        ("shape.slope", None, r"shape\.slope is missing"),
        ("strange", torch.zeros(1), "the state has 'strange', which nothing here is called"),
        ("part.numbers.strange", torch.zeros(1), r"part\.numbers has 'strange'"),
        ("vector", torch.zeros(4), r"vector has the shape \(4,\); right would be \(3\)"),
        ("shape.matrix", torch.zeros(3), r"shape\.matrix has the shape \(3,\)"),
        ("vector", torch.zeros(3, dtype=torch.long), "vector has torch.int64"),
        ("layer.weight", torch.zeros(1, 3), r"layer\.weight has the shape \(1, 3\)"),
        ("layer.bias", None, r"layer\.bias is missing"),
        ("shape.slope", torch.tensor(1), r"1 values of torch\.int64; right would be 1 of"),
        ("records.colour.values", torch.tensor([2, 9]), "9 is not a valid Colour"),
        ("records.is-new.values", torch.tensor([True]), "has 'is-new'"),
        ("records.is_new.clients", torch.tensor([5, 3]), "is of other clients"),
        ("records.age.clients", torch.tensor([8]), "is of other clients"),
        ("vectors.clients", torch.tensor([4, 6]), r"vectors\.6 is missing"),
        ("states.clients", torch.tensor([1]), "states has '4'"),
        ("part.numbers.clients", torch.tensor([7, 13]), "13 is refused"),
    ],
)
def test_what_is_damaged_is_refused_and_nothing_changes(name, tensor, message: str):
    tensors = filled().state()
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    whole = filled()
    before = {each: tensor.clone() for each, tensor in whole.state().items()}
    with pytest.raises(ValueError, match=message):
        whole.restore(tensors)
    after = whole.state()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[each], after[each]) for each in before)
