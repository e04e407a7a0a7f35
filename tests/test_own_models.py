"""Models of all kinds that people bring, in whole runs: they train well or are refused before."""

import copy
import math
import random
import sys
import types
from collections.abc import Callable

import numpy as np
import pytest
import torch
from digits_client import context, message
from flwr.app import ArrayRecord, Message, RecordDict
from simulated_grid import SimulatedGrid, upload
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from client_app.messages import train_message
from client_app.node import NodeError
from pfedgpa_app.config import Config, ConfigError, DatasetInfo
from pfedgpa_app.data import ImageStats
from pfedgpa_app.model_spec import ModelSpec, find_head
from pfedgpa_app.models import build_model
from pfedgpa_app.parameters import StateDict
from pfedgpa_app.preflight import preflight
from pfedgpa_app.randomness import make_generator
from pfedgpa_app.rounds import RoundRecord, Row
from pfedgpa_app.strategies import STRATEGY_INFO
from pfedgpa_app.training import train
from server_app.simulation import simulate
from server_app.strategies import ClientwiseFedAvg, PFedGPA

INFO = DatasetInfo((1, 6, 6), 3)
NUM_CLIENTS = 3
SETTINGS = {
    "data.dataset": "brought:load",
    "data.shape": "1x6x6",
    "data.num-classes": 3,
    "data.partition": "iid",
    "data.train-samples": 0,
    "model.name": "brought:model",
    "num-server-rounds": 2,
    "client.local-epochs": 1,
    "client.learning-rate": 0.1,
    "diffusion.train-steps": 10,
    "client.device": "cpu",
    "diffusion.device": "cpu",
}
Build = Callable[[DatasetInfo], nn.Module]


def pictures() -> tuple[np.ndarray, np.ndarray]:
    """Return pictures of three classes, each about a mean of its own."""
    rng = np.random.default_rng(5)
    labels = np.arange(120) % 3
    means = rng.normal(size=(3, 1, 6, 6))
    return (means[labels] + 0.5 * rng.normal(size=(120, 1, 6, 6))).astype(np.float32), labels


