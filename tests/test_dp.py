"""Differential privacy: what is added to uploads, what it costs, and who stops when."""

import copy
import importlib.util
import logging
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp.mod import LocalDpMod
from flwr.supercore.task_identity import TaskIdentity
from scipy import optimize, stats
from small_task import IMAGES, LABELS, PLAIN_SGD, small_task
from torch import nn

from benchmarks import dp
from client_app.messages import evaluate_message, train_message
from client_app.node import query
from pfedgpa_app import preflight
from pfedgpa_app.config import DATASETS, ClientConfig, Config, ConfigError, PrivacyConfig
from pfedgpa_app.data import client_data
from pfedgpa_app.model_spec import ModelSpec
from pfedgpa_app.models import build_model
from pfedgpa_app.parameters import copy_of
from pfedgpa_app.privacy import (
    Ledger,
    cost_of_round,
    gaussian,
    private_update,
    sampling_plan,
    secure_uniform,
    seeded_uniform,
    unfit_layers,
    update_deviation,
)
from pfedgpa_app.randomness import make_generator
from pfedgpa_app.report import RunFolder
from server_app.app import RoundEnd, RunError, make_strategy
from server_app.simulation import simulate
from server_app.tracking import Tracking

SETTINGS = {"client.local-epochs": 2, "client.device": "cpu", "privacy.seeded-noise": True}
UPDATE = {**SETTINGS, "privacy.mode": "update", "privacy.epsilon": 50.0, "privacy.clip-norm": 0.1}
EXAMPLE = {**SETTINGS, "privacy.mode": "example", "privacy.noise-multiplier": 2.0}
MODEL = build_model("cnn-8x8", DATASETS["digits"], seed=0)
SPEC = ModelSpec.of(MODEL)
DELTA = PrivacyConfig().delta


def in_the_middle(size: int) -> torch.Tensor:
    """Return draws of which all noise is 0."""
    return torch.full((size,), 0.5, dtype=torch.float64)


def context(settings: dict, node: dict | None = None) -> Context:
    partition = {"partition-id": 1, "num-partitions": 4}
    return Context(1, 1, partition if node is None else node, RecordDict(), settings)


def message(kind: str, server_round: int = 1, **extras: torch.Tensor) -> Message:
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    content = RecordDict(
        {
            "arrays": ArrayRecord(MODEL.state_dict()),
            "config": ConfigRecord({"server-round": server_round}),
        }
    )
    if extras:
        content["extras"] = ArrayRecord(extras)
    return Message(content=content, message_type=kind, dst_node_id=3)


def trained(at: Context, server_round: int = 1) -> RecordDict:
    return train_message(message(MessageType.TRAIN, server_round), at).content


def arrays_of(content: RecordDict) -> dict[str, torch.Tensor]:
    return content["arrays"].to_torch_state_dict()


# Randomness


def test_secure_draws_are_uniform_and_never_the_same():
    first, second = secure_uniform(50_000), secure_uniform(50_000)
    assert not bool((first == second).any())
    assert float(first.min()) > 0
    assert float(first.max()) < 1
    assert stats.kstest(first.numpy(), "uniform").pvalue > 1e-6


def test_seeded_draws_follow_the_seed():
    def draw(seed: int) -> torch.Tensor:
        return seeded_uniform(make_generator(seed))(50_000)

    assert torch.equal(draw(1), draw(1))
    assert not bool((draw(1) == draw(2)).any())
    assert stats.kstest(draw(1).numpy(), "uniform").pvalue > 1e-3


def test_noise_is_normal():
    noise = gaussian(torch.zeros(250, 200), seeded_uniform(make_generator(3)))
    assert noise.shape == (250, 200)
    assert noise.dtype == torch.float32
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3


# Mode update


