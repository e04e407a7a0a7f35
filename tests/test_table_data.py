"""Data that is no picture: tables, and what takes pictures alone."""

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from PIL import Image
from test_client_app import message
from torch import nn
from typer.testing import CliRunner

from client_app.messages import evaluate_message, train_message
from pfedgpa_app import cli
from pfedgpa_app.arrays import FileError, as_examples
from pfedgpa_app.config import ClientConfig, Config, DataConfig
from pfedgpa_app.data import DataError, ImageStats, image_stats, load_dataset, normalize, site_data
from pfedgpa_app.data.sources import Dataset
from pfedgpa_app.exported import ExportedModel
from pfedgpa_app.images import read_images
from pfedgpa_app.models import build_model
from pfedgpa_app.randomness import make_generator
from pfedgpa_app.training import train
from server_app.simulation import simulate

RNG = np.random.default_rng(0)
TABLE = {
    "data.dataset": "sites",
    "data.shape": "5",
    "data.class-names": "well,ill",
    "model.name": "mlp",
    "client.device": "cpu",
}
CONFIG = Config.from_flat(TABLE)
MODEL = build_model("mlp", CONFIG.data.info, seed=0)


def dataset(table: np.ndarray) -> Dataset:
    """Return a data set of which every fifth row is for testing."""
    labels = torch.zeros(len(table), dtype=torch.int64)
    return Dataset(torch.from_numpy(table), labels, torch.arange(len(table)) % 5 == 0)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    """The context of a SuperNode with a table of its own, whose columns have other units."""
    y = np.arange(60) % 2
    x = RNG.normal(size=(60, 5)) * [1, 1e3, 1e-3, 1, 1] + [0, 1e4, 0, 5, 0] + 2 * y[:, None]
    np.savez(tmp_path / "table.npz", x=x, y=y)
    node = {
        "data-path": str(tmp_path / "table.npz"),
        "model-path": str(tmp_path / "kept.safetensors"),
    }
    return Context(1, 7, node, RecordDict(), TABLE)


def sent(kind: str, server_round: int) -> Message:
    """Return a message with the model of tables."""
    content = RecordDict(
        {
            "arrays": ArrayRecord(MODEL.state_dict()),
            "config": ConfigRecord({"server-round": server_round}),
        }
    )
    message(kind)  # which lets messages be made
    return Message(content=content, message_type=kind, dst_node_id=3)


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_a_table_is_standardized_feature_by_feature_by_its_training_rows(dtype: type):
    table = (RNG.uniform(size=(50, 4)) * [1, 200, 7, 30] + [0, 5, 3, 9]).astype(dtype)
    data = dataset(table)
    stats = image_stats(data)
    rows = table[~data.is_test.numpy()].astype(np.float64)
    deviation = rows.std(0)
    np.testing.assert_allclose(stats.mean, rows.mean(0), rtol=1e-6)
    np.testing.assert_allclose(stats.std, np.where(deviation > 0, deviation, 1), rtol=1e-6)
    expected = (table - rows.mean(0)) / np.where(deviation > 0, deviation, 1)
    np.testing.assert_allclose(normalize(data.images, stats), expected, rtol=1e-4, atol=1e-5)


def test_a_constant_feature_becomes_zero_and_divides_nothing():
    """The mean of many times 0.1 is not 0.1 in every digit."""
    table = np.full((50, 1), 0.1, np.float32)
    table[0] = 3.0  # a test row, of which the training rows know nothing
    data = dataset(table)
    assert image_stats(data).std.tolist() == [1.0]
    normalized = normalize(data.images, image_stats(data))
    assert normalized[1:].abs().max() < 1e-6
    assert float(normalized[0]) == pytest.approx(2.9)


def test_float_signals_count_as_normalized():
    signals = RNG.normal(size=(10, 2, 50)).astype(np.float32) * 40
    data = dataset(signals)
    assert np.array_equal(normalize(data.images, image_stats(data)).numpy(), signals)


def test_signals_of_bytes_are_normalized_by_channel():
    signals = RNG.integers(0, 256, (10, 2, 50), dtype=np.uint8)
    data = dataset(signals)
    rows = signals[~data.is_test.numpy()].astype(np.float64)
    np.testing.assert_allclose(image_stats(data).mean, rows.mean((0, 2)), rtol=1e-6)
    assert normalize(data.images, image_stats(data)).shape == (10, 2, 50)


def test_the_table_of_breast_cancer_has_its_published_counts():
    data = load_dataset(DataConfig(dataset="breast-cancer", partition="iid"), seed=0)
    assert data.images.shape == (569, 30)
    assert data.images.dtype == torch.float32
    assert data.labels.bincount().tolist() == [212, 357]  # malignant, benign
    assert float(data.images[0, 0]) == pytest.approx(17.99)