@pytest.fixture
def brought(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Give the module that a user writes; its ``model`` is set by the tests."""
    module = types.ModuleType("brought")
    module.load = lambda root: pictures()
    monkeypatch.setitem(sys.modules, "brought", module)
    monkeypatch.setenv("PFEDGPA_TRUST", "brought")
    return module


@pytest.fixture
def run(brought: types.ModuleType) -> Callable[..., tuple[ClientwiseFedAvg, list[Row]]]:
    """Run a federation of a model in this process; every client must have trained each round."""

    def run(model: Build, strategy: str, **settings) -> tuple[ClientwiseFedAvg, list[Row]]:
        def all_trained(record: RoundRecord) -> None:
            assert {row["status"] for row in record.clients.values()} == {"ok"}

        brought.model = model
        config = Config.from_flat({**SETTINGS, "strategy": strategy, **settings})
        return simulate(config, NUM_CLIENTS, num_processes=0, on_round=all_trained)

    return run


class Net(nn.Module):
    """A body and a head, registered in this order."""

    def __init__(self, info: DatasetInfo) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(info.shape), 12), nn.Tanh())
        self.head = nn.Linear(12, info.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))


class Viewing(nn.Module):
    """Flattens by ``view``, which wants contiguous tensors."""

    def __init__(self, info: DatasetInfo) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.head = nn.Linear(4 * 36, info.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(images)).view(-1, 4 * 36))


class Remembering(Net):
    """Keeps a tensor of the graph, so that it cannot be copied once it was trained."""

    def forward(self, images: Tensor) -> Tensor:
        self.features = self.body(images)
        return self.head(self.features)


class OldWeightNorm(Net):
    """Cannot be copied even before, since its weight is computed."""

    def __init__(self, info: DatasetInfo) -> None:
        super().__init__(info)
        nn.utils.weight_norm(self.body[1])


class HeadFirst(Net):
    """Registers its head before its body."""

    def __init__(self, info: DatasetInfo) -> None:
        super().__init__(info)
        body = self.body
        del self.body
        self.body = body


class Unused(Net):
    """Has a last layer that takes no part."""

    def __init__(self, info: DatasetInfo) -> None:
        super().__init__(info)
        self.projector = nn.Linear(12, 5)


class Tied(nn.Module):
    """Has a head whose weight is also that of an earlier layer."""

    def __init__(self, info: DatasetInfo) -> None:
        super().__init__()
        self.prototypes = nn.Linear(12, info.num_classes, bias=False)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(info.shape), 12), nn.Tanh())
        self.head = nn.Linear(12, info.num_classes, bias=False)
        self.head.weight = self.prototypes.weight

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(images)
        likely = self.prototypes(features).softmax(dim=-1)
        return self.head(features + likely @ self.head.weight)


class FrozenBody(Net):
    """Has a body that is not trained."""

    def __init__(self, info: DatasetInfo) -> None:
        super().__init__(info)
        self.body.requires_grad_(False)


class FrozenHead(Net):
    """Has a head that is not trained."""

    def __init__(self, info: DatasetInfo) -> None:
        super().__init__(info)
        self.head.requires_grad_(False)


class Masked(Net):
    """Has an infinite buffer, a constant one, and a frozen weight with a value that is none."""

    def __init__(self, info: DatasetInfo) -> None:
        super().__init__(info)
        self.register_buffer("mask", torch.tensor([0.0] * 11 + [-math.inf]))
        self.register_buffer("encoding", torch.linspace(0, 1, 12, dtype=torch.float64))
        self.unknown = nn.Parameter(torch.tensor([math.nan]), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(images) + self.encoding.float()
        return self.head(features * (features + self.mask).softmax(dim=-1))


class Spectral(Net):
    """Has a layer with spectral normalization, whose buffers follow from its weight."""

    def __init__(self, info: DatasetInfo) -> None:
        super().__init__(info)
        spectral_norm(self.body[1])


class OldSpectral(Net):
    """The same by torch's older function."""

    def __init__(self, info: DatasetInfo) -> None:
        super().__init__(info)
        nn.utils.spectral_norm(self.body[1])


class Adapted(nn.Module):
    """A pretrained body with low-rank adapters (LoRA, arXiv 2106.09685) and a head of its own."""

    def __init__(self, info: DatasetInfo) -> None:
        super().__init__()
        self.body = nn.Linear(math.prod(info.shape), 12)
        with torch.no_grad():  # what a file of weights would have
            self.body.weight.copy_(torch.linspace(-1, 1, self.body.weight.numel()).view(12, -1))
        self.body.requires_grad_(False)
        self.down = nn.Linear(math.prod(info.shape), 2, bias=False)
        self.up = nn.Linear(2, 12, bias=False)
        nn.init.zeros_(self.up.weight)
        self.head = nn.Linear(12, info.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        inputs = images.flatten(1)
        return self.head(torch.tanh(self.body(inputs) + self.up(self.down(inputs))))


def states_of(strategy: ClientwiseFedAvg) -> list[StateDict]:
    """Return all models that a server has for its clients, and its average."""
    return [strategy.average, *map(strategy.evaluation_state, range(NUM_CLIENTS))]


@pytest.mark.parametrize(
    ("model", "strategy"),
    [
        (Viewing, "pfedgpa"),
        (Unused, "pfedgpa"),
        (Masked, "pfedgpa"),
        (Remembering, "ditto"),  # trains two models, and so copies
        (OldWeightNorm, "ditto"),
        (Unused, "fedrep"),  # finds the head
        (Tied, "fedrep"),
    ],
)
def test_what_tutorials_do_trains(run, model: Build, strategy: str):
    _, rows = run(model, strategy, **{"num-server-rounds": 6})
    assert rows[-1]["finetuned-loss"] < 0.95 * rows[0]["finetuned-loss"]


HEADS = [name for name, info in STRATEGY_INFO.items() if info.head]


@pytest.mark.parametrize("strategy", HEADS)
def test_the_head_is_the_same_wherever_it_was_registered(run, strategy: str):
    """Each client calls the classes otherwise: a body can be shared, and no head."""
    settings = {"data.shift": "permuted-labels", "data.shift-by": "client"}
    last, first = (
        run(model, strategy, **settings)[1][-1]["finetuned-loss"] for model in (Net, HeadFirst)
    )
    assert first == pytest.approx(last, rel=1e-4)


@pytest.mark.parametrize(
    ("model", "layer", "names"),
    [
        (Net, "head", ["head.weight", "head.bias"]),
        (HeadFirst, "head", ["head.weight", "head.bias"]),
        (Unused, "head", ["head.weight", "head.bias"]),
        (Tied, "head", ["prototypes.weight", "head.weight"]),
        (lambda info: nn.Sequential(nn.Flatten(), nn.Linear(36, 3), nn.LogSoftmax(1)), "1", None),
        (lambda info: nn.Sequential(nn.Conv2d(1, 3, 6), nn.Flatten()), "0", None),
    ],
)
def test_the_head_makes_the_logits(model: Build, layer: str, names: list[str] | None):
    head = find_head(model(INFO), INFO)
    assert head is not None
    assert head.layer == layer
    assert list(head.names) == (names or [f"{layer}.weight", f"{layer}.bias"])


def test_a_model_of_one_layer_is_its_head():
    head = find_head(nn.Linear(30, 3), DatasetInfo((30,), 3))
    assert head == ("", ("weight", "bias"), (3, 30), ("weight",))


class Scaled(Net):
    """As a CLIP model: a scale of its own follows the head."""

    def __init__(self, info: DatasetInfo) -> None:
        super().__init__(info)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * self.scale


class NormedHead(Net):
    """Normalizes its logits."""

    def __init__(self, info: DatasetInfo) -> None:
        super().__init__(info)
        self.norm = nn.LayerNorm(info.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(super().forward(images))


class Gated(Net):
    """Multiplies its logits by what a second layer says."""

    def __init__(self, info: DatasetInfo) -> None:
        super().__init__(info)
        self.gate = nn.Linear(12, 1)

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(images)
        return self.head(features) * self.gate(features).sigmoid()


class TwoHeads(Net):
    """Adds the logits of two heads."""

    def __init__(self, info: DatasetInfo) -> None:
        super().__init__(info)
        self.second = nn.Linear(12, info.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(images)
        return self.head(features) + self.second(features)


class AdaptedHead(Net):
    """Has a head that is a module of its own, with a low-rank adapter."""

    class Head(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.down = base, nn.Linear(12, 2)
            self.up = nn.Linear(2, base.out_features)

        def forward(self, features: Tensor) -> Tensor:
            return self.base(features) + self.up(self.down(features))

    def __init__(self, info: DatasetInfo) -> None:
        super().__init__(info)
        self.head = self.Head(self.head)


class Functional(Net):
    """Makes its logits without a layer."""

    def __init__(self, info: DatasetInfo) -> None:
        super().__init__(info)
        self.weights = nn.ParameterList([self.head.weight.data.T.clone()])
        del self.head

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images) @ self.weights[0]


class Twice(Net):
    """Calls its head a second time, for something else."""

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(images)
        logits = self.head(features)
        return logits + 0 * self.head(0 * features)


class Divided(Net):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) / 0.2


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (Scaled, {"head.weight", "head.bias", "scale"}),
        (NormedHead, {"head.weight", "head.bias", "norm.weight", "norm.bias"}),
        (
            AdaptedHead,
            {f"head.{e}.{k}" for e in ("base", "down", "up") for k in ("weight", "bias")},
        ),
        (Divided, {"head.weight", "head.bias"}),
        (Gated, None),
        (TwoHeads, None),
        (Functional, None),
        (Twice, None),
    ],
)
def test_what_is_no_plain_head_is_whole_or_none(model: Build, names: set[str] | None):
    head = find_head(build(model), INFO)
    if names is None:
        assert head is None or head.size == (0, 0)
        return
    assert head is not None
    assert set(head.names) == names
    assert head.weights == (), "adding to it would not add to the logits"


def test_a_parametrized_head_is_kept_whole_and_replaced_by_nobody(brought: types.ModuleType):
    def normed(info: DatasetInfo) -> nn.Module:
        model = Net(info)
        weight_norm(model.head)
        return model

    head = find_head(normed(INFO), INFO)
    assert head is not None
    assert set(head.names) == {
        "head.bias",
        "head.parametrizations.weight.original0",
        "head.parametrizations.weight.original1",
    }
    assert head.size == (3, 12)
    brought.model = normed
    preflight(Config.from_flat({**SETTINGS, "strategy": "fedpac"}))
    for strategy in ("floco", "fedrod"):
        with pytest.raises(ConfigError, match="trained float32 parameter, not parametrized"):
            preflight(Config.from_flat({**SETTINGS, "strategy": strategy}))


def linear(info: DatasetInfo) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 3))