@pytest.mark.parametrize("length", [0.3, 5.0])
def test_an_update_is_clipped_and_noised_as_by_flowers_localdpmod(monkeypatch, length: float):
    """The same parameters where all noise is 0, and the same standard deviation."""
    settings = PrivacyConfig(mode="update", epsilon=3.0, delta=1e-4, clip_norm=1.5, sensitivity=0.7)
    received = copy_of(MODEL.state_dict())
    direction = {name: torch.randn_like(t) for name, t in received.items()}
    norm = math.sqrt(sum(float(t.square().sum()) for t in direction.values()))
    state = {name: t + length / norm * direction[name] for name, t in received.items()}

    deviations = []

    def no_noise(mean: float, deviation: float, shape: tuple[int, ...]) -> np.ndarray:
        deviations.append(deviation)
        return np.zeros(shape)

    monkeypatch.setattr(np.random, "normal", no_noise)
    mod = LocalDpMod(1.5, 0.7, 3.0, 1e-4)

    def client(request: Message, context: Context) -> Message:
        return Message(RecordDict({"arrays": ArrayRecord(state)}), reply_to=request)

    expected = arrays_of(mod(message(MessageType.TRAIN), context({}), client).content)
    actual = private_update(state, received, SPEC, settings, in_the_middle)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, atol=1e-7, rtol=1e-5)
    assert deviations == [pytest.approx(update_deviation(settings))] * len(state)


def test_the_noise_of_an_upload_has_the_deviation_that_the_settings_say():
    settings = PrivacyConfig(mode="update", epsilon=2.0, clip_norm=0.25)
    received = {"w": torch.full((40_000,), 3.0)}
    spec, uniform = ModelSpec.of_state(received), seeded_uniform(make_generator(0))
    noised = private_update(received, received, spec, settings, uniform)["w"]
    # Two updates of length 1/4 are at most 1/2 apart.
    expected = 0.5 * math.sqrt(2 * math.log(1.25 / 1e-5)) / 2.0
    assert stats.kstest((noised - 3.0).numpy(), "norm", args=(0, expected)).pvalue > 1e-3


def test_an_update_of_nothing_and_one_without_end_are_noise_alone():
    settings = PrivacyConfig(mode="update", epsilon=2.0)
    received = {"w": torch.ones(3), "count": torch.tensor(4)}
    for value in (1.0, math.inf, math.nan):
        state = {"w": torch.full((3,), value), "count": torch.tensor(9)}
        spec = ModelSpec.of_state(received)
        private = private_update(state, received, spec, settings, in_the_middle)
        assert torch.equal(private["w"], received["w"])
        # A number of batches would tell that of the images.
        assert torch.equal(private["count"], received["count"])


def test_what_a_client_uploads_is_its_clipped_update_and_seeded_noise():
    """Against training without privacy, clipped and noised in NumPy."""
    plain = arrays_of(trained(context(SETTINGS)))
    private = arrays_of(trained(context(UPDATE)))
    start = {name: t.double().numpy() for name, t in MODEL.state_dict().items()}
    moves = {name: plain[name].double().numpy() - start[name] for name in start}
    norm = np.sqrt(sum((move**2).sum() for move in moves.values()))
    assert norm > 0.1
    generator = make_generator(0, "noise", 1, 1)
    deviation = 0.2 * np.sqrt(2 * np.log(1.25 / DELTA)) / 50.0
    for name, move in moves.items():
        bits = torch.randint(2**52, (move.size,), generator=generator).double().numpy()
        noise = stats.norm.ppf((bits + 0.5) / 2**52).reshape(move.shape)
        expected = start[name] + 0.1 / norm * move + deviation * noise
        np.testing.assert_allclose(private[name].numpy(), expected, atol=1e-5)


def test_accuracies_in_a_reply_are_those_of_the_noised_model():
    content = trained(context(UPDATE))
    model = build_model("cnn-8x8", DATASETS["digits"], seed=5)
    model.load_state_dict(arrays_of(content))
    data = client_data(Config().data, 0, 1, 4)
    normal = (data.test_inputs - data.stats.mean[:, None, None]) / data.stats.std[:, None, None]
    correct = model.eval()(normal).argmax(dim=1) == data.test_labels
    assert content["metrics"]["accuracy-after"] == pytest.approx(float(correct.float().mean()))


# Mode example


