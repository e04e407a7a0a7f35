"""The rivals that exchange statistics of features, against independent computations."""

import itertools

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from scipy.stats import multivariate_normal
from simulated_grid import SimulatedGrid, site, upload
from small_task import (
    EPOCHS,
    IMAGES,
    LABELS,
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
from client_app.methods.pfedfda import adapted, best_betas, discriminant, estimate
from pfedgpa_app.config import Config
from pfedgpa_app.model_spec import ModelSpec, find_head
from pfedgpa_app.preflight import unfit_heads
from pfedgpa_app.randomness import make_generator
from pfedgpa_app.strategies import FedDBEConfig
from server_app.strategies.feddbe import FedDBE
from server_app.strategies.pfedfda import PFedFDA

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


class TestPFedFDA:
    CONFIG = Config(strategy="pfedfda", client=PLAIN_SGD)
    SHARED = torch.tensor([[1.0, -0.5], [-0.3, 0.8]]), torch.tensor([[1.5, 0.4], [0.4, 0.9]])

    def task(self, config: Config = CONFIG):
        task = small_task(config, body=True)
        task.extras = {"class-means": self.SHARED[0], "covariance": self.SHARED[1]}
        return task

    def test_the_discriminant_has_the_posterior_of_its_gaussians(self):
        means, covariance = (each.double() for each in self.SHARED)
        priors = torch.tensor([0.3, 0.7], dtype=torch.float64)
        weight, bias = discriminant((means, covariance), priors.log())
        points = torch.randn(20, 2, generator=make_generator(1), dtype=torch.float64)
        # Shrunk by 1e-4 towards the mean of its diagonal.
        shrunk = 0.9999 * covariance.numpy() + 1e-4 * 1.2 * np.eye(2)
        densities = np.stack(
            [
                p * multivariate_normal(m, shrunk).pdf(points)
                for p, m in zip(priors.tolist(), means.numpy(), strict=True)
            ],
            axis=1,
        )
        found = (points @ weight.T + bias).softmax(dim=1)
        np.testing.assert_allclose(found, densities / densities.sum(1, keepdims=True), rtol=1e-9)

    def test_estimates_are_those_of_the_client_where_it_has_three_examples(self):
        features = torch.randn(8, 2, generator=make_generator(2), dtype=torch.float64)
        labels = torch.tensor([0, 1, 0, 0, 1, 2, 2, 2])
        shared = torch.randn(4, 2, generator=make_generator(3), dtype=torch.float64)
        means, covariance = estimate(features, labels, shared, 0.5)
        rows, right = features.numpy(), shared.numpy().copy()
        for label in (0, 2):
            right[label] = rows[labels.numpy() == label].mean(axis=0)
        np.testing.assert_allclose(means, right)
        scatter = sum(
            np.outer(r - right[k], r - right[k]) for r, k in zip(rows, labels, strict=True)
        )
        np.testing.assert_allclose(covariance, scatter / 7 + 0.5 * np.eye(2))

    @pytest.mark.parametrize("number", [1, 2])
    def test_no_betas_on_a_grid_are_better_in_cross_validation(self, number: int):
        noise = torch.randn(24, 2, generator=make_generator(4), dtype=torch.float64)
        labels = torch.arange(24) % 2
        own = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
        away = torch.tensor([[-0.5, -0.7], [0.5, 0.7]])
        shared = own + away, 0.5 * torch.eye(2, dtype=torch.float64)
        log_priors = torch.tensor([0.4, 0.6], dtype=torch.float64).log()
        data = noise + own[labels], labels

        def best(shared, rows: slice = slice(None)) -> torch.Tensor:
            given = [each[rows] for each in data]
            return best_betas(*given, shared, log_priors, 0.1, number, make_generator(5))

        order = torch.randperm(24, generator=make_generator(5)).tolist()
        by_class = [[row for row in order if labels[row] == label] for label in (0, 1)]
        folds = [by_class[0][k::2] + by_class[1][k::2] for k in (0, 1)]

        def error(betas: list[float]) -> float:
            total = 0.0
            for k in (0, 1):
                others = folds[1 - k]
                local = estimate(data[0][others], labels[others], shared[0], 0.1)
                means = betas[0] * local[0] + (1 - betas[0]) * shared[0]
                covariance = betas[-1] * local[1] + (1 - betas[-1]) * shared[1]
                weight, bias = discriminant((means, covariance), log_priors)
                logits = data[0][folds[k]] @ weight.T + bias
                total += float(nn.functional.cross_entropy(logits, labels[folds[k]]))
            return total

        found = best(shared).tolist()
        assert len(found) == number
        assert all(0 < beta < 1 for beta in found)  # or the grid would show little
        steps = [step / 20 for step in range(21)]
        assert error(found) <= min(map(error, itertools.product(steps, repeat=number))) + 1e-4
        assert best((-3 * own, shared[1]))[0] > 0.9  # they are those of the other class
        assert best(shared, slice(2)).tolist() == [0.0] * number  # an example a class: no folds

    @pytest.mark.parametrize("class_prior", [False, True])
    def test_the_body_trains_under_the_global_classifier(self, class_prior: bool):
        client = PLAIN_SGD.model_copy(update={"class_prior": class_prior})
        task = self.task(Config(strategy="pfedfda", client=client))
        sent_body, sent_head = layers_of(task.received)
        priors = torch.tensor([0.5, 0.5]) if class_prior else torch.tensor([2 / 3, 1 / 3]) + 1e-4
        priors = (priors / priors.sum()).double().log() - (np.log(0.5) if class_prior else 0)
        head = discriminant((self.SHARED[0].double(), self.SHARED[1].double()), priors)
        body = sent_body
        for _ in range(EPOCHS):
            error = error_of(forward([body, head], INPUTS))
            body = head_step(body, INPUTS, error @ head[0])
        uploaded, extras = METHODS["pfedfda"]().train(task)
        assert_layers(uploaded, [body, sent_head])
        means, covariance = adapted(task)
        torch.testing.assert_close(extras["class-means"], means.float())
        torch.testing.assert_close(extras["covariance"], covariance.float())
        personal = METHODS["pfedfda"]().personal_model(task)
        assert_layers(personal.state_dict(), [body, discriminant((means, covariance), priors)])
        assert all(each.requires_grad for each in personal.parameters())

    def test_the_mixture_is_that_of_the_betas(self, monkeypatch: pytest.MonkeyPatch):
        task = self.task()
        found = torch.tensor([0.25, 0.75], dtype=torch.float64)
        monkeypatch.setattr("client_app.methods.pfedfda.best_betas", lambda *args: found)
        features = forward(layers_of(task.received)[:1], INPUTS)
        shared = tuple(each.double() for each in self.SHARED)
        local = estimate(features, LABELS, shared[0], 1.0)
        for mixed, own, of_all, beta in zip(adapted(task), local, shared, found, strict=True):
            torch.testing.assert_close(mixed, beta * own + (1 - beta) * of_all, atol=1e-6, rtol=0)

    @staticmethod
    def node(value: float, num_examples: int, covariance: torch.Tensor):
        def answer(message: Message) -> RecordDict:
            if message.metadata.message_type == MessageType.EVALUATE:
                return site(value)(message)
            content = upload(with_head(value), num_examples)
            extras = {"class-means": torch.full((2, 3), value), "covariance": covariance}
            content["extras"] = ArrayRecord(extras)
            return content

        return answer

    def test_global_gaussians_are_averages_by_examples(self):
        eye = torch.eye(3)
        strategy = PFedFDA()
        nodes = {1: self.node(1.0, 30, eye), 2: self.node(5.0, 10, 3 * eye)}
        strategy.start(SimulatedGrid(nodes), ArrayRecord(with_head(0.0)), num_rounds=1)
        sent = strategy.extras(0)
        torch.testing.assert_close(sent["class-means"], torch.full((2, 3), 2.0))
        torch.testing.assert_close(sent["covariance"], 1.5 * eye)

    @pytest.mark.parametrize(
        "covariance", [-torch.eye(3), torch.eye(3) + torch.tensor([0.0, 0.5, 0.0])]
    )
    def test_a_covariance_that_is_none_costs_its_sender_the_round(self, covariance: torch.Tensor):
        strategy = PFedFDA()
        nodes = {n: self.node(1.0, 10, torch.eye(3)) for n in (1, 2)}
        nodes[3] = self.node(9.0, 10, covariance)
        strategy.start(SimulatedGrid(nodes), ArrayRecord(with_head(0.0)), num_rounds=1)
        assert "positive definite" in strategy.record.clients[2]["status"]
        torch.testing.assert_close(strategy.extras(0)["covariance"], torch.eye(3))


def test_a_head_without_bias_is_refused_where_one_is_needed():
    info = Config().data.info
    for has_bias in (True, False):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=has_bias))
        spec = ModelSpec.of(model)
        object.__setattr__(spec, "head", find_head(model, info))
        problems = unfit_heads(spec, "feddbe")
        assert [each.endswith("should have a bias") for each in problems] == [True] * (not has_bias)
        assert unfit_heads(spec, "fedrod") == []