@pytest.mark.parametrize(
    ("model", "strategy"),
    [
        *((model, "fedrep") for model in (FrozenBody, FrozenHead, linear, Tied)),
        *((model, "fedpac") for model in (FrozenBody, FrozenHead, linear)),
        (linear, "fedper"),  # which then shares nothing
    ],
)
def test_a_phase_with_nothing_to_train_is_passed_over(run, model: Build, strategy: str):
    _, rows = run(model, strategy)
    assert rows[-1]["finetuned-loss"] < rows[0]["finetuned-loss"]


PRIVATE = {"privacy.mode": "update", "privacy.epsilon": 50.0, "privacy.seeded-noise": True}


@pytest.mark.parametrize("strategy", ["fedavg", "pfedgpa", "local"])
def test_what_does_not_train_gets_no_noise(run, strategy: str):
    server, _ = run(Masked, strategy, **PRIVATE)
    initial = server.global_model.spec.initial
    for state in states_of(server):
        assert torch.equal(state["mask"], initial["mask"])
        assert torch.equal(state["encoding"], initial["encoding"])
        assert bool(state["unknown"].isnan().all())
        assert not torch.equal(state["head.weight"], initial["head.weight"])


def test_a_tied_tensor_has_one_noise(run):
    server, _ = run(Tied, "local", **PRIVATE)
    for client in range(NUM_CLIENTS):
        state = server.evaluation_state(client)
        assert torch.equal(state["head.weight"], state["prototypes.weight"])