def test_a_step_of_dp_sgd_is_the_noised_sum_of_clipped_gradients():
    """Against gradients of one image at a time, by autograd in float64."""
    client = PLAIN_SGD.model_copy(update={"local_epochs": 3, "batch_size": 2, "momentum": 0.5})
    privacy = PrivacyConfig(mode="example", noise_multiplier=0.4, max_grad_norm=0.6)
    task = small_task(Config(client=client, privacy=privacy))
    task.uniform = seeded_uniform(make_generator(8))
    task.fit(task.model)

    draw = seeded_uniform(make_generator(8))
    expected = small_task(Config()).model.double()
    parameters = list(expected.parameters())
    velocity = [torch.zeros_like(p) for p in parameters]
    clipped_some = kept_some = False
    for _ in range(6):  # three epochs of two steps, each with half of the three images
        rows = (draw(3) < 0.5).nonzero()[:, 0].tolist()
        total = [torch.zeros_like(p) for p in parameters]
        for row in rows:
            logits = expected(IMAGES[row : row + 1].double())
            loss = nn.functional.cross_entropy(logits, LABELS[row : row + 1])
            gradients = torch.autograd.grad(loss, parameters)
            norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
            clipped_some, kept_some = clipped_some or norm > 0.6, kept_some or norm < 0.6
            for t, g in zip(total, gradients, strict=True):
                t += g * min(1.0, 0.6 / norm)
        with torch.no_grad():
            for p, v, t in zip(parameters, velocity, total, strict=True):
                noise = torch.from_numpy(stats.norm.ppf(draw(p.numel()).numpy())).reshape(p.shape)
                # The mean is over the batch size that is expected: half of three, rounded down.
                v.mul_(0.5).add_(t + 0.4 * 0.6 * noise)
                p -= 0.2 * v
    assert clipped_some
    assert kept_some
    for actual, right in zip(task.model.parameters(), parameters, strict=True):
        torch.testing.assert_close(actual.double(), right, atol=1e-5, rtol=1e-4)
    assert task.ledger == Ledger(((0.4, 0.5, 6),))


def test_steps_that_draw_no_image_are_noise_alone():
    task = small_task(Config(client=PLAIN_SGD, privacy=PrivacyConfig(mode="example")))
    task.config = task.config.model_copy(
        update={"client": PLAIN_SGD.model_copy(update={"batch_size": 1})}
    )
    task.uniform = in_the_middle  # more than 1/3: nobody is drawn, and there is no noise
    task.fit(task.model)
    for name, tensor in task.model.state_dict().items():
        assert torch.equal(tensor, task.received[name])


def test_a_model_is_as_it_was_after_dp_sgd():
    task = small_task(Config(client=PLAIN_SGD, privacy=PrivacyConfig(mode="example")))
    names = list(task.model.state_dict())
    task.fit(task.model)
    task.fit(task.model)
    assert list(task.model.state_dict()) == names
    assert not any(module._forward_hooks for module in task.model.modules())


# The account of what was spent


def exact_epsilon(noise_multiplier: float, delta: float) -> float:
    """Return the epsilon of one Gaussian mechanism (Balle and Wang, arXiv 1805.06530, eq. 6)."""
    mu = 1 / noise_multiplier

    def excess(epsilon: float) -> float:
        log_right = epsilon + stats.norm.logcdf(-mu / 2 - epsilon / mu)
        return stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(log_right) - delta

    return float(optimize.brentq(excess, 0, 1e4))


@pytest.mark.parametrize("rounds", [1, 4, 25])
def test_epsilon_of_all_examples_is_near_the_exact_one_and_never_less(rounds: int):
    """The sum of Gaussian mechanisms is one with less noise."""
    bound = Ledger().after(5.0, 1.0, rounds).epsilon(DELTA)
    exact = exact_epsilon(5.0 / math.sqrt(rounds), DELTA)
    assert exact <= bound <= 1.15 * exact


def test_epsilon_of_drawn_examples_is_that_of_opacus():
    from opacus.accountants import RDPAccountant  # it takes seconds

    accountant = RDPAccountant()
    ledger = Ledger()
    for noise, rate, steps in [(1.1, 0.1, 7), (1.1, 0.1, 3), (0.8, 0.5, 2)]:
        ledger = ledger.after(noise, rate, steps)
        for _ in range(steps):
            accountant.step(noise_multiplier=noise, sample_rate=rate)
    assert ledger.entries == ((1.1, 0.1, 10), (0.8, 0.5, 2))
    assert ledger.epsilon(1e-5) == pytest.approx(accountant.get_epsilon(1e-5))
    assert Ledger.of(ledger.columns()) == ledger
    assert Ledger().epsilon(1e-5) == 0


