"""The file in which a site keeps the model that it was sent."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, MessageType, RecordDict
from test_client_app import MODEL, SETTINGS, SITES, message, own_site, same
from test_methods import KEEPERS

from client_app import kept_model, messages
from client_app.messages import evaluate_message, train_message
from client_app.node import NodeError, query
from pfedgpa_app.config import Config
from pfedgpa_app.data import site_data
from pfedgpa_app.exported import ExportedModel


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The site's file of the model, in a folder of its own."""
    (tmp_path / "kept").mkdir()
    return tmp_path / "kept" / "model.safetensors"


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the node's operator sees."""
    lines: list[str] = []
    monkeypatch.setattr(kept_model, "log", lambda level, text, *args: lines.append(text % args))
    return lines


def site(folder: Path, file: Path | str, **settings: Any) -> Context:
    """Return the context of a SuperNode with digits of its own that wants its model."""
    context = own_site(folder, **{"model-path": str(file)})
    context.run_config = {**SETTINGS, **SITES, **settings}
    return context


def numbers_of(file: Path, data_path: Path) -> tuple[float, float]:
    """Return accuracy and loss of a file's predictions on the test set of a site."""
    model = ExportedModel.load(file)
    data = site_data(data_path, model.config.data, model.config.seed)
    probabilities = model.predict(data.test_inputs)
    hits = probabilities.argmax(1) == data.test_labels
    own = probabilities[torch.arange(len(hits)), data.test_labels]
    return float(hits.double().mean()), float(-own.log().mean())


@pytest.mark.parametrize("prior", [False, True])
def test_the_file_predicts_with_the_numbers_of_the_evaluation(
    tmp_path: Path, file: Path, prior: bool
):
    context = site(tmp_path, file, **{"client.class-prior": prior})
    metrics = evaluate_message(message(MessageType.EVALUATE, 7), context).content["metrics"]
    accuracy, loss = numbers_of(file, tmp_path / "own.npz")
    assert accuracy == metrics["accuracy"]
    assert loss == pytest.approx(metrics["loss"], rel=1e-5)
    kept = ExportedModel.load(file)
    assert (kept.server_round, kept.client, kept.partition) == (7, 77, None)
    assert kept.config == Config.from_flat(context.run_config)
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("strategy", KEEPERS)
def test_where_a_client_keeps_a_part_the_file_has_its_whole_model(
    tmp_path: Path, file: Path, strategy: str
):
    context = site(tmp_path, file, strategy=strategy, **{"fedrep.head-epochs": 2})
    train_message(message(MessageType.TRAIN), context)
    metrics = evaluate_message(message(MessageType.EVALUATE), context).content["metrics"]
    assert not same(ExportedModel.load(file).state, MODEL.state_dict())
    accuracy, loss = numbers_of(file, tmp_path / "own.npz")
    assert accuracy == metrics["accuracy"]
    assert loss == pytest.approx(metrics["loss"], rel=1e-4)


def test_what_is_sent_for_training_is_the_model_after_the_round_before(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
):
    lines: list[str] = []
    monkeypatch.setattr(messages, "log", lambda level, text, *args: lines.append(text % args))
    row = train_message(message(MessageType.TRAIN, 4), site(tmp_path, file)).content["metrics"]
    line = lines[-1]
    assert line.startswith(f"Round 4: trained on {row['num-examples']} examples (5 10, 6 10, ")
    accuracies = f"{row['accuracy-before']:.4f} before and {row['accuracy-after']:.4f} after"
    assert line.endswith(f"{accuracies}; its model after round 3 is in {file}")
    kept = ExportedModel.load(file)
    assert kept.server_round == 3
    assert same(kept.state, MODEL.state_dict())


def test_what_was_sent_for_evaluation_stays_when_the_next_training_begins(
    tmp_path: Path, file: Path
):
    context = site(tmp_path, file)
    evaluate_message(message(MessageType.EVALUATE, 3), context)
    kept = file.read_bytes()
    train_message(message(MessageType.TRAIN, 4), context)
    assert file.read_bytes() == kept
    file.unlink()
    train_message(message(MessageType.TRAIN, 5), context)
    assert ExportedModel.load(file).server_round == 4


def test_an_untrained_model_does_not_take_the_place_of_an_earlier_run(tmp_path: Path, file: Path):
    file.write_text("of an earlier run")
    train_message(message(MessageType.TRAIN, 1), site(tmp_path, file))
    assert file.read_text() == "of an earlier run"


def test_a_relative_path_is_seen_from_the_home_folder(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    evaluate_message(message(MessageType.EVALUATE), site(tmp_path, "kept/model.safetensors"))
    assert file.exists()


def test_the_model_of_a_partition_can_be_judged_on_its_test_set(file: Path):
    node = {"partition-id": 2, "num-partitions": 4, "model-path": str(file)}
    context = Context(1, 99, node, RecordDict(), SETTINGS)
    metrics = evaluate_message(message(MessageType.EVALUATE), context).content["metrics"]
    kept = ExportedModel.load(file)
    assert (kept.client, kept.partition) == (2, (2, 4))
    result, num_examples = kept.evaluate()
    assert result == (metrics["accuracy"], metrics["loss"])
    assert num_examples == metrics["num-examples"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("", "is a folder; right would be a file in it, such as model.safetensors"),
        (
            "gone/model.safetensors",
            "is in a folder that does not exist; right would be a file in one",
        ),
        ("kept/model.safetensors", "is in a read-only folder; right would be one that"),
    ],
)
def test_a_path_that_cannot_be_written_stops_a_node_before_its_training(
    tmp_path: Path,
    file: Path,
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    reason: str,
):
    monkeypatch.setattr(os, "access", lambda *_: False)  # permissions do not bind root
    with pytest.raises(NodeError, match=f"the model-path of its node config {reason}") as caught:
        train_message(message(MessageType.TRAIN), site(tmp_path, tmp_path / path))
    # The error goes to the server, which does not learn where the site keeps what.
    assert str(tmp_path) not in str(caught.value)
    (line,) = said
    assert line.startswith(f"This node cannot take part: model-path {tmp_path / path} {reason}")


def test_a_wrong_partition_does_not_tell_the_server_of_the_path(file: Path):
    node = {"partition-id": "a", "num-partitions": 2, "model-path": str(file)}
    with pytest.raises(NodeError, match="partition-id 'a' and num-partitions 2") as caught:
        query(message(MessageType.QUERY), Context(1, 2, node, RecordDict(), SETTINGS))
    assert str(file) not in str(caught.value)


def test_a_full_disk_costs_a_line_in_the_log_and_not_the_round(
    tmp_path: Path, file: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    file.write_text("of an earlier round")
    context = site(tmp_path, file)
    monkeypatch.setattr("safetensors.torch.save_file", full)
    reply = train_message(message(MessageType.TRAIN, 2), context)
    assert reply.content["metrics"]["num-examples"] > 0
    assert file.read_text() == "of an earlier round"
    (line,) = said
    assert line.startswith("The model after round 1 is not kept, and the run goes on: ")
    assert f"{file} cannot be written: the disk is full" in line


def test_a_folder_that_is_gone_later_on_costs_no_round(tmp_path: Path, file: Path, said: list[str]):
    context = site(tmp_path, file)
    evaluate_message(message(MessageType.EVALUATE), context)
    file.unlink()
    file.parent.rmdir()
    reply = train_message(message(MessageType.TRAIN, 3), context)
    assert reply.content["metrics"]["num-examples"] > 0
    assert ["The model after round 2 is not kept" in line for line in said] == [True]