@pytest.mark.parametrize("strategy", ["pfedgpa", "pfedhn", "ifca", "fedamp", "floco", "fedrod"])
def test_a_tied_tensor_stays_one(run, strategy: str):
    server, _ = run(Tied, strategy)
    for state in states_of(server):
        assert torch.equal(state["head.weight"], state["prototypes.weight"])


@pytest.mark.parametrize(
    ("model", "strategy", "settings"),
    [
        (Spectral, "fedavg", {"server.momentum": 0.9}),
        (Spectral, "fedavg", PRIVATE),
        (Spectral, "pfedgpa", {"server.momentum": 0.9}),
        (Spectral, "pfedhn", {}),
        (Spectral, "ifca", {}),
        (Spectral, "fedpac", {}),
        (OldSpectral, "fedavg", {}),
        (OldSpectral, "pfedgpa", {}),
    ],
)
def test_singular_vectors_fit_the_weight_that_clients_are_sent(
    run, model: Build, strategy: str, settings: dict
):
    """Sigma, by which the weight is divided in evaluation, is its largest singular value."""
    rounds = {"num-server-rounds": 4, "data.partition": "pathological"}
    server, _ = run(model, strategy, **rounds, **{"data.classes-per-client": 1}, **settings)
    names = {
        Spectral: [f"body.1.parametrizations.weight.{n}" for n in ("original", "0._u", "0._v")],
        OldSpectral: [f"body.1.weight_{n}" for n in ("orig", "u", "v")],
    }
    for state in states_of(server):
        weight, u, v = (state[name].double() for name in names[model])
        true = float(torch.linalg.matrix_norm(weight, 2))
        # Of vectors at rest to a thousandth, sigma is right to the square of about that.
        assert float(u @ weight @ v) == pytest.approx(true, rel=0.02)


class Fine(Net):
    """Is right; the kinds below change one thing each."""


class TwoOutputs(Net):
    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        logits = super().forward(images)
        return (logits, logits) if self.training else logits


class Words(nn.Module):
    def __init__(self, info: DatasetInfo) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 4, sparse=True)
        self.head = nn.Linear(4, info.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.words(images.flatten(1).abs().long().clamp(max=8)).mean(dim=1))


class Squeezing(Net):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).squeeze()


class Normed(Net):
    def __init__(self, info: DatasetInfo) -> None:
        super().__init__(info)
        self.body.append(nn.BatchNorm1d(12))


