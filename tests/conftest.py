"""What all tests share."""

import os
import shutil
from collections.abc import Iterator
from itertools import count

import pytest
import warm
from xdist import is_xdist_controller

from benchmarks import network


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return four workers, or as many as cores without the tests that wait for processes."""
    few = config.option.markexpr == "not processes"
    return min(os.cpu_count() or 1, 4) if few else 4


def pytest_sessionstart(session: pytest.Session) -> None:
    """Set up torch and hypothesis in each process that runs tests."""
    if is_xdist_controller(session):  # spares their import
        return
    import torch
    from hypothesis import HealthCheck, settings

    # Small tensors: more threads are slower, and the same on every machine is better than fast.
    torch.set_num_threads(1)
    # How long an example takes depends on who else is on the machine.
    settings.register_profile(
        "tests", max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what this machine lacks; in CI only a GPU may be missing.

    Tests that wait for processes come first, so that others use the processors meanwhile; then the
    longest ones, so that none is left at the end.
    """
    import torch

    from pfedgpa_app.data.sources import DEBIAN_FASHION_MNIST

    items.sort(key=lambda item: [name not in item.keywords for name in ("processes", "slow")])
    missing = {}
    if not torch.cuda.is_available():
        missing["cuda"] = "no CUDA device"
    if not DEBIAN_FASHION_MNIST.is_dir() and "CI" not in os.environ:
        missing["fashion_mnist"] = "no Fashion-MNIST: apt-get install dataset-fashion-mnist"
    if not all(map(shutil.which, ("openssl", "ssh-keygen"))) and "CI" not in os.environ:
        missing["openssl"] = "no openssl or no ssh-keygen"
    if not shutil.which("chromium") and "CI" not in os.environ:
        missing["chromium"] = "no Chromium: apt-get install chromium"
    for item in items:
        for name, reason in missing.items():
            if name in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


NUMBERS = count()


@pytest.fixture(scope="session")
def homes(tmp_path_factory):
    """Return the folder of the tests' home folders."""
    return tmp_path_factory.mktemp("homes")


@pytest.fixture(autouse=True)
def own_home(homes, monkeypatch):
    """Keep runs and data sets of tests out of the user's folders."""
    home = homes / str(next(NUMBERS))  # pytest would look through all there are for a free number
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return home


@pytest.fixture(scope="module")
def warm_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fork off Flower's processes from one that has imported their packages."""
    common = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        common = common.parent
    started, listed = warm.start(common), network.parents
    path = (started.folder, network.BIN, os.environ["PATH"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", os.pathsep.join(map(str, path)))
        # Ray gives way to everyone else, so that its clients wait for all other tests.
        patch.setenv("RAY_worker_niceness", "0")
        patch.setattr(network, "parents", lambda: started.parents(listed()))
        yield
