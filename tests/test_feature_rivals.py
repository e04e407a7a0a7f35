"""The rivals that exchange statistics of features, against independent computations."""

import pytest
import torch
from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from simulated_grid import SimulatedGrid, site, upload
from small_task import (
    EPOCHS,
    IMAGES,
    PLAIN_SGD,
    RATE,
    assert_layers,
    error_of,
    forward,
    head_step,
    layers_of,
    small_task,
)
from torch import nn

from client_app.methods import METHODS
from pfedgpa_app.config import Config
from pfedgpa_app.model_spec import ModelSpec, find_head
from pfedgpa_app.preflight import unfit_heads
from pfedgpa_app.strategies import FedDBEConfig
from server_app.strategies.feddbe import FedDBE

INPUTS = IMAGES.flatten(1).double()


def with_head(value: float) -> dict[str, torch.Tensor]:
    return {
        "body.weight": torch.full((3, 3), value),
        "head.weight": torch.full((2, 3), value),
        "head.bias": torch.full((2,), value),
    }


class TestFedDBE:
    SETTINGS = Config(
        strategy="feddbe", client=PLAIN_SGD, feddbe=FedDBEConfig(kappa=0.8, momentum=0.3)
    )

    def test_training_moves_model_and_offset_as_the_paper_does(self):
        task = small_task(self.SETTINGS, body=True)
        goal, start = torch.tensor([0.5, -0.2]), torch.tensor([0.3, -0.1])
        task.extras, task.memory = {"feature-mean": goal}, {"offset": start}
        body, head = layers_of(task.received)
        offset, running = start.double(), torch.zeros(2, dtype=torch.float64)
        for _ in range(EPOCHS):
            features = forward([body], INPUTS)
            running = 0.7 * running + 0.3 * features.mean(0)
            error = error_of(forward([head], features + offset))
            by_offset = error @ head[0]
            # kappa / 2 times the mean of 2 squares; each of 3 examples is 0.3 / 3 of the mean.
            by_features = by_offset + 0.3 / 3 * 0.8 / 2 * 2 * (running - goal) / 2
            head = head_step(head, features + offset, error)
            body = head_step(body, INPUTS, by_features)
            offset = offset - RATE * by_offset.sum(dim=0)
        uploaded, extras = METHODS["feddbe"]().train(task)
        assert extras == {}
        assert_layers(uploaded, [body, head])
        torch.testing.assert_close(task.memory["offset"].double(), offset, atol=1e-6, rtol=1e-5)

    def test_a_first_training_is_plain_and_uploads_the_mean_of_its_features(self):
        task, plain = (small_task(self.SETTINGS, body=True) for _ in range(2))
        uploaded, extras = METHODS["feddbe"]().train(task)
        assert_layers(uploaded, layers_of(METHODS["fedavg"]().train(plain).state))
        mean = forward(layers_of(uploaded)[:1], INPUTS).mean(0)
        torch.testing.assert_close(extras["feature-mean"].double(), mean, atol=1e-6, rtol=1e-5)
        assert task.memory == {}

    def test_the_model_with_an_offset_is_one_of_the_configured_kind(self):
        task, method = small_task(self.SETTINGS, body=True), METHODS["feddbe"]()
        task.memory = {"offset": torch.tensor([0.7, -0.4])}
        logits = method.personal_model(task)(IMAGES)
        assert not torch.allclose(logits, task.model(IMAGES))
        task.model.load_state_dict(method.personal_state(task))
        torch.testing.assert_close(task.model(IMAGES), logits)

    def test_the_global_mean_is_that_of_the_first_round_by_examples(self):
        def node(value: float, num_examples: int):
            def answer(message: Message) -> RecordDict:
                if message.metadata.message_type == MessageType.EVALUATE:
                    return site(value)(message)
                content = upload(with_head(value), num_examples)
                if "extras" not in message.content:
                    content["extras"] = ArrayRecord({"feature-mean": torch.full((3,), value)})
                return content

            return answer

        strategy = FedDBE()
        grid = SimulatedGrid({1: node(1.0, 30), 2: node(5.0, 10)})
        strategy.start(grid, ArrayRecord(with_head(0.0)), num_rounds=3)
        assert strategy.record.num_failures == 0
        assert strategy.extras(0)["feature-mean"].tolist() == pytest.approx([2.0] * 3)
        means = [
            message.content["extras"].to_torch_state_dict()["feature-mean"].tolist()
            for message in grid.sent
            if message.metadata.message_type == "train" and "extras" in message.content
        ]
        assert means == [[2.0] * 3] * 4  # of two clients in the last two rounds


def test_a_head_without_bias_is_refused_where_one_is_needed():
    info = Config().data.info
    for has_bias in (True, False):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=has_bias))
        spec = ModelSpec.of(model)
        object.__setattr__(spec, "head", find_head(model, info))
        problems = unfit_heads(spec, "feddbe")
        assert [each.endswith("should have a bias") for each in problems] == [True] * (not has_bias)
        assert unfit_heads(spec, "fedrod") == []