class Detached(Net):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).detach()


class AllFrozen(Net):
    def __init__(self, info: DatasetInfo) -> None:
        super().__init__(info)
        self.requires_grad_(False)


class ExtraState(Net):
    def get_extra_state(self) -> dict[str, float]:
        return {"scale": 1.0}

    def set_extra_state(self, state: dict[str, float]) -> None:
        pass


class SparseBuffer(Net):
    def __init__(self, info: DatasetInfo) -> None:
        super().__init__(info)
        self.register_buffer("graph", torch.eye(12).to_sparse())


class Unseeded(Net):
    def __init__(self, info: DatasetInfo) -> None:
        super().__init__(info)
        rng = np.random.default_rng()
        self.head.bias.data += torch.from_numpy(rng.normal(size=3)).float()


class Infinite(Net):
    def __init__(self, info: DatasetInfo) -> None:
        super().__init__(info)
        self.head.bias.data[0] = math.inf


class Renaming(Net):
    def __init__(self, info: DatasetInfo) -> None:
        super().__init__(info)
        self.register_state_dict_post_hook(
            lambda module, state, prefix, metadata: (
                [state.__setitem__(f"net.{name}", state.pop(name)) for name in list(state)] and None
            )
        )


class Doubting(Net):
    """Fails in training where its autocast type is bfloat16."""

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(images)
        if self.training and features.dtype == torch.bfloat16:
            raise RuntimeError("not implemented for 'BFloat16'")
        return self.head(features)


@pytest.mark.parametrize(
    ("model", "settings", "said"),
    [
        (TwoOutputs, {}, r"gave tuple; right would be \(2, 3\), one logit per class"),
        (Words, {}, r"words\.weight has a sparse gradient; right would be sparse=False"),
        (Squeezing, {}, r"1 example gave an output of shape \(3,\)"),
        (Normed, {"client.batch-size": 1}, r"client\.batch-size = 1, .*; right would be 2"),
        (Normed, {"data.train-samples": 1}, r"data\.train-samples = 1, .*; right would be 2"),
        (Detached, {}, "the loss depends on no trained parameter"),
        (AllFrozen, {}, "there is nothing to train"),
        (ExtraState, {}, "_extra_state is of type dict"),
        (SparseBuffer, {}, "graph is a tensor of layout torch.sparse_coo"),
        (Unseeded, {}, r"differ in head\.bias; right would be values drawn from the global"),
        (Renaming, {}, r"its state_dict has net\..*, but no parameter"),
        (Infinite, {}, r"head\.bias has values that are not finite"),
        (Doubting, {"client.precision": "bf16"}, 'client.precision = "bf16", .*BFloat16'),
    ],
)
def test_what_cannot_train_is_refused_before_the_run(
    brought: types.ModuleType, model: Build, settings: dict, said: str
):
    brought.model = Fine
    preflight(Config.from_flat({**SETTINGS, **settings}))
    brought.model = model
    with pytest.raises(ConfigError, match=r'model\.name = "brought:model": ') as caught:
        preflight(Config.from_flat({**SETTINGS, **settings}))
    assert len(caught.value.problems) == 1
    assert caught.match(said)


def test_buffers_of_the_data_are_no_private_upload(brought: types.ModuleType):
    class Averaging(Net):
        def __init__(self, info: DatasetInfo) -> None:
            super().__init__(info)
            self.register_buffer("center", torch.zeros(12))

        def forward(self, images: Tensor) -> Tensor:
            features = self.body(images)
            if self.training:
                self.center += 0.1 * (features.detach().mean(dim=0) - self.center)
            return self.head(features - self.center)

    brought.model = Averaging
    private = {"privacy.mode": "example", "privacy.noise-multiplier": 1.0}
    with pytest.raises(
        ConfigError, match="since they depend on the examples without noise: center"
    ):
        preflight(Config.from_flat({**SETTINGS, **private}))