def test_a_client_adds_up_what_it_reports_over_the_rounds():
    from opacus.accountants import RDPAccountant

    for settings, noise, rate, steps in [
        (UPDATE, math.sqrt(2 * math.log(1.25 / DELTA)) / 50.0, 1.0, 1),
        (EXAMPLE, 2.0, 1 / 3, 6),  # 30 images in batches of 10, 2 epochs
    ]:
        accountant, at = RDPAccountant(), context(settings)
        for server_round in range(1, 4):
            reported = trained(at, server_round)["metrics"]["epsilon"]
            for _ in range(steps):
                accountant.step(noise_multiplier=noise, sample_rate=rate)
            assert reported == pytest.approx(accountant.get_epsilon(DELTA))
        # Numbers alone: nothing is pickled.
        assert dict(at.state["privacy"]) == {
            "noise-multipliers": pytest.approx([noise]),
            "sample-rates": [rate],
            "steps": [3.0 * steps],
        }


@pytest.mark.parametrize("settings", [UPDATE, EXAMPLE])
def test_who_has_forgotten_its_account_counts_all_rounds_before(settings: dict):
    """As after the restart of a SuperNode; a node that is new to the run is asked, and counts 0."""
    steady, restarted, new = context(settings), context(settings), context(settings)
    for server_round in (1, 2, 3):
        reported = trained(steady, server_round)["metrics"]["epsilon"]
    assert trained(restarted, 3)["metrics"]["epsilon"] == pytest.approx(reported)
    query(message(MessageType.QUERY), new)
    first = trained(context(settings), 1)["metrics"]["epsilon"]
    assert trained(new, 3)["metrics"]["epsilon"] == pytest.approx(first)
    query(message(MessageType.QUERY), steady)  # asked again, it forgets nothing
    assert trained(steady, 4)["metrics"]["epsilon"] > reported


def test_a_plain_client_reports_no_epsilon_and_keeps_no_account():
    at = context(SETTINGS)
    assert "epsilon" not in trained(at)["metrics"]
    assert "privacy" not in at.state


# The budget


def test_who_would_exceed_its_budget_does_not_train_and_is_judged_all_the_same():
    after_two = Ledger().after(2.0, 1 / 3, 12).epsilon(DELTA)
    at = context({**EXAMPLE, "privacy.epsilon": after_two + 0.01})
    for server_round in (1, 2):
        assert trained(at, server_round).array_records
    for server_round in (3, 4):
        content = trained(at, server_round)
        assert not content.array_records
        assert dict(content["metrics"]) == {
            "num-examples": 30,
            "epsilon": pytest.approx(after_two),
            "budget-spent": 1,
        }
    evaluated = evaluate_message(message(MessageType.EVALUATE), at).content["metrics"]
    assert 0 <= evaluated["accuracy"] <= 1


@pytest.mark.parametrize("strategy", ["pfedgpa", "fedavg-ft"])
def test_a_run_goes_on_with_those_whose_budget_lasts(strategy: str):
    budget = Ledger().after(2.0, 1 / 3, 12).epsilon(DELTA) + 0.01  # two rounds
    config = Config.from_flat(
        {
            **EXAMPLE,
            "strategy": strategy,
            "privacy.epsilon": budget,
            "num-server-rounds": 6,
            "server.fraction-train": 0.5,
            "diffusion.device": "cpu",
        }
    )
    seen: list[dict[int, dict]] = []
    _, rows = simulate(
        config, 6, num_processes=0, on_round=lambda record: seen.append(record.clients)
    )
    trained_rounds = dict.fromkeys(range(6), 0)
    spent = []
    for number, clients in enumerate(seen):
        for client, row in clients.items():
            assert row["personalized-accuracy"] >= 0  # everyone is served
            if row.get("status") == "privacy budget spent":
                assert trained_rounds[client] == 2
                assert "accuracy-after" not in row
                spent.append((number, client))
            elif "status" in row:
                assert row["status"] == "ok"
                trained_rounds[client] += 1
                assert row["epsilon"] <= budget
    assert spent
    assert max(trained_rounds.values()) == 2
    assert [row["num-failures"] for row in rows] == [0] * 6
    assert all(row["epsilon"] <= budget for row in rows)
    for number, clients in enumerate(seen):
        expected = sum(row.get("status") == "ok" for row in clients.values())
        assert rows[number]["num-clients"] == expected