def test_a_site_trains_on_its_table_and_tells_nothing_of_its_features(context: Context):
    metrics = train_message(sent(MessageType.TRAIN, 1), context).content["metrics"]
    assert metrics["num-examples"] == 48
    assert metrics["loss-after"] < metrics["loss-before"]
    assert not {"image-mean", "image-std"} & metrics.keys()


def test_a_kept_model_of_a_table_predicts_rows(context: Context, tmp_path: Path):
    metrics = evaluate_message(sent(MessageType.EVALUATE, 1), context).content["metrics"]
    data = site_data(tmp_path / "table.npz", CONFIG.data, 0)
    np.savez(tmp_path / "new.npz", x=data.test_inputs)
    command = ["predict", str(tmp_path / "kept.safetensors"), str(tmp_path / "new.npz"), "--json"]
    result = CliRunner().invoke(cli.app, command, catch_exceptions=False)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert rows[0]["file"] == f"{tmp_path / 'new.npz'}[0]"
    assert {row["class-name"] for row in rows} <= {"well", "ill"}
    hits = [row["class"] == label for row, label in zip(rows, data.test_labels, strict=True)]
    assert sum(hits) / len(hits) == metrics["accuracy"]


def test_a_table_as_wide_as_those_of_gene_expression_is_trained_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Its clients report mean and deviation of each of 40,000 features."""
    own = ModuleType("genes")
    own.load = lambda root: (RNG.poisson(3, (30, 40_000)), np.arange(30) % 2)
    monkeypatch.setitem(sys.modules, "genes", own)
    monkeypatch.setenv("PFEDGPA_TRUST", "genes")
    flat = {
        **TABLE,
        "data.dataset": "genes:load",
        "data.shape": "40000",
        "data.partition": "iid",
        "data.train-samples": 0,
        "num-server-rounds": 1,
        "client.local-epochs": 1,
        "strategy": "fedavg",
    }
    records = []
    strategy, _ = simulate(Config.from_flat(flat), 2, num_processes=0, on_round=records.append)
    assert [row["status"] for row in records[0].clients.values()] == ["ok", "ok"]
    stats = ImageStats(*strategy.sites[0]["image-stats"])
    state = build_model("mlp", Config.from_flat(flat).data.info, 0).state_dict()
    ExportedModel(state, Config.from_flat(flat), 0, 1, stats).save(tmp_path / "model")
    rows = as_examples(own.load(None)[0], (40_000,), to_train=False)
    assert ExportedModel.load(tmp_path / "model").predict(rows).shape == (30, 2)


def test_a_feature_of_the_smallest_numbers_divides_nothing():
    """Their deviation is none in float32."""
    table = np.array([[0.0], [1e-45]] * 10, np.float32)
    assert torch.isfinite(normalize(dataset(table).images, image_stats(dataset(table)))).all()


@pytest.mark.parametrize("piece", [2, 2**24])
def test_statistics_of_a_wide_table_are_the_same_in_pieces(
    monkeypatch: pytest.MonkeyPatch, piece: int
):
    monkeypatch.setattr("pfedgpa_app.data.sources.PIECE", piece)
    table = RNG.normal(size=(20, 7)).astype(np.float32)
    stats = image_stats(dataset(table))
    rows = table[np.arange(20) % 5 != 0].astype(np.float64)
    np.testing.assert_allclose(stats.mean, rows.mean(0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(stats.std, rows.std(0), rtol=1e-6)


def test_pictures_are_no_rows_of_a_table(tmp_path: Path):
    (tmp_path / "well").mkdir()
    Image.new("L", (5, 1)).save(tmp_path / "well" / "a.png")
    with pytest.raises(DataError, match=r"data\.shape is 5; right would be an \.npz file"):
        site_data(tmp_path, CONFIG.data, 0)
    with pytest.raises(FileError, match=r"a\.png: is an image.*\(5,\); right would be an \.npz"):
        list(read_images([tmp_path / "well" / "a.png"], (5,), print))


@pytest.mark.parametrize("convolution", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_models_of_ones_own_train_on_signals_images_and_volumes(convolution: type[nn.Module]):
    ndim = [nn.Conv1d, nn.Conv2d, nn.Conv3d].index(convolution) + 1
    model = nn.Sequential(convolution(2, 3, 3), nn.Flatten(), nn.Linear(3 * 2**ndim, 2))
    examples = torch.from_numpy(RNG.normal(size=(6, 2, *[4] * ndim)).astype(np.float32))
    stats = image_stats(Dataset(examples, torch.zeros(6), torch.zeros(6, dtype=torch.bool)))
    before = model[0].weight.detach().clone()
    train(model, examples, torch.arange(6) % 2, stats, ClientConfig(), make_generator(0))
    assert not torch.equal(model[0].weight, before)