def test_a_frozen_weight_that_follows_others_is_not_fixed(run):
    class Teacher(Net):
        """Its frozen head is a moving average of the other, as a momentum encoder is."""

        def __init__(self, info: DatasetInfo) -> None:
            super().__init__(info)
            self.teacher = copy.deepcopy(self.head).requires_grad_(False)
            self.frozen = nn.Linear(2, 2).requires_grad_(False)

        def forward(self, images: Tensor) -> Tensor:
            if self.training:
                self.teacher.weight.data.lerp_(self.head.weight.data, 0.1)
            return super().forward(images)

    server, _ = run(Teacher, "pfedgpa")
    spec = server.global_model.spec
    assert spec.fixed == {"frozen.weight", "frozen.bias", "teacher.bias"}
    assert not torch.equal(server.average["teacher.weight"], spec.initial["teacher.weight"])


class Scheduled(Net):
    """Counts its steps in a float buffer, beside spectral normalization."""

    def __init__(self, info: DatasetInfo) -> None:
        super().__init__(info)
        spectral_norm(self.body[1])
        self.register_buffer("warmth", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.warmth.add_(0.01).clamp_(max=1.0)
        return super().forward(images)


@pytest.mark.parametrize("strategy", ["pfedgpa", "local"])
def test_the_server_takes_no_steps_of_a_schedule(run, strategy: str):
    server, _ = run(Scheduled, strategy)
    steps = 2 * 4  # rounds, and batches of ten among the 36 or so examples of a client
    for client in range(NUM_CLIENTS):
        warmth = float(server.evaluation_state(client)["warmth"])
        assert 0.01 * steps - 0.02 <= warmth <= 0.01 * steps + 0.02


def test_wide_layers_get_their_singular_vectors_too():
    model = nn.Sequential(spectral_norm(nn.Linear(300, 200)), spectral_norm(nn.Conv2d(8, 9, 3)))
    spec = ModelSpec.of(model)
    state = copy.deepcopy(spec.initial)
    rng = make_generator(3)
    for name, tensor in state.items():
        if name.endswith("original"):
            tensor.copy_(torch.randn(tensor.shape, generator=rng))
    for number in (0, 1):
        prefix = f"{number}.parametrizations.weight."
        refreshed = spec.refreshed(state)
        weight = refreshed[f"{prefix}original"].double().flatten(1)
        u, v = (refreshed[f"{prefix}0._{each}"].double() for each in "uv")
        expected = torch.linalg.svdvals(weight)[0]
        torch.testing.assert_close(u @ weight @ v, expected, rtol=1e-6, atol=0.0)
        assert torch.equal(refreshed[f"{prefix}original"], state[f"{prefix}original"])


def build(model: Build) -> nn.Module:
    torch.manual_seed(0)
    return model(INFO)


class Noisy(Net):
    """Draws from NumPy's and Python's global generators, when it is built and when it trains."""

    def __init__(self, info: DatasetInfo) -> None:
        super().__init__(info)
        drawn = np.random.normal(size=3) + random.gauss(0, 1)  # noqa: NPY002
        self.head.bias.data = torch.from_numpy(drawn).float()

    def forward(self, images: Tensor) -> Tensor:
        noise = np.random.normal() + random.gauss(0, 1)  # noqa: NPY002
        return super().forward(images + 0.1 * noise)


def test_other_generators_than_torch_s_follow_the_seed(run):
    def losses(seed: int) -> list[float]:
        _, rows = run(Noisy, "fedavg", seed=seed)
        return [row["personalized-loss"] for row in rows]

    before = np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    first = losses(1)
    np.random.normal(size=7)  # noqa: NPY002
    random.random()
    assert losses(1) == first
    assert losses(2) != first
    assert before[1] != random.getstate()  # what this test drew, and nothing else


class TestAdapters:
    """A pretrained body with adapters: the settings of somebody who fine-tunes with LoRA."""

    def test_only_the_adapters_travel_if_it_is_said_so(self, run):
        def bytes_of(send_frozen: bool) -> tuple[list[Row], ClientwiseFedAvg]:
            server, rows = run(Adapted, "pfedgpa", **{"model.send-frozen": send_frozen})
            return rows, server

        (all_rows, everything), (few_rows, few) = bytes_of(True), bytes_of(False)
        assert [r["personalized-loss"] for r in all_rows] == [
            r["personalized-loss"] for r in few_rows
        ]
        for left, right in zip(states_of(everything), states_of(few), strict=True):
            assert left.keys() == right.keys()
            assert all(torch.equal(left[name], right[name]) for name in left)
        body = 4 * (36 * 12 + 12)
        for name in ("bytes-up", "bytes-down"):
            saved = all_rows[1][name] - few_rows[1][name]
            messages = NUM_CLIENTS * (2 if name == "bytes-down" else 1)
            # Each array has a header beside its numbers.
            assert messages * body <= saved <= messages * (body + 2 * 300)

    @pytest.mark.parametrize("strategy", STRATEGY_INFO)
    def test_the_body_stays_bit_by_bit_whether_it_is_sent_or_not(self, run, strategy: str):
        momentum = {"server.momentum": 0.5} if strategy != "local" else {}
        losses = []
        for send_frozen in (False, True):
            settings = {"model.send-frozen": send_frozen, **momentum}
            server, rows = run(Adapted, strategy, **settings)
            losses.append([row["personalized-loss"] for row in rows])
            initial = server.global_model.spec.initial
            for state in states_of(server):
                for name in ("body.weight", "body.bias"):
                    assert torch.equal(state[name], initial[name])
        assert losses[0] == losses[1]
        if not server.clients_keep_parts:
            head = states_of(server)[-1]["head.weight"]
            assert not torch.equal(head, initial["head.weight"])

    def test_a_site_with_another_body_is_told_so(self, monkeypatch: pytest.MonkeyPatch, brought):
        settings = {**SETTINGS, "model.send-frozen": False}
        brought.model = Adapted
        spec = preflight(Config.from_flat(settings))
        sent = {name: t for name, t in spec.initial.items() if name not in spec.fixed}
        request = message("train")
        request.content["arrays"] = ArrayRecord(sent)
        request.content["config"]["fixed-weights"] = spec.fingerprint

        def train_here():
            return train_message(request, context(0, **settings))

        assert set(train_here().content["arrays"]) == set(sent)

        def other(info: DatasetInfo) -> nn.Module:
            model = Adapted(info)
            model.body.weight.data[0, 0] += 1
            return model

        brought.model = other
        with pytest.raises(NodeError, match=r"frozen weights .* not those of the server"):
            train_here()

    def test_who_changes_the_body_loses_the_round(self):
        spec = ModelSpec.of(build(Adapted))
        layout = spec.layout()
        layout.check(spec.initial)
        changed = {**spec.initial, "body.bias": spec.initial["body.bias"] + 1}
        with pytest.raises(ValueError, match=r"body\.bias does not train, and was changed"):
            layout.check(changed)


def test_a_model_tells_a_strategy_what_trains():
    spec = ModelSpec.of(build(Tied))
    assert spec.aliases == {"head.weight": "prototypes.weight"}
    layout = spec.layout(["head.*"])
    assert [entry.name for entry in layout.generated] == ["prototypes.weight"]
    vector, rest = layout.split(spec.initial)
    merged = layout.merge(vector + 1, rest)
    assert torch.equal(merged["head.weight"], spec.initial["head.weight"] + 1)
    assert merged["head.weight"] is merged["prototypes.weight"]


@pytest.mark.parametrize(("flatten", "works"), [(torch.flatten, True), (Tensor.view, False)])
def test_channels_last_is_for_models_that_work_with_it(flatten: Callable, works: bool):
    class Convolutions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)
            self.head = nn.Linear(16, 3)

        def forward(self, images: Tensor) -> Tensor:
            features = self.second(self.first(images))
            return self.head(flatten(features, 1 if works else (-1, 16)))

    model, labels = Convolutions(), torch.arange(8) % 3
    images = torch.randn(8, 1, 6, 6, generator=make_generator(1))
    stats = ImageStats(torch.zeros(1), torch.ones(1))
    before = copy.deepcopy(model.state_dict())
    train(model, images, labels, stats, Config().client, make_generator(2))
    weight = model.second.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == works
    assert not torch.equal(weight, before["second.weight"])


