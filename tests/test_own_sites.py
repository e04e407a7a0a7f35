"""Sites with data of their own, as a SuperLink and SuperNodes on loopback."""

import re
from collections.abc import Iterator

import numpy as np
import pytest
from network import Network, read_lines, wait_until
from PIL import Image
from sklearn.datasets import load_digits

pytestmark = pytest.mark.processes

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SETTINGS = {
    "data.dataset": "sites",
    "data.image-shape": "1x8x8",
    "data.class-names": ",".join(NAMES),
    "num-server-rounds": 2,
    "client.local-epochs": 1,
    "diffusion.train-steps": 20,
    "server.min-available-nodes": 3,
}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """Let three sites run the app: one with pictures, one with arrays, one without its data."""
    folder = tmp_path_factory.mktemp("sites")
    digits = load_digits()
    images = (digits.images * 255 / 16).astype(np.uint8)
    for row in range(200):
        part = "train" if row < 150 else "test"
        file = folder / "pictures" / part / NAMES[digits.target[row]] / f"{row}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[row]).save(file)
    np.savez(folder / "arrays.npz", x=images[200:400, None], y=digits.target[200:400])
    with Network(folder) as started:
        started.start_superlink()
        for name in ("pictures", "arrays.npz", "nowhere"):
            started.start_supernode(name, f"data-path={str(folder / name)!r}".replace("'", '"'))
        run = started.start_run(**SETTINGS)
        wait_until(lambda: run.poll() is not None, 600)
        yield started


def test_sites_with_data_finish_the_run_and_the_one_without_is_a_counted_failure(network: Network):
    folder = network.run_folder()
    assert folder is not None
    rows = read_lines(folder)
    assert [row["round"] for row in rows] == [1, 2]
    assert [row["num-clients"] for row in rows] == [2, 2]
    assert [row["num-failures"] for row in rows] == [1, 1]
    # A fifth of the arrays, by class, is held out; the pictures are as the folders have them.
    assert rows[-1]["personalized-accuracy"] > 0.1
    examples = {row.get("num-examples") for row in read_lines(folder, "clients.jsonl")}
    assert 150 in examples
    models = {path.name for path in (folder / "models").iterdir()}
    assert {"client-0.safetensors", "client-1.safetensors"} <= models


def test_the_site_without_data_is_told_and_so_is_the_server(network: Network):
    said = f"{network.folder / 'nowhere'}: no such folder of images or .npz file"
    assert f"This node cannot take part: {said}" in network.log("nowhere")
    assert "This node cannot take part" not in network.log("pictures") + network.log("arrays.npz")
    folder = network.run_folder()
    (failed,) = {
        row["status"] for row in read_lines(folder, "clients.jsonl") if row["status"] != "ok"
    }
    assert said in failed
    assert re.search(r"no such folder of images", network.log("run"))
