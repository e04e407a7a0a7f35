"""Splitting a state_dict into a vector and a rest, refusing foreign ones, and the average."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pfedgpa_app.config import DATASETS
from pfedgpa_app.models import build_model
from pfedgpa_app.parameters import ParameterError, ParameterLayout, StateDict, weighted_average
from pfedgpa_app.randomness import make_generator

GENERATED_DTYPES = (torch.float32, torch.float16)
OTHER_DTYPES = (torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool)


def with_batch_norm() -> StateDict:
    state = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 3)).state_dict()
    state["1.num_batches_tracked"].fill_(7)
    state["1.running_mean"].fill_(0.25)
    return state


def small_cnn() -> StateDict:
    return build_model("cnn-8x8", DATASETS["digits"], seed=0).state_dict()


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return list(a) == list(b) and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


@st.composite
def state_dicts(draw: st.DrawFn) -> StateDict:
    """State_dicts of one float32 tensor at least, with values that use every bit of the dtype."""
    dtypes = draw(st.lists(st.sampled_from(GENERATED_DTYPES + OTHER_DTYPES), max_size=6))
    generator = make_generator(draw(st.integers(0, 1000)), "state")
    state = {}
    for number, dtype in enumerate(draw(st.permutations([torch.float32, *dtypes]))):
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        scale = 10.0 ** draw(st.integers(-9, 3))
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        state[f"layer{number}.weight"] = (
            values.abs().to(dtype) if dtype in OTHER_DTYPES else (values.to(dtype))
        )
    return state


@given(state=state_dicts())
def test_merge_is_the_inverse_of_split(state: StateDict):
    layout = ParameterLayout.of(state)
    vector, rest = layout.split(state)
    assert vector.shape == (layout.dim,)
    assert vector.dtype == torch.float32
    assert {tensor.dtype for tensor in rest.values()} <= set(OTHER_DTYPES)
    assert layout.dim + sum(tensor.numel() for tensor in rest.values()) == sum(
        tensor.numel() for tensor in state.values()
    )
    assert same(layout.merge(vector, rest), state)


@given(state=state_dicts(), seed=st.integers(0, 1000))
def test_split_is_the_inverse_of_merge_on_float32(state: StateDict, seed: int):
    state = {name: t.float() if t.dtype in GENERATED_DTYPES else t for name, t in state.items()}
    layout = ParameterLayout.of(state)
    vector = torch.randn(layout.dim, generator=make_generator(seed))
    _, rest = layout.split(state)
    again, rest_again = layout.split(layout.merge(vector, rest))
    assert torch.equal(again, vector)
    assert same(rest_again, rest)


def test_the_vector_is_the_tensors_in_the_order_of_the_state_dict():
    state = {"b": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "a": torch.tensor(5.0)}
    vector, rest = ParameterLayout.of(state).split(state)
    assert vector.tolist() == [1, 2, 3, 4, 5]
    assert rest == {}


def test_a_whole_cnn_is_generated():
    layout = ParameterLayout.of(build_model("cnn-8x8", DATASETS["digits"], seed=0).state_dict())
    assert layout.dim == 13_706
    assert layout.generated == layout.entries


def test_statistics_of_normalization_layers_are_averaged():
    state = with_batch_norm()
    vector, rest = ParameterLayout.of(state).split(state)
    assert list(rest) == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert len(vector) == sum(tensor.numel() for tensor in state.values()) - 5


def test_float64_parameters_are_averaged_even_where_a_pattern_takes_them():
    state = {"a": torch.zeros(2), "b": torch.full((3,), 1 / 3, dtype=torch.float64)}
    layout = ParameterLayout.of(state, ["*", "b"])
    _, rest = layout.split(state)
    assert same(rest, {"b": state["b"]})


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["0.*"], ["0.weight", "0.bias"]),
        (["*.bias", "2.weight"], ["0.bias", "1.bias", "2.weight", "2.bias"]),
        (["[02].weight"], ["0.weight", "2.weight"]),
        (["1.*"], ["1.weight", "1.bias"]),
    ],
)
def test_patterns_choose_what_is_generated(patterns: list[str], names: list[str]):
    state = with_batch_norm()
    layout = ParameterLayout.of(state, patterns)
    vector, rest = layout.split(state)
    assert [entry.name for entry in layout.generated] == names
    assert torch.equal(vector, torch.cat([state[name].flatten() for name in names]))
    assert rest.keys() == state.keys() - set(names)
    assert same(layout.merge(vector, rest), state)


def test_patterns_heed_the_case():
    layout = ParameterLayout.of({"fc.bias": torch.zeros(1), "FC.bias": torch.zeros(1)}, ["FC.*"])
    assert [entry.name for entry in layout.generated] == ["FC.bias"]


def test_a_pattern_that_takes_no_tensor_is_named_with_the_tensors_there_are():
    with pytest.raises(ParameterError, match=r'matches the pattern "head\.\*": a, b'):
        ParameterLayout.of({"a": torch.zeros(1), "b": torch.zeros(1)}, ["a", "head.*"])


def test_nothing_to_generate_is_refused():
    with pytest.raises(ParameterError, match=r"nothing to generate: \*\.running_mean"):
        ParameterLayout.of(with_batch_norm(), ["*.running_mean"])


def test_a_vector_of_another_length_is_not_merged():
    state = small_cnn()
    layout = ParameterLayout.of(state)
    vector, rest = layout.split(state)
    with pytest.raises(RuntimeError, match="13705"):
        layout.merge(vector[1:], rest)


def test_check_takes_a_state_dict_of_the_same_model():
    layout = ParameterLayout.of(with_batch_norm())
    layout.check({name: tensor + 1 for name, tensor in with_batch_norm().items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.weight": None}, r"no tensor 0\.weight"),
        ({"extra": torch.zeros(1)}, "the model has no tensor extra"),
        (
            {"2.weight": torch.zeros(2, 3)},
            r"2\.weight has the shape \(2, 3\) instead of \(3, 2\)",
        ),
        (
            {"2.bias": torch.zeros(3, dtype=torch.float64)},
            r"2\.bias is torch\.float64 instead of torch\.float32",
        ),
        (
            {"1.num_batches_tracked": torch.tensor(7.0)},
            r"1\.num_batches_tracked is torch\.float32 instead of torch\.int64",
        ),
        ({"2.bias": torch.tensor([0, float("nan"), 0])}, r"2\.bias has values that are not finite"),
        ({"2.bias": torch.tensor([0, 0, float("inf")])}, r"2\.bias has values that are not finite"),
        ({"1.running_var": torch.tensor([-1e-3, 1])}, r"1\.running_var has negative values"),
        (
            {"1.running_var": torch.tensor([-float("inf"), 1])},
            r"1\.running_var has values that are not finite",
        ),
    ],
)
def test_check_refuses_what_is_wrong_by_name(change: dict[str, Tensor | None], message: str):
    changed = {**with_batch_norm(), **change}
    state = {name: tensor for name, tensor in changed.items() if tensor is not None}
    with pytest.raises(ParameterError, match=message):
        ParameterLayout.of(with_batch_norm()).check(state)


@given(weights=st.lists(st.floats(0.01, 1000), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_the_average_is_that_of_numpy_in_float64(weights: list[float], seed: int):
    generator = make_generator(seed)
    states = [
        {
            "single": torch.randn(3, 2, generator=generator),
            "double": torch.randn(4, generator=generator, dtype=torch.float64),
            "half": torch.randn(5, generator=generator).half(),
            "count": torch.randint(-1000, 1000, (6,), generator=generator),
        }
        for _ in weights
    ]
    averaged = weighted_average(states, weights)
    for name, tensor in states[0].items():
        assert averaged[name].dtype == tensor.dtype
        stacked = np.stack([state[name].numpy().astype(np.float64) for state in states])
        expected = np.average(stacked, axis=0, weights=weights)
        if name == "count":
            # Rounded to the nearest: half a unit away, give or take the last digit of float64.
            assert np.abs(averaged[name].numpy() - expected).max() <= 0.5 + 1e-9
        else:
            atol = {"single": 1e-6, "double": 1e-14, "half": 4e-3}[name]
            np.testing.assert_allclose(averaged[name].double().numpy(), expected, atol=atol)


def test_integers_are_rounded_to_the_nearest():
    states = [{"n": torch.tensor([0, 10, -10])}, {"n": torch.tensor([1, 11, -11])}]
    assert weighted_average(states, [1, 3])["n"].tolist() == [1, 11, -11]
    assert weighted_average(states, [3, 1])["n"].tolist() == [0, 10, -10]


def test_small_differences_are_not_lost_in_float32():
    """One in 2^24 and its neighbours: a sum in float32 would forget the ones."""
    states = [{"w": torch.tensor([2.0**24])}] + [{"w": torch.tensor([1.0])}] * 15
    expected = torch.tensor([(2.0**24 + 15) / 16])
    assert torch.equal(weighted_average(states, [1.0] * 16)["w"], expected)


def test_the_average_of_one_state_dict_is_itself():
    state = with_batch_norm()
    assert same(weighted_average([state], [3]), state)


@pytest.mark.parametrize("weights", [[0, 0], [-1, 0], [float("nan"), 1]])
def test_weights_without_a_positive_sum_are_refused(weights: list[float]):
    with pytest.raises(ValueError, match="positive weight, got weights"):
        weighted_average([small_cnn(), small_cnn()], weights)


def test_an_average_of_nothing_is_refused():
    with pytest.raises(ValueError, match="needs states"):
        weighted_average([], [])


def test_an_average_needs_a_weight_for_each_state():
    with pytest.raises(ValueError, match="shorter"):
        weighted_average([small_cnn(), small_cnn()], [1.0])
