"""Federations of processes whose sites have digits of their own, and what they should give.

What an undisturbed run gives is computed in this process (`simulate`), which another test compares
with `flwr run`.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.common.config import parse_config_args
from PIL import Image

from benchmarks.faults import Federation
from pfedgpa_app.config import Config, DataConfig
from pfedgpa_app.data import client_data
from server_app.simulation import PoolGrid, simulate
from server_app.strategies import ClientwiseFedAvg

CLIENTS = 8
# Every message has a process of its own, and half of its time would be that of the packages that
# share out a data set; so sites have their own data. Every tensor takes requests to two servers and
# back; so the model has two. Nobody evaluates: what a client was sent is evaluated before it trains
# (accuracy-before) anyway.
QUICK = {
    "model.name": "benchmarks.waiting_model:model",
    "data.dataset": "sites",
    "data.shape": "1x8x8",
    "data.num-classes": 10,
    "client.local-epochs": 1,
    "diffusion.train-steps": 20,
    "server.fraction-evaluate": 0.0,
}
# What the server says of a diffusion model. Two clients have no axis that stands out, three do.
LEARNED = re.compile(r"[1-9]\d* principal ax[ei]s from timestep")


def write_sites(folder: Path, pictures: int | None = None) -> Path:
    """Write the digits of every client, those of one as pictures."""
    for client in range(CLIENTS):
        data = client_data(DataConfig(), 0, client, CLIENTS)
        if client == pictures:
            write_pictures(folder / f"{client}.npz" / "train", data.train_inputs, data.train_labels)
            write_pictures(folder / f"{client}.npz" / "test", data.test_inputs, data.test_labels)
            continue
        images = torch.cat([data.train_inputs, data.test_inputs])
        labels = torch.cat([data.train_labels, data.test_labels])
        np.savez(folder / f"{client}.npz", x=images, y=labels)
    return folder


def write_pictures(folder: Path, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Write a picture an image, in a folder a class."""
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        file = folder / str(label) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(file)


def undisturbed(
    federation: Federation, clients: int, rounds: int, **settings: object
) -> tuple[ClientwiseFedAvg, list[dict[str, Any]]]:
    """Return the strategy at the end of a run with the first clients alone, and its metrics."""

    def node_config(grid: PoolGrid, node: int) -> dict[str, Any]:
        return parse_config_args([federation.node_config(node)])

    config = {**QUICK, "client.device": "cpu", "num-server-rounds": rounds, **settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PoolGrid, "node_config", node_config)
        return simulate(Config.from_flat(config), clients)


def statuses(clients: list[dict[str, Any]], client: int) -> dict[int, str]:
    """Return what became of a client, by round."""
    return {row["round"]: row["status"] for row in clients if row["client"] == client}


def without(rows: list[dict], *names: str) -> list[dict]:
    """Leave out columns, those of seconds among them."""
    return [
        {k: v for k, v in row.items() if not k.startswith("seconds") and k not in names}
        for row in rows
    ]