def test_nobody_learns_from_who_has_spent_its_budget():
    """The server's knowledge after a round in which all have spent theirs is that before."""
    config = Config.from_flat(
        {
            **EXAMPLE,
            "privacy.epsilon": Ledger().after(2.0, 1 / 3, 6).epsilon(DELTA) + 0.01,
            "num-server-rounds": 3,
            "diffusion.device": "cpu",
        }
    )
    states = []
    strategy = make_strategy(config, preflight.preflight(config))
    simulate(
        config,
        4,
        num_processes=0,
        make_strategy=lambda config, spec: strategy,
        on_round=lambda record: states.append(copy_of(strategy.state())),
    )
    assert states[0].keys() == states[2].keys()
    assert all(torch.equal(states[0][name], states[2][name]) for name in states[0])


# What else leaves a client


@pytest.mark.parametrize("settings", [UPDATE, EXAMPLE])
def test_evaluation_is_as_without_privacy(settings: dict):
    evaluated = evaluate_message(message(MessageType.EVALUATE), context(settings)).content
    plain = evaluate_message(message(MessageType.EVALUATE), context(SETTINGS)).content
    # Recalls say which classes a client has.
    known = {k: v for k, v in plain["metrics"].items() if not k.startswith("recall-")}
    assert dict(evaluated["metrics"]) == known
    assert not evaluated.array_records


@pytest.mark.parametrize("settings", [UPDATE, EXAMPLE])
def test_nothing_is_told_of_halves_even_to_a_server_that_asks(settings: dict):
    at = context({**settings, "strategy": "pfedgpa"})
    asks = message(MessageType.TRAIN, common=torch.empty(0))
    assert set(train_message(asks, at).content.array_records) == {"arrays"}
    assert at.state["privacy"]["steps"] == trained_steps(settings)
    asks = message(MessageType.TRAIN, common=torch.empty(0))
    plain = context({**SETTINGS, "strategy": "pfedgpa"})
    assert "extras" in train_message(asks, plain).content.array_records


def trained_steps(settings: dict) -> list[float]:
    return [1.0 if settings is UPDATE else 6.0]


@pytest.mark.parametrize("settings", [UPDATE, EXAMPLE])
def test_the_server_of_pfedgpa_does_not_ask_for_halves(settings: dict):
    spec = ModelSpec.of_state(copy_of(MODEL.state_dict()))
    strategy = make_strategy(Config.from_flat(settings), spec)
    strategy.training_states([0, 1, 2])
    assert strategy.extras(0) == {}
    plain = make_strategy(Config(), spec)
    plain.training_states([0, 1, 2])
    assert plain.extras(0)


def test_a_site_keeps_the_statistics_of_its_own_images(tmp_path: Path):
    data = client_data(Config().data, 5, 1, 4)
    x, y = data.train_inputs.numpy(), data.train_labels.numpy()
    np.savez(tmp_path / "own.npz", x=np.concatenate([x, x]), y=np.concatenate([y, y]))
    own = {"data.dataset": "sites", "data.shape": "1x8x8", "data.num-classes": 10}
    node = {"data-path": str(tmp_path / "own.npz")}
    for settings in (UPDATE, EXAMPLE):
        reported = trained(context({**settings, **own}, node))["metrics"]
        assert not {"image-mean", "image-std", "partition"} & reported.keys()
    assert "image-mean" in trained(context({**SETTINGS, **own}, node))["metrics"]


@pytest.mark.parametrize("settings", [UPDATE, EXAMPLE])
def test_seeded_runs_agree_in_every_digit_and_others_do_not(settings: dict):
    config = {**settings, "num-server-rounds": 1, "diffusion.device": "cpu"}

    def losses(seeded: bool) -> list[float]:
        flat = {**config, "privacy.seeded-noise": seeded}
        _, rows = simulate(Config.from_flat(flat), 2, num_processes=0)
        return [row[name] for row in rows for name in ("personalized-loss", "finetuned-loss")]

    assert losses(True) == losses(True)
    assert losses(False) != losses(False)


