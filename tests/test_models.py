"""The models clients train: their size, what they take and give, and functions of one's own."""

import re
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import nn

from pfedgpa_app.config import (
    DATASETS,
    MODEL_SHAPES,
    Config,
    ConfigError,
    DatasetInfo,
    ModelConfig,
)
from pfedgpa_app.models import MODELS, ModelError, build_model
from pfedgpa_app.preflight import preflight


def fits(sizes: tuple[int | None, ...], shape: tuple[int, ...]) -> bool:
    return len(sizes) == len(shape) and all(
        size in (None, given) for size, given in zip(sizes, shape, strict=True)
    )


FITTING = [
    (model, dataset)
    for model, sizes in MODEL_SHAPES.items()
    for dataset, info in DATASETS.items()
    if fits(sizes, info.shape)
]


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_settings_name_every_model():
    assert MODEL_SHAPES.keys() == MODELS.keys()


@pytest.mark.parametrize(
    ("name", "dataset", "expected"),
    [
        # weights and biases of the convolutions, then of the linear layers
        ("cnn-8x8", "digits", (9 * 1 + 1) * 16 + (9 * 16 + 1) * 32 + 129 * 64 + 65 * 10),
        ("cnn-28x28", "fashion-mnist", 117_066),
        (
            "cnn-cifar",
            "cifar10",
            (9 * 3 + 1) * 16 + (9 * 16 + 1) * 32 + (9 * 32 + 1) * 64 + 1025 * 128 + 129 * 10,
        ),
        ("mlp", "breast-cancer", 31 * 64 + 65 * 64 + 65 * 2),
        ("cnn-1d", "watch", (5 * 6 + 1) * 32 + (5 * 32 + 1) * 64 + (64 * 16 + 1) * 7),
    ],
)
def test_a_model_has_the_parameters_of_its_docstring(name: str, dataset: str, expected: int):
    model = build_model(name, DATASETS[dataset], seed=0)
    assert num_parameters(model) == expected
    assert re.findall(r"([\d,]+) parameters", MODELS[name].__doc__ or "") == [f"{expected:,}"]


@pytest.mark.parametrize(("name", "dataset"), FITTING)
def test_a_model_gives_a_logit_a_class_for_each_dataset_that_fits(name: str, dataset: str):
    info = DATASETS[dataset]
    model = build_model(name, info, seed=0)
    assert model.training
    assert model(torch.zeros(3, *info.shape)).shape == (3, info.num_classes)


@pytest.mark.parametrize(
    ("shape", "first_size"),
    [((1, 8, 8), 8), ((1, 28, 28), 28), ((3, 64, 64), 16), ((1, 96, 96), 24), ((3, 224, 224), 56)],
)
def test_resnet18_takes_images_of_any_size(shape: tuple[int, int, int], first_size: int):
    """Large images are four times smaller before the first block, small ones come as they are."""
    model = build_model("resnet18", DatasetInfo(shape, 7), seed=0).eval()
    seen = []
    model.layer1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    with torch.no_grad():
        assert model(torch.zeros(1, *shape)).shape == (1, 7)
    assert seen == [(1, 64, first_size, first_size)]


@pytest.mark.parametrize("name", ["cnn-8x8", "resnet18"])
def test_the_seed_alone_decides_the_initial_parameters(name: str):
    def parameters(seed: int) -> torch.Tensor:
        model = build_model(name, DATASETS["digits"], seed)
        return nn.utils.parameters_to_vector(model.parameters()).detach()

    first = parameters(3)
    torch.rand(5)
    assert torch.equal(parameters(3), first)
    assert not torch.equal(parameters(4), first)


def test_building_leaves_the_global_random_state_as_it_was():
    before = torch.get_rng_state()
    build_model("cnn-8x8", DATASETS["digits"], seed=3)
    with pytest.raises(ModelError):
        build_model("cnn-28x28", DATASETS["breast-cancer"], seed=3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.cuda
def test_building_leaves_the_random_state_of_the_gpu_as_it_was():
    before = torch.cuda.get_rng_state()
    build_model("cnn-8x8", DATASETS["digits"], seed=3)
    assert torch.equal(torch.cuda.get_rng_state(), before)


class Raising(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("no images please")


def linear(info: DatasetInfo) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, info.num_classes))


def frozen(info: DatasetInfo) -> nn.Module:
    return linear(info).eval()


def failing(info: DatasetInfo) -> nn.Module:
    raise KeyError("weights")


@pytest.fixture
def own_module(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make functions importable from a module ``own_models``."""

    def provide(**functions: object) -> None:
        module = ModuleType("own_models")
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, "own_models", module)
        monkeypatch.setenv("PFEDGPA_TRUST", "own_models")

    return provide


def test_an_own_function_is_called_with_what_it_must_know(own_module: Callable[..., None]):
    own_module(build=linear)
    model = build_model("own_models:build", DATASETS["digits"], seed=0)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    torch.testing.assert_close(
        build_model("own_models:build", DATASETS["digits"], seed=0).state_dict(),
        model.state_dict(),
        rtol=0,
        atol=0,
    )


def test_an_own_model_comes_in_the_mode_it_was_built_in(own_module: Callable[..., None]):
    own_module(build=frozen)
    assert not build_model("own_models:build", DATASETS["digits"], seed=0).training


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (failing, r"building it failed with KeyError\('weights'\)"),
        (lambda: None, r"building it failed with TypeError"),
        (lambda info: "a net", "returned str, not a torch.nn.Module"),
        (lambda info: nn.Linear, "returned type, not a torch.nn.Module"),
    ],
    ids=["raises", "takes-nothing", "string", "class"],
)
def test_an_own_function_that_gives_no_model_is_refused(
    own_module: Callable[..., None], function: Callable[..., object], message: str
):
    own_module(build=function)
    with pytest.raises(ModelError, match=message) as caught:
        build_model("own_models:build", DATASETS["digits"], seed=0)
    assert str(caught.value).startswith('model.name = "own_models:build": ')


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda info: nn.Sequential(nn.Flatten(), nn.Linear(64, 10), Raising()),
            r"training it fails: .*no images please",
        ),
        (
            lambda info: nn.Sequential(nn.Flatten(), nn.Linear(64, 9)),
            r"gave an output of shape \(\d, 9\); right would be \(\d, 10\)",
        ),
    ],
    ids=["raises", "classes"],
)
def test_an_own_model_without_fitting_logits_is_refused_before_a_run(
    own_module: Callable[..., None], function: Callable[..., object], message: str
):
    own_module(build=function)
    with pytest.raises(ConfigError, match=rf'model\.name = "own_models:build": .*{message}'):
        preflight(Config(model=ModelConfig(name="own_models:build")))


@pytest.mark.parametrize("name", ["no.such.module:build", "own_models:no_such_function"])
def test_an_own_function_that_is_not_there_is_named(own_module: Callable[..., None], name: str):
    own_module()
    with pytest.raises(ModelError, match=f'"{name}": .*right would be package.module:function'):
        build_model(name, DATASETS["digits"], seed=0)
