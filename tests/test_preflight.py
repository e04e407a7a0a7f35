"""What is tried before a run begins."""

import pytest
import torch
from torch import nn

from pfedgpa_app import preflight
from pfedgpa_app.config import Config, ConfigError


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64])
def test_tensors_that_cannot_be_sent_or_averaged_are_named(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=dtype))
    monkeypatch.setattr(preflight, "build_model", lambda *arguments: model)
    with pytest.raises(ConfigError, match=rf"1\.weight is {dtype}.*float32") as caught:
        preflight.preflight(Config())
    assert "0.weight" not in str(caught.value)


@pytest.mark.parametrize("strategy", ["fedrod", "fedpac", "floco", "fedrep"])
def test_methods_of_heads_need_a_model_that_ends_in_one(
    monkeypatch: pytest.MonkeyPatch, strategy: str
):
    model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
    monkeypatch.setattr(preflight, "build_model", lambda *arguments: model)
    config = Config(strategy=strategy)
    if strategy == "fedrep":  # it only tells the last layer's tensors from the others
        preflight.preflight(config)
        return
    with pytest.raises(
        ConfigError, match=r"1, is BatchNorm1d; right would be .* torch\.nn\.Linear"
    ):
        preflight.preflight(config)


@pytest.mark.parametrize("tracking", ["tensorboard", "mlflow"])
def test_the_package_of_a_tracker_is_asked_for(monkeypatch: pytest.MonkeyPatch, tracking: str):
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    preflight.preflight(Config())
    with pytest.raises(ConfigError, match=rf'"{tracking}": the package is .* ".\[{tracking}\]"'):
        preflight.preflight(Config(tracking=tracking))
    monkeypatch.setattr(preflight, "find_spec", lambda name: name == tracking or None)
    preflight.preflight(Config(tracking=tracking))
