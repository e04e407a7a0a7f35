"""What is tried before a run begins."""

import pytest
import torch
from torch import nn

from pfedgpa_app import preflight
from pfedgpa_app.config import Config, ConfigError


def test_tensors_that_no_message_can_carry_are_named(monkeypatch: pytest.MonkeyPatch):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.bfloat16))
    monkeypatch.setattr(preflight, "build_model", lambda *arguments: model)
    with pytest.raises(ConfigError, match=r"1\.weight is torch\.bfloat16.*float32") as caught:
        preflight.preflight(Config())
    assert "0.weight" not in str(caught.value)
