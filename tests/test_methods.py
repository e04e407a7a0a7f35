"""What clients of the strategies do beside plain local training."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from digits_client import MODEL, context, message, same, trained
from flwr.app import ArrayRecord, Context, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from small_task import (
    EPOCHS,
    IMAGES,
    LABELS,
    PLAIN_SGD,
    RATE,
    Layer,
    assert_layers,
    error_of,
    forward,
    head_step,
    layers_of,
    small_task,
)
from torch import nn

from client_app.messages import evaluate_message, train_message
from client_app.methods import METHODS, Method, Task, fedala
from pfedgpa_app.config import Config
from pfedgpa_app.data import client_data
from pfedgpa_app.evaluation import evaluate
from pfedgpa_app.model_spec import ModelSpec
from pfedgpa_app.models import build_model
from pfedgpa_app.parameters import copy_of, head_names
from pfedgpa_app.strategies import (
    STRATEGY_INFO,
    DittoConfig,
    FedALAConfig,
    FedProxConfig,
    FedRepConfig,
)
from server_app.app import make_strategy
from server_app.checkpoint import ResumeError, resume
from server_app.strategies import STRATEGIES

INPUTS = IMAGES.flatten(1).double()


@pytest.mark.parametrize("mu", [0.0, 0.01, 2.0])
def test_fedprox_takes_the_gradient_steps_of_its_paper(mu: float):
    config = Config(strategy="fedprox", client=PLAIN_SGD, fedprox=FedProxConfig(mu=mu))
    task = small_task(config)
    [(weight, bias)] = anchor = layers_of(task.received)
    for _ in range(EPOCHS):
        error = error_of(forward([(weight, bias)], INPUTS))
        step = head_step((weight, bias), INPUTS, error)
        weight = step[0] - RATE * mu * (weight - anchor[0][0])
        bias = step[1] - RATE * mu * (bias - anchor[0][1])
    uploaded, extras = METHODS["fedprox"]().train(task)
    assert extras == {}
    assert_layers(uploaded, [(weight, bias)])


def test_the_class_prior_is_added_to_the_logits_in_training():
    offset = torch.tensor([2.5, 1.5]).log()
    task = small_task(Config(client=PLAIN_SGD), offset=offset)
    [layer] = layers_of(task.received)
    for _ in range(EPOCHS):
        layer = head_step(layer, INPUTS, error_of(forward([layer], INPUTS) + offset))
    uploaded, _ = Method().train(task)
    assert_layers(uploaded, [layer])


@pytest.mark.parametrize("name", ["fedper", "lg-fedavg"])
def test_fedper_and_lg_fedavg_train_both_layers_and_upload_one(name: str):
    task = small_task(Config(strategy=name, client=PLAIN_SGD), body=True)
    body, head = sent_body, sent_head = layers_of(task.received)
    for _ in range(EPOCHS):
        features = forward([body], INPUTS)
        error = error_of(forward([head], features))
        body, head = head_step(body, INPUTS, error @ head[0]), head_step(head, features, error)
    uploaded, _ = METHODS[name]().train(task)
    assert_layers(uploaded, [body, sent_head] if name == "fedper" else [sent_body, head])
    assert_layers(METHODS[name]().personal_model(task).state_dict(), [body, head])
    layer = 2 if name == "fedper" else 1
    assert task.memory.keys() == {f"{layer}.weight", f"{layer}.bias"}


def test_fedrep_trains_the_head_first_and_then_the_body_under_it():
    settings = FedRepConfig(head_epochs=3, body_epochs=2)
    task = small_task(Config(strategy="fedrep", client=PLAIN_SGD, fedrep=settings), body=True)
    body, head = layers_of(task.received)
    sent_head = head
    features = forward([body], INPUTS)
    for _ in range(3):
        head = head_step(head, features, error_of(forward([head], features)))
    for _ in range(2):
        error = error_of(forward([body, head], INPUTS))
        body = head_step(body, INPUTS, error @ head[0])
    uploaded, _ = METHODS["fedrep"]().train(task)
    assert_layers(uploaded, [body, sent_head])
    assert_layers(METHODS["fedrep"]().personal_model(task).state_dict(), [body, head])
    assert all(parameter.requires_grad for parameter in task.model.parameters())


def test_statistics_of_a_body_that_stays_with_its_client_stay_too():
    layers = nn.Flatten(), nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)
    model = nn.Sequential(*layers)
    task = replace(
        small_task(Config(strategy="lg-fedavg", client=PLAIN_SGD)),
        model=model,
        received=copy_of(model.state_dict()),
        build=partial(copy.deepcopy, model),
    )
    uploaded, _ = METHODS["lg-fedavg"]().train(task)
    for name, tensor in task.received.items():
        head = name.startswith("3.")
        assert torch.equal(uploaded[name], tensor) != head
        assert (name in task.memory) != head
    assert not torch.equal(task.memory["2.running_mean"], task.received["2.running_mean"])


def test_ditto_draws_the_personal_model_to_what_was_received():
    settings = DittoConfig(penalty=0.7)
    task = small_task(Config(strategy="ditto", client=PLAIN_SGD, ditto=settings))
    task.memory = {"1.weight": torch.full((2, 2), 0.5), "1.bias": torch.zeros(2)}
    [shared], [(weight, bias)] = layers_of(task.received), layers_of(task.memory)
    anchor = shared
    for _ in range(EPOCHS):
        shared = head_step(shared, INPUTS, error_of(forward([shared], INPUTS)))
        step = head_step((weight, bias), INPUTS, error_of(forward([(weight, bias)], INPUTS)))
        weight = step[0] - RATE * 0.7 * (weight - anchor[0])
        bias = step[1] - RATE * 0.7 * (bias - anchor[1])
    uploaded, _ = METHODS["ditto"]().train(task)
    assert_layers(uploaded, [shared])
    assert_layers(METHODS["ditto"]().personal_model(task).state_dict(), [(weight, bias)])


def test_fedala_starts_from_the_mixture_that_lowers_the_loss():
    settings = FedALAConfig(sample=1.0, learning_rate=0.5)
    task = small_task(Config(strategy="fedala", client=PLAIN_SGD, fedala=settings), body=True)
    method = METHODS["fedala"]()
    sent = layers_of(task.received)
    layers = trained_from(sent)  # the first training starts as received
    assert_layers(method.train(task).state, layers)
    weights = [torch.ones_like(each) for each in sent[1]]
    for num_steps in (11, 1):  # until ten losses hardly differ, then one epoch
        body, (old, received) = sent[0], (layers[1], sent[1])
        features = forward([body], INPUTS)
        for _ in range(num_steps):
            error = error_of(forward([mixed(old, received, weights)], features))
            gradients = error.T @ features, error.sum(dim=0)
            weights = [
                (w - 0.5 * gradient * (new - last)).clamp(0, 1)
                for w, gradient, new, last in zip(weights, gradients, received, old, strict=True)
            ]
        layers = trained_from([body, mixed(old, received, weights)])
        assert_layers(method.train(task).state, layers)
        assert any(bool((w < 1).any()) for w in weights)
        kept = {n.removeprefix("weight."): t for n, t in task.memory.items() if "weight.2" in n}
        assert_layers(kept, [(weights[0], weights[1])])
    assert_layers(method.personal_model(task).state_dict(), layers)
    task.memory = {}
    assert_layers(method.personal_model(task).state_dict(), sent)


def mixed(old: Layer, received: Layer, weights: list[torch.Tensor]) -> Layer:
    weight, bias = (
        last + (new - last) * w for last, new, w in zip(old, received, weights, strict=True)
    )
    return weight, bias


def trained_from(layers: list[Layer]) -> list[Layer]:
    """Return a body and a head after the local epochs."""
    body, head = layers
    for _ in range(EPOCHS):
        features = forward([body], INPUTS)
        error = error_of(forward([head], features))
        body, head = head_step(body, INPUTS, error @ head[0]), head_step(head, features, error)
    return [body, head]


@pytest.mark.parametrize("sample", [0.3, 1.0])
def test_fedala_learns_its_weights_on_a_part_of_the_examples(
    monkeypatch: pytest.MonkeyPatch, sample: float
):
    seen = []

    def count(model: nn.Module, images: torch.Tensor, labels: torch.Tensor):
        seen.append(len(labels))
        return nn.functional.cross_entropy(model(images), labels)

    monkeypatch.setattr(fedala, "cross_entropy", lambda offset: count)
    settings = FedALAConfig(sample=sample)
    task = small_task(Config(strategy="fedala", client=PLAIN_SGD, fedala=settings))
    old = {name: tensor + 0.1 for name, tensor in task.received.items()}
    ones = {name: torch.ones_like(tensor) for name, tensor in old.items()}
    fedala.learn_weights(task, old, ones)
    assert seen == [round(3 * sample)]


def test_fedrod_balances_the_generic_head_and_adds_a_personal_one():
    offset = torch.tensor([0.4, -0.3])
    task = small_task(Config(strategy="fedrod", client=PLAIN_SGD), body=True, offset=offset)
    body, head = layers_of(task.received)
    personal = (torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    prior = torch.tensor([2.0, 1.0], dtype=torch.float64).log()  # two of class 0, one of class 1
    for _ in range(EPOCHS):
        features = forward([body], INPUTS)
        generic = forward([head], features)
        balanced = error_of(generic + prior)
        empirical = error_of(generic + forward([personal], features) + offset)
        body, head = (
            head_step(body, INPUTS, balanced @ head[0]),
            head_step(head, features, balanced),
        )
        personal = head_step(personal, features, empirical)
    uploaded, _ = METHODS["fedrod"]().train(task)
    assert_layers(uploaded, [body, head])
    assert_layers({f"1.{name}": tensor for name, tensor in task.memory.items()}, [personal])
    logits = METHODS["fedrod"]().personal_model(task)(IMAGES)
    features = forward([body], INPUTS)
    expected = forward([head], features) + forward([personal], features)
    torch.testing.assert_close(logits.double(), expected, atol=1e-6, rtol=1e-5)


def test_fedrod_needs_no_example_of_every_class():
    task = small_task(Config(strategy="fedrod", client=PLAIN_SGD), body=True)
    only = torch.zeros_like(LABELS)
    task.data = task.data._replace(train_labels=only)
    uploaded, _ = METHODS["fedrod"]().train(task)
    assert all(bool(tensor.isfinite().all()) for tensor in uploaded.values())


# In a first message the clients of FedDBE keep nothing, those of pFedFDA nothing at all.
KEEPERS = [
    name
    for name, strategy in STRATEGIES.items()
    if strategy.clients_keep_parts and name not in {"feddbe", "pfedfda"}
]


@pytest.mark.parametrize("name", KEEPERS)
def test_what_stays_with_a_client_is_there_in_its_next_round(name: str):
    state = RecordDict()
    node = {"partition-id": 0, "num-partitions": 4}
    settings = {"strategy": name, "client.local-epochs": 2, "fedrep.head-epochs": 2}
    run = partial(Context, 1, 0, node, state, settings)
    untrained = evaluate_message(message("evaluate"), run()).content["metrics"]
    first = train_message(message("train"), run()).content["metrics"]
    assert first["accuracy-before"] == untrained["accuracy"]
    assert first["loss-before"] == untrained["loss"]
    kept = evaluate_message(message("evaluate"), run()).content["metrics"]
    # The received part is the same as before; what the client kept makes the difference.
    assert kept["loss"] < untrained["loss"]
    second = train_message(message("train", 2), run()).content["metrics"]
    assert second["loss-before"] == kept["loss"]


@pytest.mark.parametrize("name", ["fedper", "fedrep"])
def test_a_head_that_stays_with_its_client_is_not_uploaded(name: str):
    uploaded, _ = trained(strategy=name, **{"client.local-epochs": 1, "fedrep.head-epochs": 1})
    head = head_names(uploaded)
    assert head == ["fc2.weight", "fc2.bias"]
    for key, tensor in MODEL.state_dict().items():
        assert torch.equal(uploaded[key], tensor) == (key in head)


def test_a_run_whose_clients_keep_parts_is_not_gone_on_from():
    config = Config(strategy="ditto", resume_from="4711")
    with pytest.raises(ResumeError, match="the clients of ditto keep parts of their models"):
        resume(config, make_strategy(config, ModelSpec.of_state(MODEL.state_dict())))


def test_the_class_prior_is_added_to_the_logits_in_prediction():
    settings = {"client.class-prior": True}
    reply = evaluate_message(message("evaluate"), context(1, **settings))
    data = client_data(Config().data, 0, 1, 4)
    counts = [int((data.train_labels == label).sum()) for label in range(10)]
    expected = evaluate(
        MODEL,
        data.test_inputs,
        data.test_labels,
        data.stats,
        offset=torch.tensor([count + 0.5 for count in counts]).log(),
    )
    plain = evaluate_message(message("evaluate"), context(1)).content["metrics"]
    assert reply.content["metrics"]["accuracy"] == expected.accuracy
    assert reply.content["metrics"]["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert reply.content["metrics"]["loss"] != plain["loss"]


def test_the_class_prior_stays_on_the_client():
    _, metrics = trained(**{"client.class-prior": True})
    _, plain = trained()
    assert metrics.keys() == plain.keys()


def test_clients_of_fedprox_stay_nearer_to_what_they_were_sent():
    def moved(**settings) -> float:
        state, _ = trained(**settings)
        initial = MODEL.state_dict()
        return float(sum((state[name] - initial[name]).square().sum() for name in state))

    assert moved(strategy="fedprox", **{"fedprox.mu": 10.0}) < 0.5 * moved(strategy="fedavg")
    free = trained(strategy="fedprox", **{"fedprox.mu": 0.0})[0]
    assert same(free, trained(strategy="fedavg")[0])


@pytest.mark.parametrize("name", STRATEGY_INFO)
def test_every_strategy_is_made_from_the_settings(name: str):
    config = Config.from_flat({"strategy": name, "seed": 3})
    model = build_model("cnn-8x8", config.data.info, 0)
    strategy = make_strategy(config, ModelSpec.of_state(model.state_dict()))
    assert type(strategy) is STRATEGIES[name]
    assert strategy.seed == 3
    assert strategy.evaluation_state(7).keys() == model.state_dict().keys()


class Remembers(Method):
    """A method whose clients count their messages."""

    def train(self, task: Task):
        task.memory["count"] = task.memory.get("count", torch.zeros(1)) + 1
        trained = super().train(task)
        return trained._replace(extras={"count": task.memory["count"] * task.extras["factor"]})


def test_what_a_method_keeps_is_there_in_the_next_message(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(METHODS, "fedavg", Remembers)
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    state = RecordDict()
    node = {"partition-id": 0, "num-partitions": 4}
    for expected in (10.0, 20.0):
        request = message("train")
        request.content["extras"] = ArrayRecord({"factor": torch.tensor([10.0])})
        run_config = {"strategy": "fedavg", "client.local-epochs": 1}
        reply = train_message(request, Context(1, 0, node, state, run_config))
        extras = reply.content["extras"].to_torch_state_dict()
        assert extras["count"].tolist() == [expected]
