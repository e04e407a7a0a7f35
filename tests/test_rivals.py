"""The rivals whose servers do something of their own, against independent computations."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from simulated_grid import SimulatedGrid, received, site, start, upload, weights
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
from client_app.methods.fedpac import class_means, head_statistics
from client_app.methods.floco import Simplex
from pfedgpa_app.config import Config, ConfigError
from pfedgpa_app.model_spec import ModelSpec
from pfedgpa_app.randomness import make_generator
from pfedgpa_app.state import states_below
from pfedgpa_app.strategies import FedAMPConfig, FedPACConfig, FlocoConfig, PFedHNConfig
from server_app.simulation import simulate
from server_app.strategies import STRATEGIES, fedamp
from server_app.strategies.fedamp import FedAMP, attention
from server_app.strategies.fedapa import FedAPA
from server_app.strategies.fedpac import FedPAC, head_shares
from server_app.strategies.floco import Floco, onto_simplex, project, riesz_energy
from server_app.strategies.ifca import IFCA
from server_app.strategies.pfedhn import PFedHN

INPUTS = IMAGES.flatten(1).double()


class TestFedAMP:
    def test_attention_is_that_of_the_paper(self):
        vectors = torch.randn(4, 7, generator=make_generator(0))
        points = vectors.double().numpy()
        for i in range(4):
            expected = np.zeros(4)
            for j in range(4):
                if j != i:
                    distance = ((points[i] - points[j]) ** 2).sum()
                    expected[j] = 0.5 * np.exp(-distance / 5.0) / 5.0  # alpha A'(x)
            expected[i] = 1 - expected.sum()
            assert expected[i] > 0.5
            actual = attention(vectors, i, alpha=0.5, sigma=5.0)
            np.testing.assert_allclose(actual.numpy(), expected, atol=1e-12)

    def test_a_large_alpha_leaves_a_client_nothing_of_its_own_and_no_less(self):
        vectors = torch.tensor([[0.0], [0.0], [1.0]])
        shares = attention(vectors, 0, alpha=100.0, sigma=1.0).tolist()
        assert shares == pytest.approx([0.0, 1 / (1 + np.exp(-1)), 1 - 1 / (1 + np.exp(-1))])

    def test_clients_train_from_their_cloud_models_and_are_judged_by_their_uploads(self):
        grid = SimulatedGrid({1: site(1.0), 2: site(2.0)})
        start(FedAMP(alpha=0.3, sigma=6.0), grid)
        # Six generated parameters differ by 1.
        share = 0.3 * np.exp(-6 / 6.0) / 6.0
        second = received(grid, "train")[1]
        assert second == pytest.approx({1: 1 + share, 2: 2 - share}, abs=1e-6)
        assert received(grid, "evaluate")[1] == {1: 1.0, 2: 2.0}

    def test_momentum_is_that_of_the_cloud_models(self):
        grid = SimulatedGrid({1: by_round(site), 2: by_round(site)})
        start(FedAMP(alpha=0.3, sigma=6.0, momentum=0.5), grid, num_rounds=4)
        # Both upload the number of the round: their cloud models are 1, 2, 3 without momentum.
        assert [each[1] for each in received(grid, "train")] == [0.0, 1.0, 2.0, 3.0 + 0.5 * (2 - 1)]

    def test_a_cloud_model_is_mixed_once_a_round(self, monkeypatch: pytest.MonkeyPatch):
        mixed = []

        def mix(vectors: torch.Tensor, row: int, alpha: float, sigma: float) -> torch.Tensor:
            mixed.append(row)
            return attention(vectors, row, alpha, sigma)

        monkeypatch.setattr(fedamp, "attention", mix)
        grid = SimulatedGrid({1: by_round(site), 2: by_round(site)})
        start(FedAMP(alpha=0.3, sigma=6.0, momentum=0.5), grid, num_rounds=3)
        assert mixed == [0, 1, 0, 1]  # in the first round both are sent the average

    def test_training_is_drawn_to_the_cloud_model(self):
        settings = FedAMPConfig(alpha=0.5, penalty=0.3)
        task = small_task(Config(strategy="fedamp", client=PLAIN_SGD, fedamp=settings))
        [(weight, bias)] = anchor = layers_of(task.received)
        for _ in range(EPOCHS):
            error = error_of(forward([(weight, bias)], INPUTS))
            step = head_step((weight, bias), INPUTS, error)
            weight = step[0] - RATE * 0.3 / 0.5 * (weight - anchor[0][0])
            bias = step[1] - RATE * 0.3 / 0.5 * (bias - anchor[0][1])
        uploaded, _ = METHODS["fedamp"]().train(task)
        assert_layers(uploaded, [(weight, bias)])


class TestFedAPA:
    VALUES = np.array([[1.0, 0.4, -0.3], [1.5, np.nan, -0.2], [1.8, 0.9, 0.1], [2.0, 1.0, 0.3]])
    """What all parameters of three clients are in each round; the second is down in one."""

    def node(self, client: int):
        def answer(message: Message) -> RecordDict | None:
            if message.metadata.message_type == MessageType.EVALUATE:
                return site(0.0)(message)
            value = self.VALUES[message.content["config"]["server-round"] - 1, client]
            return None if np.isnan(value) else upload(weights_with_head(value), 10)

        return answer

    def test_weights_follow_the_pseudo_gradient(self):
        strategy = FedAPA(learning_rate=0.05, weight_momentum=0.5)
        grid = SimulatedGrid({client: self.node(client) for client in range(3)})
        strategy.start(grid, ArrayRecord(weights_with_head(0.0)), num_rounds=4)
        theta, weights, velocity = np.zeros(3), np.zeros((3, 3)), np.zeros((3, 3))
        mixed = np.zeros(3)
        sent = [m.content["arrays"].to_torch_state_dict() for m in grid.sent if is_training(m)]
        for number, values in enumerate(self.VALUES):
            if number:
                np.fill_diagonal(weights, 1)
                weights /= weights.sum(axis=1, keepdims=True)
                mixed = weights @ theta
            for client, state in enumerate(sent[3 * number : 3 * number + 3]):
                assert float(state["body.weight"][0, 0]) == pytest.approx(mixed[client])
                assert float(state["head.bias"][0]) == pytest.approx(theta[client])
            before = theta.copy()
            for client in np.flatnonzero(~np.isnan(values)):
                if number:  # nine parameters outside the head
                    gradient = 9 * before * (mixed[client] - values[client])
                    velocity[client] = 0.5 * velocity[client] + gradient
                    weights[client] = (weights[client] - 0.05 * velocity[client]).clip(0, 1)
                theta[client] = values[client]
        assert 0 < weights[0, 1] < weights[0, 0]
        assert weights[0, 2] == 0  # it pulls the other way
        for client, value in enumerate(theta):  # their last uploads
            state = strategy.evaluation_state(client)
            assert float(state["body.weight"][0, 0]) == pytest.approx(value)
        for client in range(3):
            found = [strategy.weights[client].get(other, 0.0) for other in range(3)]
            assert found == pytest.approx(weights[client].tolist(), abs=1e-6)

    def test_momentum_is_that_of_the_mixtures_and_not_of_the_heads(self):
        strategy = FedAPA(learning_rate=1e-9, momentum=0.5)
        node = by_round(lambda value: lambda message: self.site(message, value))
        strategy.start(SimulatedGrid({1: node, 2: node}), ArrayRecord(weights_with_head(0.0)), 4)
        state = strategy.training_state(0)
        # Sent were 0 and its own uploads, 1, 2 and 3 + (2 - 1) / 2.
        assert float(state["body.weight"][0, 0]) == pytest.approx(4 + (3.5 - 2) / 2)
        assert float(state["head.bias"][0]) == 4.0

    @staticmethod
    def site(message: Message, value: float) -> RecordDict:
        return upload(weights_with_head(value), 10) if is_training(message) else site(0.0)(message)


def is_training(message: Message) -> bool:
    return message.metadata.message_type == MessageType.TRAIN


class TestFedPAC:
    @staticmethod
    def statistics(num: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        generator = make_generator(seed)
        means = torch.randn(num, 3, 4, generator=generator)
        return means, 0.1 + torch.rand(num, generator=generator)

    @staticmethod
    def objective(shares: np.ndarray, means: torch.Tensor, v: torch.Tensor, row: int) -> float:
        h = means.double().numpy()
        deviation = sum(a * (h[row] - other) for a, other in zip(shares, h, strict=True))
        return float((shares**2 * v.double().numpy()).sum() + (deviation**2).sum())

    def test_no_shares_on_a_grid_of_the_simplex_are_better(self):
        means, variances = self.statistics(3)
        means *= 0.4
        for row in range(3):
            best = self.objective(head_shares(means, variances, row).numpy(), means, variances, row)
            for i, j in itertools.product(range(101), repeat=2):
                if i + j <= 100:
                    shares = np.array([i, j, 100 - i - j]) / 100
                    assert best <= self.objective(shares, means, variances, row) + 1e-9

    def test_shares_are_optimal_by_their_gradients(self):
        means, variances = self.statistics(8, seed=3)
        means *= 0.3
        for row in range(8):
            shares = head_shares(means, variances, row).numpy()
            assert shares.sum() == pytest.approx(1)
            assert (shares >= 0).all()
            h = means.flatten(1).double().numpy()
            deviation = h[row] - h
            gradient = 2 * (variances.numpy() * shares + deviation @ (deviation.T @ shares))
            inside = gradient[shares > 0]
            # Equal where a share is positive, and nowhere smaller (up to shares below 0.001).
            assert inside.max() - inside.min() < 0.02
            assert gradient.min() > inside.min() - 0.02

    @pytest.mark.parametrize("variance", [0.0, 1e-12, 1e6])
    def test_shares_of_the_same_statistics_are_some(self, variance: float):
        shares = head_shares(torch.ones(4, 2, 3), torch.full((4,), variance), 1)
        assert float(shares.sum()) == pytest.approx(1)
        if variance:
            assert shares.tolist() == pytest.approx([0.25] * 4, abs=1e-3)

    def test_statistics_are_those_of_the_paper(self):
        features = torch.randn(9, 4, generator=make_generator(1))
        labels = torch.tensor([0, 0, 0, 2, 2, 2, 2, 3, 3])
        found = class_means(features, labels, 5) | head_statistics(features, labels, 5)
        rows, classes = features.double().numpy(), labels.numpy()
        variance = 0.0
        for k in range(5):
            mine = rows[classes == k]
            p = len(mine) / 9
            mean = mine.mean(0) if len(mine) else np.zeros(4)
            np.testing.assert_allclose(found["class-means"][k].numpy(), mean, atol=1e-6)
            np.testing.assert_allclose(found["weighted-means"][k].numpy(), p * mean, atol=1e-6)
            if len(mine):
                variance += p * (mine**2).sum(1).mean() - p**2 * (mean**2).sum()
        assert found["class-counts"].tolist() == [3, 0, 4, 2, 0]
        assert float(found["variance"]) == pytest.approx(variance / 9, rel=1e-5)

    @pytest.mark.parametrize("known", [None, [0, 0], [1, 0], [5, 5]])
    def test_training_takes_the_steps_of_the_paper(self, known: list[int] | None):
        settings = FedPACConfig(alignment=0.7, head_epochs=2, head_learning_rate=0.4)
        task = small_task(Config(strategy="fedpac", client=PLAIN_SGD, fedpac=settings), body=True)
        body, head = layers_of(task.received)
        features = forward([body], INPUTS)
        own = torch.stack([features[[0, 2]].mean(0), features[1]])
        targets = own.clone()
        if known is not None:
            means = torch.tensor([[0.5, -0.5], [1.5, 0.2]])
            counts = torch.tensor(known, dtype=torch.float32)
            task.extras = {"class-means": means, "class-counts": counts}
            for label in range(2):
                if known[label]:
                    targets[label] = means[label].double()
        for _ in range(2):
            head = head_step(head, features, error_of(forward([head], features)), 0.4)
        for _ in range(EPOCHS):
            features = forward([body], INPUTS)
            by_features = error_of(forward([head], features)) @ head[0]
            if known is not None:
                # The mean square over 3 examples and 2 features.
                by_features = by_features + 0.7 * 2 * (features - targets[LABELS]) / 6
            body = head_step(body, INPUTS, by_features)
        uploaded, extras = METHODS["fedpac"]().train(task)
        assert_layers(uploaded, [body, head])
        features = forward([body], INPUTS)
        torch.testing.assert_close(
            extras["class-means"].double(),
            torch.stack([features[[0, 2]].mean(0), features[1]]),
            atol=1e-5,
            rtol=1e-5,
        )

    @staticmethod
    def site(value: float, counts: list[float], num_examples: int = 10):
        def answer(message: Message) -> RecordDict:
            if message.metadata.message_type == MessageType.EVALUATE:
                return site(value)(message)
            content = upload(weights_with_head(value), num_examples)
            extras = {
                "class-means": torch.full((2, 3), value),
                "class-counts": torch.tensor(counts, dtype=torch.float32),
                "weighted-means": torch.full((2, 3), value),
                "variance": torch.ones(1),
            }
            content["extras"] = ArrayRecord(extras)
            return content

        return answer

    def test_everyone_gets_the_average_of_the_bodies_and_a_head_of_its_own(self):
        nodes = {1: self.site(1.0, [4, 6]), 2: self.site(1.5, [10, 0]), 3: self.site(9.0, [5, 5])}
        grid = SimulatedGrid(nodes)
        strategy = FedPAC()
        strategy.start(grid, ArrayRecord(weights_with_head(0.0)), num_rounds=2)
        sent = {
            message.metadata.dst_node_id: message.content["arrays"].to_torch_state_dict()
            for message in grid.sent
            if message.metadata.message_type == "train"
        }
        uploads = torch.tensor([1.0, 1.5, 9.0])
        statistics = uploads[:, None, None].expand(3, 2, 3)
        for row, node in enumerate(nodes):
            assert float(sent[node]["body.weight"][0, 0]) == pytest.approx(float(uploads.mean()))
            shares = head_shares(statistics, torch.ones(3), row)
            expected = float(shares @ uploads.double())
            assert float(sent[node]["head.weight"][0, 0]) == pytest.approx(expected, rel=1e-5)
        means = strategy.extras(0)["class-means"][:, 0]
        assert means.tolist() == pytest.approx(
            [(4 * 1 + 10 * 1.5 + 5 * 9) / 19, (6 * 1 + 5 * 9) / 11]
        )
        # Judged by what it has after its training, or before it.
        assert float(strategy.evaluation_state(2)["head.weight"][0, 0]) == 9.0
        strategy.evaluated = "sent"
        for key, tensor in strategy.training_state(2).items():
            assert torch.equal(strategy.evaluation_state(2)[key], tensor)

    def test_claimed_examples_count_up_to_ten_times_the_median_in_class_means(self):
        nodes = {1: self.site(1.0, [10, 0]), 2: self.site(1.0, [0, 10])}
        nodes[3] = self.site(3.0, [500, 500], 1000)
        strategy = FedPAC()
        grid = SimulatedGrid(nodes)
        strategy.start(grid, ArrayRecord(weights_with_head(0.0)), num_rounds=1)
        # The third counts as 100 examples, 50 of each class.
        expected = (10 * 1 + 50 * 3) / 60
        assert strategy.extras(0)["class-means"].flatten().tolist() == pytest.approx([expected] * 6)
        assert strategy.extras(0)["class-counts"].tolist() == pytest.approx([60.0, 60.0])

    def test_momentum_is_that_of_each_head(self):
        grid = SimulatedGrid({n: by_round(lambda value: self.site(value, [5, 5])) for n in (1, 2)})
        strategy = FedPAC(momentum=0.5)
        strategy.start(grid, ArrayRecord(weights_with_head(0.0)), num_rounds=3)
        # The first is taken as it is, then 2 = 1 + (2 - 1) and 2 + (3 - 2) + 0.5 (2 - 1).
        assert float(strategy.training_state(0)["head.bias"][0]) == 3.5

    def test_more_heads_than_a_thousand_have_shares(self):
        shares = head_shares(torch.ones(1001, 1, 1), torch.ones(1001), 0)
        assert shares.tolist() == pytest.approx([1 / 1001] * 1001)

    def test_means_beyond_all_others_cost_their_sender_the_round(self):
        def lies(message: Message) -> RecordDict:
            content = self.site(1.0, [5, 5])(message)
            if "extras" in content:
                extras = content["extras"].to_torch_state_dict()
                content["extras"] = ArrayRecord(extras | {"class-means": torch.full((2, 3), 9e11)})
            return content

        nodes = {n: self.site(1.0, [5, 5]) for n in (1, 2, 3)} | {4: lies}
        strategy = FedPAC()
        strategy.start(SimulatedGrid(nodes), ArrayRecord(weights_with_head(0.0)), num_rounds=2)
        assert '"class-means" has the length' in strategy.record.clients[3]["status"]
        assert strategy.record.num_failures == 1
        assert torch.equal(strategy.extras(0)["class-means"], torch.ones(2, 3))

    @pytest.mark.parametrize("counts", [[11.0, -1.0], [1000.0, 0.0], [0.0, 0.0], [9.5, 0.5]])
    def test_counts_that_cannot_be_cost_their_sender_the_round(self, counts: list[float]):
        nodes = {1: self.site(1.0, [4, 6]), 2: self.site(1.5, [10, 0]), 3: self.site(9.0, counts)}
        strategy = FedPAC()
        grid = SimulatedGrid(nodes)
        strategy.start(grid, ArrayRecord(weights_with_head(0.0)), num_rounds=1)
        assert strategy.record.num_failures == 1
        assert "class-counts" in strategy.record.clients[2]["status"]
        assert float(strategy.average["body.weight"][0, 0]) == 1.25


def by_round(site: Callable[[float], Callable[[Message], RecordDict]]):
    """Return a node that uploads the number of the round."""

    def answer(message: Message) -> RecordDict:
        return site(float(message.content["config"]["server-round"]))(message)

    return answer


def weights_with_head(value: float) -> dict[str, torch.Tensor]:
    return {
        "body.weight": torch.full((3, 3), value),
        "head.weight": torch.full((2, 3), value),
        "head.bias": torch.full((2,), value),
    }


class TestPFedHN:
    SETTINGS = PFedHNConfig(
        embedding_dim=2,
        hidden_size=3,
        hidden_layers=1,
        learning_rate=0.05,
        momentum=0.5,
        weight_decay=0.1,
        max_gradient_norm=2.0,
    )

    def test_network_and_embedding_take_the_steps_of_the_paper(self):
        strategy = PFedHN(settings=self.SETTINGS, spec=ModelSpec.of_state(weights(0.0)))
        grid = SimulatedGrid({1: site(1.0)})
        strategy.min_available_nodes = 1
        strategy.min_train_nodes = strategy.min_evaluate_nodes = 1
        generator = make_generator(strategy.seed, "embedding", 0)
        embedding = torch.randn(2, generator=generator).double().numpy()
        linear = [layer for layer in strategy.network if isinstance(layer, nn.Linear)]
        matrices = [layer.weight.detach().double().numpy().copy() for layer in linear]
        biases = [layer.bias.detach().double().numpy().copy() for layer in linear]
        target = np.array([1.0, 1, 1, 1, -1, -1])
        velocity: list[np.ndarray] = []
        for _ in range(2):
            # The network by hand, and back: two layers with ReLU between them, then the last.
            inputs, outputs = [embedding], []
            for number, (matrix, bias) in enumerate(zip(matrices, biases, strict=True)):
                outputs.append(matrix @ inputs[-1] + bias)
                inputs.append(np.maximum(outputs[-1], 0) if number == 0 else outputs[-1])
            back = inputs[-1] - target
            gradients_m, gradients_b = [], []
            for number in reversed(range(len(matrices))):
                if number == 0:
                    back = back * (outputs[0] > 0)
                gradients_m.insert(0, np.outer(back, inputs[number]))
                gradients_b.insert(0, back)
                back = matrices[number].T @ back
            gradients = [back]
            for matrix, bias in zip(gradients_m, gradients_b, strict=True):
                gradients += [matrix, bias]
            norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients))
            assert norm > 2.0  # or nothing would be clipped
            current = [embedding]
            for matrix, bias in zip(matrices, biases, strict=True):
                current += [matrix, bias]
            steps = [g * 2.0 / norm + 0.1 * w for g, w in zip(gradients, current, strict=True)]
            if velocity:
                steps = [s + 0.5 * v for s, v in zip(steps, velocity, strict=True)]
            velocity = steps
            embedding, *moved = [w - 0.05 * s for w, s in zip(current, steps, strict=True)]
            matrices, biases = moved[::2], moved[1::2]
        strategy.start(grid, ArrayRecord(weights(0.0)), num_rounds=2)
        np.testing.assert_allclose(strategy.embeddings[0].numpy(), embedding, atol=1e-5)
        for layer, matrix, bias in zip(linear, matrices, biases, strict=True):
            np.testing.assert_allclose(layer.weight.detach().numpy(), matrix, atol=1e-5)
            np.testing.assert_allclose(layer.bias.detach().numpy(), bias, atol=1e-5)

    def test_a_model_that_is_too_large_is_refused(self):
        settings, spec = PFedHNConfig(hidden_size=20_000), ModelSpec.of_state(weights(0.0))
        with pytest.raises(ConfigError, match=r"pfedhn.hidden-size = 20000: .*1,200,120,000"):
            PFedHN(settings=settings, spec=spec)

    def test_clients_have_models_of_their_own_from_the_beginning(self):
        grid = SimulatedGrid({node: site(float(node)) for node in (1, 2)})
        start(PFedHN(), grid)
        first = received(grid, "train")[0]
        assert first[1] != first[2]


class TestFloco:
    def test_the_projection_onto_the_simplex_is_the_nearest_point(self):
        points = torch.randn(5, 3, generator=make_generator(2), dtype=torch.float64)
        found = onto_simplex(points, 0.6)
        for point, nearest in zip(points, found, strict=True):
            best = float((point - nearest).square().sum())
            assert float(nearest.sum()) == pytest.approx(0.6)
            assert bool((nearest >= 0).all())
            for i, j in itertools.product(range(61), repeat=2):
                if i + j <= 60:
                    other = torch.tensor([i, j, 60 - i - j], dtype=torch.float64) / 100
                    assert best <= float((point - other).square().sum()) + 1e-12

    def test_riesz_energy_is_that_of_the_pairs(self):
        points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
        assert riesz_energy(points) == pytest.approx(1 / 25 + 1 / 25 + 1 / 1e-8)

    @pytest.mark.parametrize("num_endpoints", [3, 12])
    def test_points_are_principal_components_on_the_simplex_spread_as_far_as_they_go(
        self, num_endpoints: int
    ):
        updates = 0.2 * torch.randn(9, 50, generator=make_generator(4))
        updates[8] = updates[7]
        points = project(updates, num_endpoints)
        assert points.sum(dim=1).tolist() == pytest.approx([1.0] * 9, abs=1e-5)
        assert bool((points >= 0).all())
        assert torch.allclose(points[7], points[8], atol=1e-5)
        order = torch.tensor([4, 2, 8, 0, 1, 7, 6, 5, 3])
        torch.testing.assert_close(project(updates[order], num_endpoints), points[order])
        rows = updates.double().numpy() - updates.double().numpy().mean(axis=0)
        _, _, axes = np.linalg.svd(rows, full_matrices=False)
        scores = np.zeros((9, num_endpoints))
        used = min(num_endpoints, 7)
        scores[:, :used] = (rows @ axes.T)[:, :used]
        scores *= np.sign(scores[np.abs(scores).argmax(axis=0), np.arange(num_endpoints)])
        energies = [
            riesz_energy(onto_simplex(torch.from_numpy(scores), z) / z) for z in (0.05, 0.3, 0.9)
        ]
        assert riesz_energy(points.double()) <= min(energies) * 1.001

    def test_a_client_beyond_all_rounding_is_on_the_simplex_too(self):
        updates = 0.2 * torch.randn(6, 50, generator=make_generator(4))
        updates[0] = 9e11
        points = project(updates, 5)
        assert points.sum(dim=1).tolist() == pytest.approx([1.0] * 6, abs=1e-5)
        assert bool((points >= 0).all())

    def test_training_mixes_the_endpoints_and_judging_takes_the_point(self):
        model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
        endpoints = torch.randn(3, 2, 2, generator=make_generator(5))
        center = torch.tensor([0.2, 0.3, 0.5])
        simplex = Simplex(model, ["1.weight"], endpoints.clone(), center, 0.4, make_generator(6))
        inputs = IMAGES.flatten(1)
        expected = inputs @ (center[:, None, None] * endpoints).sum(0).T + model[1].bias
        torch.testing.assert_close(simplex.eval()(IMAGES), expected)
        simplex.train()
        points = torch.stack([simplex._sample() for _ in range(200)])
        assert float((points - center).abs().sum(dim=1).max()) <= 0.4
        assert float((points - center).abs().sum(dim=1).mean()) == pytest.approx(0.2, abs=0.03)
        simplex.generator = make_generator(7)
        point = simplex._sample()
        simplex.generator = make_generator(7)
        mixed = inputs @ (point[:, None, None] * endpoints).sum(0).T + model[1].bias
        torch.testing.assert_close(simplex(IMAGES), mixed)
        simplex.radius = None
        anywhere = torch.stack([simplex._sample() for _ in range(500)])
        assert anywhere.sum(dim=1).tolist() == pytest.approx([1.0] * 500)
        assert anywhere.mean(dim=0).tolist() == pytest.approx([1 / 3] * 3, abs=0.05)

    def test_clients_train_all_endpoints_and_upload_their_mixture(self):
        task = small_task(Config(strategy="floco", client=PLAIN_SGD, floco=FlocoConfig()))
        endpoints = torch.stack([task.received["1.weight"]] * 2) + torch.tensor([0.0, 0.5])
        task.extras = {
            "endpoints": endpoints,
            "center": torch.tensor([0.5, 0.5]),
            "has-region": torch.tensor(False),
        }
        method = METHODS["floco"]()
        before = method.personal_model(task)(IMAGES).detach()
        uploaded, extras = method.train(task)
        assert not torch.equal(extras["endpoints"], endpoints)
        torch.testing.assert_close(uploaded["1.weight"], extras["endpoints"].mean(0))
        assert not torch.equal(uploaded["1.bias"], task.received["1.bias"])
        personal = method.personal_model(task).eval()(IMAGES)
        assert not torch.equal(personal, before)
        task.model.load_state_dict(method.personal_state(task))
        torch.testing.assert_close(task.model(IMAGES), personal)

    def test_endpoints_are_averaged_by_examples_and_points_given_when_it_is_time(self):
        strategy = Floco(num_endpoints=2, projection_round=2)
        grid = SimulatedGrid({1: self.node(1.0, 30), 2: self.node(5.0, 10), 3: self.node(5.0, 10)})
        strategy.start(grid, ArrayRecord(weights_with_head(0.0)), num_rounds=3)
        regions: dict[int, list[bool]] = {}
        for message in grid.sent:
            if message.metadata.message_type == "train":
                extras = message.content["extras"].to_torch_state_dict()
                server_round = message.content["config"]["server-round"]
                regions.setdefault(server_round, []).append(bool(extras["has-region"]))
        assert regions == {1: [False] * 3, 2: [False] * 3, 3: [True] * 3}
        assert strategy.endpoints.flatten().tolist() == pytest.approx([2.6] * 12)
        assert torch.equal(strategy.points[1], strategy.points[2])
        assert not torch.equal(strategy.points[0], strategy.points[1])

    def test_claimed_examples_count_up_to_ten_times_the_median_in_endpoints(self):
        strategy = Floco(num_endpoints=2)
        nodes = {1: self.node(1.0, 10), 2: self.node(1.0, 10), 3: self.node(3.0, 1_000_000)}
        grid = SimulatedGrid(nodes)
        strategy.start(grid, ArrayRecord(weights_with_head(0.0)), num_rounds=1)
        expected = (10 + 10 + 100 * 3) / 120
        assert strategy.endpoints.flatten().tolist() == pytest.approx([expected] * 12)

    def test_momentum_is_that_of_the_endpoints_too(self):
        strategy = Floco(num_endpoints=2, momentum=0.5)
        grid = SimulatedGrid({1: self.node(2.0, 10), 2: self.node(2.0, 10)})
        strategy.start(grid, ArrayRecord(weights_with_head(0.0)), num_rounds=2)
        first = Floco(num_endpoints=2, spec=ModelSpec.of_state(weights_with_head(0.0)))
        torch.testing.assert_close(strategy.endpoints, 2 + 0.5 * (2 - first.endpoints))

    def test_endpoints_beyond_all_others_cost_their_sender_the_round(self):
        strategy = Floco(num_endpoints=2)
        liar = self.node(1.0, 10, endpoints=9e11)
        grid = SimulatedGrid({n: self.node(1.0, 10) for n in (1, 2, 3)} | {4: liar})
        strategy.start(grid, ArrayRecord(weights_with_head(0.0)), num_rounds=2)
        assert '"endpoints" has the length' in strategy.record.clients[3]["status"]
        assert torch.equal(strategy.endpoints, torch.ones(2, 2, 3))

    @staticmethod
    def node(value: float, num_examples: int, endpoints: float | None = None):
        def answer(message: Message) -> RecordDict:
            if message.metadata.message_type == MessageType.EVALUATE:
                return site(value)(message)
            content = upload(weights_with_head(value), num_examples)
            fill = value if endpoints is None else endpoints
            content["extras"] = ArrayRecord({"endpoints": torch.full((2, 2, 3), fill)})
            return content

        return answer


class TestIFCA:
    def test_a_client_trains_the_model_with_the_lowest_loss(self):
        task = small_task(Config(strategy="ifca", client=PLAIN_SGD))
        models = {
            0: {"1.weight": torch.tensor([[-1.0, -1], [1, 1]]), "1.bias": torch.zeros(2)},
            2: {"1.weight": torch.tensor([[1.0, 1], [-1, -1]]), "1.bias": torch.zeros(2)},
        }
        losses = {}
        for number, state in {**models, 1: task.received}.items():
            logits = forward(layers_of(state), INPUTS)
            chances = logits.exp() / logits.exp().sum(1, keepdim=True)
            losses[number] = -float(chances[range(3), LABELS].log().mean())
        assert min(losses, key=losses.__getitem__) == 2
        task.extras = {"received": torch.tensor(1)}
        for number, state in models.items():
            task.extras |= {f"cluster.{number}.{name}": tensor for name, tensor in state.items()}
        [layer] = layers_of(models[2])
        for _ in range(EPOCHS):
            layer = head_step(layer, INPUTS, error_of(forward([layer], INPUTS)))
        method = METHODS["ifca"]()
        assert_layers(method.personal_model(task).state_dict(), layers_of(models[2]))
        uploaded, extras = method.train(task)
        assert extras["choice"].tolist() == [0.0, 0.0, 1.0]
        assert_layers(uploaded, [layer])
        assert_layers(method.personal_model(task).state_dict(), [layer])

    @staticmethod
    def node(value: float, choice: list[float], num_examples: int = 10) -> Callable:
        def answer(message: Message) -> RecordDict:
            if message.metadata.message_type == MessageType.EVALUATE:
                return RecordDict(
                    {"m": MetricRecord({"num-examples": 4, "accuracy": 0.5, "loss": 1.0})}
                )
            content = upload(weights(value), num_examples)
            content["extras"] = ArrayRecord({"choice": torch.tensor(choice, dtype=torch.float32)})
            return content

        return answer

    def test_each_cluster_is_the_average_of_those_that_chose_it(self):
        nodes = {
            1: self.node(1.0, [0, 1, 0], 30),
            2: self.node(5.0, [0, 1, 0], 10),
            3: self.node(7.0, [1, 0, 0]),
        }
        grid = SimulatedGrid(nodes)
        strategy = IFCA(num_clusters=3, spec=ModelSpec.of_state(weights(0.5)))
        untouched = strategy.clusters[2]
        strategy.start(grid, ArrayRecord(weights(0.5)), num_rounds=1)
        values = [float(strategy.clusters[n]["layer.weight"][0, 0]) for n in range(2)]
        assert values == [7.0, 2.0]
        assert torch.equal(strategy.clusters[2]["layer.weight"], untouched["layer.weight"])
        assert float(strategy.evaluation_state(0)["layer.weight"][0, 0]) == 2.0
        sent = grid.sent[0].content
        others = states_below("cluster", sent["extras"].to_torch_state_dict())
        assert set(others) == {1, 2}  # the first is sent as the model itself

    def test_claimed_examples_count_up_to_ten_times_the_median_of_the_round(self):
        nodes = {1: self.node(1.0, [1, 0]), 2: self.node(3.0, [1, 0], 1_000_000)}
        nodes |= {3: self.node(2.0, [0, 1]), 4: self.node(2.0, [0, 1])}
        strategy = IFCA(num_clusters=2)
        start(strategy, SimulatedGrid(nodes))
        first = float(strategy.clusters[0]["layer.weight"][0, 0])
        assert first == pytest.approx((10 + 100 * 3) / 110)

    def test_initial_models_have_the_same_entries_in_another_order(self):
        initial = weights(0.0) | {"layer.weight": torch.arange(4.0).reshape(2, 2)}
        strategy = IFCA(num_clusters=2, spec=ModelSpec.of_state(initial))
        first, second = strategy.clusters.values()
        assert torch.equal(first["layer.weight"], initial["layer.weight"])
        assert sorted(second["layer.weight"].flatten().tolist()) == [0, 1, 2, 3]
        other = IFCA(num_clusters=20, spec=ModelSpec.of_state(initial))
        orders = {tuple(c["layer.weight"].flatten().tolist()) for c in other.clusters.values()}
        assert len(orders) > 5

    @pytest.mark.parametrize("choice", [[0, 0], [1, 1], [0.5, 0.5], [2, -1]])
    def test_who_names_no_cluster_loses_the_round(self, choice: list[float]):
        nodes = {1: self.node(1.0, [1, 0]), 2: self.node(3.0, [1, 0]), 3: self.node(9.0, choice)}
        strategy = IFCA()
        start(strategy, SimulatedGrid(nodes), num_rounds=1)
        assert "its cluster is" in strategy.record.clients[2]["status"]
        assert float(strategy.clusters[0]["layer.weight"][0, 0]) == 2.0


SMALL = {
    "num-server-rounds": 4,
    "server.min-available-nodes": 3,
    "data.train-samples": 20,
    "data.test-samples": 10,
    "client.local-epochs": 1,
    "server.momentum": 0.5,
    "diffusion.train-steps": 20,
}


@pytest.mark.parametrize(
    "name", [name for name, each in STRATEGIES.items() if not each.clients_keep_parts]
)
def test_what_is_restored_goes_on_with_the_same_digits(name: str):
    config = Config.from_flat({**SMALL, "strategy": name})
    _, rows = simulate(config, 3, num_processes=0)
    assert all(row["num-failures"] == 0 for row in rows)
    half, first_rows = simulate(config, 3, num_rounds=2, num_processes=0)
    measured = [[row["personalized-accuracy"] for row in each] for each in (rows[:2], first_rows)]
    assert measured[0] == measured[1]
    restored = STRATEGIES[name].of(config, ModelSpec.of_state(half.average), roster=half.roster)
    restored.restore(half.state())
    restored.record.server_round = 2
    for client in range(4):  # the last one never took part
        for left, right in (
            (half.training_state(client), restored.training_state(client)),
            (half.evaluation_state(client), restored.evaluation_state(client)),
            (half.extras(client), restored.extras(client)),
        ):
            assert left.keys() == right.keys()
            assert all(torch.equal(left[key], right[key]) for key in left)
