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