# What is refused before a run


def mixing() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64, affine=False), nn.Linear(64, 10))


class Unused(nn.Module):
    """Has a layer that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(2, 2)
        self.layer = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images.flatten(1))


class Attention(Unused):
    """Has a layer that Opacus cannot differentiate image by image."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.MultiheadAttention(2, 1)


@pytest.mark.parametrize(
    ("settings", "model", "said"),
    [
        (UPDATE, mixing, r"1 \(BatchNorm1d\); right would be torch\.nn\.GroupNorm"),
        (EXAMPLE, mixing, r"1 \(BatchNorm1d\); right would be torch\.nn\.GroupNorm"),
        (EXAMPLE, Attention, "Opacus cannot train it: .*MultiheadAttention"),
        (EXAMPLE, Unused, r"idle\.weight has no per-example gradient"),
        (UPDATE, Unused, None),
        (UPDATE, Attention, None),
    ],
)
def test_models_that_cannot_be_trained_privately_are_refused(
    monkeypatch, settings: dict, model, said: str | None
):
    made = model()
    monkeypatch.setattr(preflight, "build_model", lambda *arguments: copy.deepcopy(made))
    config = Config.from_flat(settings)
    if said is None:
        preflight.preflight(config)
        return
    with pytest.raises(ConfigError, match=said):
        preflight.preflight(config)


class Forward(nn.Module):
    """A linear model after a function of the batch."""

    def __init__(self, function: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function
        self.dropout = nn.Dropout(0.5)
        self.layer = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(self.function(self, images.flatten(1)))


BATCH_NORM = torch.nn.functional.batch_norm
MIXING: dict[str, Callable[[nn.Module, torch.Tensor], torch.Tensor]] = {
    "batch_norm": lambda _, x: BATCH_NORM(x, None, None, training=True),
    "batch_norm in training": lambda m, x: (
        BATCH_NORM(x, None, None, training=True) if m.training else x
    ),
    "centred": lambda _, x: x - x.mean(0),
    "scaled by the largest": lambda _, x: x / x.abs().max(),
    "the others, little": lambda _, x: x + 0.01 * x.mean(0),
    "the others, after dropout": lambda m, x: m.dropout(x) - x.mean(0),
    "by the size of the batch": lambda _, x: x / len(x),
    "by the size of the batch, after dropout": lambda m, x: m.dropout(x) / len(x),
    "in another order": lambda _, x: x.flip(0),
}


@pytest.mark.parametrize("function", MIXING)
def test_a_forward_that_mixes_a_batch_is_refused_by_dp_sgd(function: str):
    made = Forward(MIXING[function])
    privacy = Config.from_flat(EXAMPLE).privacy
    (said,) = unfit_layers(lambda: copy.deepcopy(made), DATASETS["digits"], privacy, ())
    assert "must not depend on the rest of its batch, but does: the logits, layer.weight" in said
    assert "torch.nn.GroupNorm or LayerNorm" in said


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.dropout(x),
        lambda _, x: torch.nn.functional.layer_norm(x, (64,)),
        lambda _, x: torch.nn.functional.group_norm(x, 4),
        lambda _, x: x - x.mean(1, keepdim=True),
    ],
)
def test_a_forward_that_keeps_images_apart_is_none(function: Callable):
    made = Forward(function)
    privacy = Config.from_flat(EXAMPLE).privacy
    assert unfit_layers(lambda: copy.deepcopy(made), DATASETS["digits"], privacy, ()) == []


@pytest.mark.parametrize("name", ["cnn-8x8", "cnn-28x28", "cnn-cifar"])
def test_the_cnns_can_be_trained_privately(name: str):
    dataset = {"cnn-28x28": "fashion-mnist", "cnn-cifar": "cifar10"}.get(name, "digits")
    settings = {**EXAMPLE, "model.name": name, "data.dataset": dataset}
    before = torch.get_rng_state()
    preflight.preflight(Config.from_flat(settings))
    assert torch.equal(torch.get_rng_state(), before)


