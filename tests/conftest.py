"""What all tests share."""

import pytest
import torch

# Small tensors: more threads are slower, and the same on every machine is better than fast.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory, monkeypatch):
    """Keep runs and data sets of tests out of the user's folders."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return home