def test_build_model_is_the_same_however_often_it_is_called(brought: types.ModuleType):
    brought.model = Noisy
    states = [build_model("brought:model", INFO, 3).state_dict() for _ in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(
        states[0]["head.bias"], build_model("brought:model", INFO, 4).state_dict()["head.bias"]
    )


def test_a_gradient_that_no_tensor_needs_is_no_fault():
    model = FrozenBody(INFO)
    model.head.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    images, labels = torch.randn(4, 1, 6, 6, generator=make_generator(1)), torch.zeros(4).long()
    stats = ImageStats(torch.zeros(1), torch.ones(1))
    train(model, images, labels, stats, Config().client, make_generator(2))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert functional.cross_entropy(model(images), labels).requires_grad is False


def test_a_flower_app_gives_its_model_to_the_strategy():
    model = build(FrozenBody)
    initial = copy.deepcopy(model.state_dict())

    def trained(number: int) -> Callable[[Message], RecordDict]:
        def answer(request: Message) -> RecordDict:
            state = request.content["arrays"].to_torch_state_dict()
            state["head.weight"] += number
            state["body.1.bias"] += number == 3  # who trains what is frozen
            return upload({name: tensor.numpy() for name, tensor in state.items()})

        return answer

    grid = SimulatedGrid({number: trained(number) for number in range(1, 4)})
    strategy = PFedGPA(model=model, fraction_evaluate=0.0)
    strategy.start(grid, initial_arrays=ArrayRecord(initial), num_rounds=2)
    assert "body.1.bias does not train" in strategy.record.clients[2]["status"]
    assert {strategy.record.clients[client]["status"] for client in (0, 1)} == {"ok"}
    for client in (0, 1):
        state = strategy.evaluation_state(client)
        assert torch.equal(state["body.1.weight"], initial["body.1.weight"])
        assert not torch.equal(state["head.weight"], initial["head.weight"])


def test_what_a_private_client_did_not_train_stays_as_it_was_received(brought: types.ModuleType):
    class Hoarding(Net):
        """Keeps a picture in a buffer, though not one of those on which a model is tried."""

        def __init__(self, info: DatasetInfo) -> None:
            super().__init__(info)
            self.register_buffer("picture", torch.zeros(info.shape))

        def forward(self, images: Tensor) -> Tensor:
            if self.training and bool(images.any()):
                self.picture = images[0].detach().clone()
            return super().forward(images)

    brought.model = Hoarding
    received = build(Hoarding).state_dict()
    for mode in ({"privacy.mode": "example"}, PRIVATE):
        settings = {**SETTINGS, **mode}
        preflight(Config.from_flat(settings))  # which does not see it
        request = message("train")
        request.content["arrays"] = ArrayRecord(received)
        reply = train_message(request, context(0, **settings))
        uploaded = reply.content["arrays"].to_torch_state_dict()
        assert torch.equal(uploaded["picture"], received["picture"])
        assert not torch.equal(uploaded["head.weight"], received["head.weight"])


def test_a_model_that_takes_the_tensors_it_is_given_moves_no_anchor(run):
    class Assigning(Net):
        def load_state_dict(self, state_dict, strict=True, assign=False):
            return super().load_state_dict(state_dict, strict=strict, assign=True)

    settings = {"fedprox.mu": 5.0}
    losses = [run(m, "fedprox", **settings)[1][-1]["finetuned-loss"] for m in (Net, Assigning)]
    assert losses[0] == losses[1]


def test_a_step_without_gradient_ends_no_training():
    class Skipping(FrozenBody):
        """Leaves out all that trains, in every second step."""

        steps = 0

        def forward(self, images: Tensor) -> Tensor:
            self.steps += self.training
            logits = super().forward(images)
            return logits.detach() if self.steps % 2 else logits

    model = Skipping(INFO)
    before = copy.deepcopy(model.head.weight)
    images, labels = torch.randn(30, 1, 6, 6, generator=make_generator(1)), torch.arange(30) % 3
    stats = ImageStats(torch.zeros(1), torch.ones(1))
    train(model, images, labels, stats, Config().client, make_generator(2))
    assert model.steps == 3 * Config().client.local_epochs
    assert not torch.equal(model.head.weight, before)


def test_models_that_draw_from_other_generators_are_no_graph(brought: types.ModuleType):
    brought.model = Noisy
    config = Config.from_flat({**SETTINGS, "client.engine": "vmap", "strategy": "fedavg"})
    with pytest.raises(ConfigError, match="random numbers of NumPy or Python"):
        preflight(config, one_process=True)