def test_resnet18_is_refused():
    config = Config.from_flat({**UPDATE, "model.name": "resnet18"})
    with pytest.raises(ConfigError, match=r"bn1 \(BatchNorm2d\)"):
        preflight.preflight(config)


@pytest.mark.parametrize("settings", [UPDATE, EXAMPLE])
def test_a_missing_opacus_is_said_by_server_and_client(monkeypatch, settings: dict):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = r'the package opacus is not installed; right would be pip install "\.\[privacy\]"'
    with pytest.raises(ConfigError, match=said):
        preflight.preflight(Config.from_flat(settings))
    with pytest.raises(ConfigError, match=said):
        trained(context(settings))
    preflight.preflight(Config())
    trained(context(SETTINGS))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({**UPDATE, "privacy.epsilon": 0.0}, r"privacy\.epsilon = 0\.0: .* on each upload"),
        ({**UPDATE, "strategy": "fedpac"}, "right would be pfedgpa, local, fedavg, fedavg-ft"),
        ({**EXAMPLE, "strategy": "fedprox"}, "right would be pfedgpa, local, fedavg, fedavg-ft"),
        ({**EXAMPLE, "client.class-prior": True}, r"client\.class-prior = true"),
        ({**EXAMPLE, "client.precision": "bf16"}, 'right would be "fp32"'),
        ({**EXAMPLE, "resume-from": "1"}, "resume-from"),
        ({**EXAMPLE, "privacy.noise-multiplier": 0.0}, r"privacy\.noise-multiplier"),
        ({**EXAMPLE, "privacy.delta": 1.0}, r"privacy\.delta"),
    ],
)
def test_settings_that_break_the_promise_are_refused(settings: dict, said: str):
    with pytest.raises(ConfigError, match=said):
        Config.from_flat(settings)


def test_update_mode_goes_with_a_class_prior_and_half_precision():
    Config.from_flat({**UPDATE, "client.class-prior": True, "client.precision": "bf16"})


def test_a_plan_has_as_many_steps_as_plain_training():
    assert sampling_plan(30, ClientConfig(batch_size=10, local_epochs=5)) == (1 / 3, 15)
    assert sampling_plan(31, ClientConfig(batch_size=10, local_epochs=1)) == (1 / 4, 4)
    assert sampling_plan(3, ClientConfig(batch_size=10, local_epochs=2)) == (1.0, 2)


def test_a_budget_that_is_too_small_for_one_round_ends_the_run(tmp_path: Path):
    config = Config.from_flat({**EXAMPLE, "privacy.epsilon": 0.1})
    strategy = make_strategy(config, preflight.preflight(config))
    strategy.record.server_round = 1
    strategy.record.note(0, status="privacy budget spent", epsilon=0.0)
    folder = RunFolder(tmp_path / "run", config)
    end = RoundEnd(strategy, folder, Tracking(folder))
    with pytest.raises(RunError, match="privacy budget spent"):
        end(1, ArrayRecord())


@pytest.mark.parametrize("epsilon", dp.EPSILONS["example"])
def test_columns_of_the_benchmark_spend_the_epsilon_of_their_headings(epsilon: float):
    config = Config.from_flat({**dp.CLIENT, **dp.settings("example", epsilon, 10, 600)})
    noise, rate, steps = cost_of_round(config.privacy, config.client, 600)
    spent = Ledger().after(noise, rate, 10 * steps).epsilon(config.privacy.delta)
    assert 0.98 * epsilon <= spent <= epsilon


def test_the_log_of_a_round_has_the_largest_epsilon(monkeypatch, caplog, tmp_path: Path):
    config = Config.from_flat(EXAMPLE)
    strategy = make_strategy(config, preflight.preflight(config))
    strategy.record.server_round = 1
    strategy.record.trained(0, {"num-examples": 3, "epsilon": 1.5}, 10)
    strategy.record.note(1, status="privacy budget spent", epsilon=2.25)
    folder = RunFolder(tmp_path / "run", config)
    end = RoundEnd(strategy, folder, Tracking(folder))
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="flwr"):
        end._write_rows(1.0)
    assert caplog.messages[-1].endswith("; epsilon 2.25")
