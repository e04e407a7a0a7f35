"""The ClientApp's handlers, called as Flower calls them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from digits_client import MODEL, SETTINGS, context, message, same, trained
from flwr.app import Context, MessageType, RecordDict
from PIL import Image

from client_app import messages
from client_app.messages import evaluate_message, train_message
from client_app.node import NodeError, query
from pfedgpa_app.config import DATASETS, ClientConfig, Config, ConfigError
from pfedgpa_app.data import DataError, client_data, image_stats, load_dataset, site_data
from pfedgpa_app.evaluation import evaluate
from pfedgpa_app.models import build_model
from pfedgpa_app.randomness import make_generator
from pfedgpa_app.training import train


def test_training_depends_on_seed_client_and_round_alone():
    first, _ = trained()
    again, _ = trained()
    assert same(first, again)
    assert not same(first, trained(server_round=2)[0])
    assert not same(first, trained(partition_id=1)[0])
    assert not same(first, trained(seed=1)[0])


def test_training_reports_accuracy_and_loss_before_and_after():
    state, metrics = trained()
    data = client_data(Config().data, 0, 0, 4)
    test = (data.test_inputs, data.test_labels, data.stats)
    before = evaluate(MODEL, *test)
    model = build_model("cnn-8x8", DATASETS["digits"], seed=5)
    model.load_state_dict(state)
    after = evaluate(model, *test)
    assert metrics["num-examples"] == len(data.train_labels)
    assert metrics["accuracy-before"] == before.accuracy
    assert metrics["accuracy-after"] == after.accuracy
    assert metrics["loss-after"] == pytest.approx(after.loss)
    assert after.loss < before.loss
    assert metrics["seconds"] > 0


def test_training_reports_how_images_are_normalized_and_which_partition_this_is():
    _, metrics = trained(partition_id=2)
    stats = image_stats(load_dataset(Config().data, 0))
    assert metrics["image-mean"] == stats.mean.tolist()
    assert metrics["image-std"] == stats.std.tolist()
    assert metrics["partition"] == [2, 4]


SITES = {"data.dataset": "sites", "data.shape": "1x8x8", "data.num-classes": 10}


def own_site(folder: Path, node_id: int = 77, **node_config) -> Context:
    """Return the context of a SuperNode with digits of its own in an .npz file."""
    data = client_data(Config().data, 5, 1, 4)
    x, y = data.train_inputs.numpy(), data.train_labels.numpy()
    np.savez(folder / "own.npz", x=np.concatenate([x, x]), y=np.concatenate([y, y]))
    node_config["data-path"] = str(folder / "own.npz")
    return Context(1, node_id, node_config, RecordDict(), {**SETTINGS, **SITES})


@pytest.mark.parametrize("partition", [{}, {"partition-id": 2, "num-partitions": 4}])
def test_a_site_with_data_of_its_own_trains_on_it(tmp_path: Path, partition: dict):
    context = own_site(tmp_path, **partition)
    metrics = train_message(message(MessageType.TRAIN), context).content["metrics"]
    data = site_data(tmp_path / "own.npz", Config.from_flat(SITES).data, 0)
    assert metrics["num-examples"] == len(data.train_labels)
    assert metrics["image-mean"] == data.stats.mean.tolist()
    # Its partition, if it has one, is a number to be sorted by, and says nothing of its data.
    assert "partition" not in metrics
    metrics = query(message(MessageType.QUERY), context).content["metrics"]
    assert dict(metrics) == ({"partition-id": 2} if partition else {})


def test_sites_without_a_partition_draw_by_their_node_ids(tmp_path: Path):
    states = [
        train_message(message(MessageType.TRAIN), own_site(tmp_path, node_id=node_id))
        .content["arrays"]
        .to_torch_state_dict()
        for node_id in (77, 77, 78)
    ]
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


def test_a_site_without_its_data_says_so_to_its_operator(tmp_path: Path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(messages, "log", lambda level, text, *args: said.append(text % args))
    context = own_site(tmp_path)
    (tmp_path / "own.npz").unlink()
    with pytest.raises(DataError, match="no such folder"):
        train_message(message(MessageType.TRAIN), context)
    assert said == [
        f"This node cannot take part: {tmp_path / 'own.npz'}: no such folder of images or .npz file"
    ]


def test_a_site_tells_its_operator_what_it_passes_over(tmp_path: Path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(messages, "log", lambda level, text, *args: said.append(text % args))
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in "abc":
            Image.new("L", (8, 8), 100 * number).save(folder / f"{name}.png")
        (folder / "d.dcm").touch()
    context = own_site(tmp_path)
    context.node_config["data-path"] = str(tmp_path)
    (tmp_path / "own.npz").unlink()
    train_message(message(MessageType.TRAIN), context)
    skipped = [f"{tmp_path / str(number)}: skipped: 1 .dcm" for number in range(2)]
    assert said[:2] == skipped
    assert [line.partition(":")[0] for line in said[2:]] == ["Round 1"]


def test_a_data_set_of_the_run_is_not_ignored_where_a_site_has_its_own(tmp_path: Path):
    context = own_site(tmp_path)
    context.run_config["data.dataset"] = "digits"
    with pytest.raises(DataError, match=r'"digits": this node has its own data .*"sites"'):
        train_message(message(MessageType.TRAIN), context)


def test_a_node_without_data_path_has_no_part_in_what_sites_bring():
    with pytest.raises(DataError, match=r"every site brings its own data.*data-path="):
        trained(**SITES)


# bf16 has a significand of 8 bits: rounding to the nearest errs by one part in 2^8 at most. On the
# way to a gradient each layer rounds its inputs, its weights and its outputs, forwards and
# backwards; to the first order, errors add up to so much at most. Processors differ in what they
# keep in float32 between: of one tensor's move, one with AVX-512 has up to .057 and one with AVX2
# up to .062, over 12 seeds.
ROUNDOFF = 2.0**-8
NUM_LAYERS = 4
FORWARDS = 3 * NUM_LAYERS * ROUNDOFF
# Cross-entropy changes by twice the largest change of a logit at most. No logit here is beyond 1/2.
LARGEST_LOGIT = 0.5


def test_bf16_trains_and_judges_nearly_as_fp32_does():
    exact, metrics = trained()
    rough, rough_metrics = trained(**{"client.precision": "bf16"})
    assert not same(exact, rough)
    assert all(tensor.dtype == exact[name].dtype for name, tensor in rough.items())
    for name, tensor in rough.items():
        moved = tensor - MODEL.state_dict()[name]
        error = (tensor - exact[name]).norm() / (moved.norm() + 1e-12)
        assert error < 2 * FORWARDS, name
    assert rough_metrics["loss-before"] != metrics["loss-before"]
    assert rough_metrics["loss-after"] == pytest.approx(
        metrics["loss-after"], abs=2 * FORWARDS * LARGEST_LOGIT
    )


def test_evaluation_is_that_of_the_received_model_and_returns_no_arrays():
    reply = evaluate_message(message(MessageType.EVALUATE), context())
    data = client_data(Config().data, 0, 0, 4)
    expected = evaluate(MODEL, data.test_inputs, data.test_labels, data.stats)
    assert reply.content["metrics"]["accuracy"] == expected.accuracy
    assert reply.content["metrics"]["num-examples"] == len(data.test_labels)
    assert not reply.content.array_records
    scores = dict(reply.content["metrics"].items())
    assert scores.keys() >= {"balanced-accuracy", "macro-f1", "calibration-error", "recall-0"}
    assert "auroc" not in scores  # of ten classes
    private = evaluate_message(
        message(MessageType.EVALUATE), context(**{"privacy.mode": "update", "privacy.epsilon": 1.0})
    )
    assert "macro-f1" in private.content["metrics"]
    assert not any(name.startswith("recall") for name in private.content["metrics"])


def test_a_node_reports_its_partition():
    reply = query(message(MessageType.QUERY), context(2))
    assert reply.content["metrics"]["partition-id"] == 2


def test_wrong_settings_stop_the_client_before_training():
    with pytest.raises(ConfigError, match=r"client\.momentum"):
        trained(**{"client.momentum": 2.0})


def test_evaluation_agrees_with_a_hand_count():
    """Accuracy and cross-entropy of fixed logits, computed by hand."""

    class Fixed(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])[: len(images)]

    dataset = load_dataset(Config().data, 0)
    stats = image_stats(dataset)
    result = evaluate(Fixed(), dataset.images[:3], torch.tensor([0, 1, 1]), stats)
    losses = torch.tensor([2.0, 1.0, 3.0]).neg().exp().log1p() + torch.tensor([0.0, 0.0, 3.0])
    assert result.accuracy == 2 / 3
    assert result.loss == pytest.approx(float(losses.mean()))


def test_one_epoch_is_plain_sgd_on_the_shuffled_batches():
    """Against SGD with momentum and weight decay, written out."""
    config = ClientConfig(local_epochs=1, batch_size=20, learning_rate=0.1)
    data = client_data(Config().data, 0, 0, 4)
    images, labels = data.train_inputs, data.train_labels

    def linear() -> torch.nn.Module:
        return build_model("own_models:linear", DATASETS["digits"], seed=0)

    actual = linear()
    train(actual, images, labels, data.stats, config, make_generator(4))

    expected = linear()
    mean, std = (value[:, None, None] for value in data.stats)
    velocity = [torch.zeros_like(p) for p in expected.parameters()]
    for rows in torch.randperm(len(labels), generator=make_generator(4)).split(20):
        logits = expected((images[rows].float() - mean) / std)
        loss = torch.nn.functional.cross_entropy(logits, labels[rows])
        gradients = torch.autograd.grad(loss, list(expected.parameters()))
        with torch.no_grad():
            for p, v, g in zip(expected.parameters(), velocity, gradients, strict=True):
                v.mul_(0.5).add_(g + 5e-4 * p)
                p -= 0.1 * v
    for left, right in zip(actual.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(left, right)


def test_dropout_follows_the_seed_and_leaves_the_global_generator_alone():
    data = client_data(Config().data, 0, 0, 4)

    def once(global_seed: int) -> torch.Tensor:
        model = build_model("own_models:with_dropout", DATASETS["digits"], seed=0)
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        images, labels = data.train_inputs, data.train_labels
        train(model, images, labels, data.stats, ClientConfig(), make_generator(1))
        assert torch.equal(torch.get_rng_state(), before)
        return next(model.parameters()).detach()

    assert torch.equal(once(1), once(2))


def test_a_last_batch_of_one_goes_with_the_one_before():
    """Batch normalization cannot be trained on one example of 1x1."""
    data = client_data(Config().data, 0, 0, 4)
    model = build_model("resnet18", DATASETS["digits"], seed=0)
    config = ClientConfig(local_epochs=1, batch_size=4)
    train(
        model, data.train_inputs[:9], data.train_labels[:9], data.stats, config, make_generator(1)
    )
    assert int(model.state_dict()["bn1.num_batches_tracked"]) == 2


@pytest.mark.parametrize(
    "node", [{}, {"partition-id": 0}, {"partition-id": "a", "num-partitions": 2}]
)
def test_a_node_without_partition_is_told_how_to_start(node: dict):
    with pytest.raises(NodeError, match="--node-config"):
        query(message(MessageType.QUERY), Context(1, 2, node, RecordDict(), SETTINGS))
