"""Training of many clients as one graph, held against that of one after the other."""

import copy
import multiprocessing
from dataclasses import replace
from functools import partial

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor, nn

from benchmarks import vmap as benchmark
from client_app import batched
from client_app.messages import train_message
from client_app.methods import METHODS, Fit, Method, Task
from pfedgpa_app.config import DATASETS, Config
from pfedgpa_app.data import ClientData, ImageStats
from pfedgpa_app.models import build_model
from pfedgpa_app.parameters import copy_of
from pfedgpa_app.randomness import make_generator
from pfedgpa_app.strategies import PLAIN_STRATEGIES
from server_app.simulation import PoolGrid, simulate

DIGITS = DATASETS["digits"]
SIZES = (10, 1, 23, 9, 4, 16)
"""Numbers of examples; with batches of four, the last ones have 1 to 5."""
SETTINGS = {
    "model.name": "own_models:smooth",
    "client.local-epochs": 4,
    "client.batch-size": 4,
    "client.learning-rate": 0.03,
    "client.momentum": 0.9,
    "client.weight-decay": 0.01,
    "client.device": "cpu",
}


def make_task(number: int, device: str = "cpu", **settings) -> Task:
    """Return the task of a client with its own data, normalization, prior and parameters."""
    config = Config.from_flat({**SETTINGS, **settings})
    draw = make_generator(1, "data", number)
    images = torch.randint(256, (SIZES[number], *DIGITS.shape), generator=draw).byte()
    labels = torch.randint(10, (SIZES[number],), generator=draw)
    stats = ImageStats(torch.tensor([120.0 + number]), torch.tensor([70.0 - number]))
    model = build_model(config.model.name, DIGITS, number).to(device)
    return Task(
        model=model,
        received=copy_of(model.state_dict()),
        extras={},
        data=ClientData(images, labels, images, labels, stats, DIGITS).to(torch.device(device)),
        config=config,
        offset=torch.randn(10, generator=draw).to(device),
        memory={},
        generator=make_generator(2, number),
        build=partial(build_model, config.model.name, DIGITS, number),
    )


def make_tasks(device: str = "cpu", **settings) -> list[Task]:
    return [make_task(number, device, **settings) for number in range(len(SIZES))]


def together(tasks: list[Task]) -> None:
    batched.train([each for task in tasks for each in batched.draw(Method().fits(task))])


def vector(task: Task) -> Tensor:
    return torch.cat([each.flatten() for each in copy_of(task.model.state_dict()).values()])


def start(task: Task) -> Tensor:
    return torch.cat([each.flatten() for each in task.received.values()])


def apart(task: Task, other: Task) -> float:
    """Return how far two models are from each other, as a part of how far the first one moved."""
    return float((vector(task) - vector(other)).norm() / (vector(task) - start(task)).norm())


@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        ({}, 1e-5),
        ({"client.momentum": 0.0, "client.weight-decay": 0.0}, 1e-5),
        ({"client.batch-size": 1}, 1e-5),
        ({"client.batch-size": 100}, 1e-5),
        # At a kink of its layers, rounding decides about a gradient.
        ({"model.name": "cnn-8x8", "client.local-epochs": 1}, 1e-2),
    ],
)
def test_clients_with_unequal_numbers_of_examples_train_as_each_would_alone(
    settings: dict, bound: float
):
    alone, batch = make_tasks(**settings), make_tasks(**settings)
    for task in alone:
        task.fit(task.model)
    together(batch)
    for one, other in zip(alone, batch, strict=True):
        assert apart(one, other) < bound
        assert torch.equal(one.generator.get_state(), other.generator.get_state())


@pytest.mark.cuda
def test_a_gpu_trains_together_as_it_does_one_by_one_and_the_same_twice():
    alone, batch, again = make_tasks("cuda"), make_tasks("cuda"), make_tasks("cuda")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for task in alone:
            task.fit(task.model)
        together(batch)
        together(again)
    for one, other, same in zip(alone, batch, again, strict=True):
        assert apart(one, other) < 1e-4
        assert torch.equal(vector(other), vector(same))


def test_two_trainings_agree_in_every_digit():
    batch, again = make_tasks(), make_tasks()
    together(batch)
    together(again)
    for one, other in zip(batch, again, strict=True):
        assert torch.equal(vector(one), vector(other))


@pytest.mark.parametrize("sick", [0, 1, 2])
def test_a_client_that_diverges_is_alone_in_it(sick: int):
    healthy, batch = make_tasks(), make_tasks()
    together(healthy)
    images = batch[sick].data.train_inputs.float()
    images[0] = torch.inf
    batch[sick].data = batch[sick].data._replace(train_inputs=images)
    together(batch)
    for number, (one, other) in enumerate(zip(healthy, batch, strict=True)):
        assert bool(vector(other).isfinite().all()) == (number != sick)
        assert number == sick or apart(one, other) < 1e-5


class Parts(nn.Module):
    """A linear model with a frozen scale, a shift that is no parameter, and a layer without use."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)
        self.unused = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.tensor(0.5), requires_grad=False)
        self.register_buffer("shift", torch.tensor(0.1))

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1) * self.scale + self.shift)


def test_what_does_not_learn_stays_and_is_each_client_s_own():
    alone = make_tasks()
    for number, task in enumerate(alone):
        task.model = Parts()
        task.model.scale.data.fill_(0.1 + number)
        task.model.shift.fill_(float(number))
        task.received = copy_of(task.model.state_dict())
    batch = [
        replace(task, model=copy.deepcopy(task.model), generator=make_generator(2, number))
        for number, task in enumerate(alone)
    ]
    for task in alone:
        task.fit(task.model)
    together(batch)
    for one, other in zip(alone, batch, strict=True):
        assert apart(one, other) < 1e-5
        state = other.model.state_dict()
        for name in ("unused.weight", "unused.bias", "scale", "shift"):
            assert torch.equal(state[name], one.received[name])


NUM_CLIENTS = 4


def train_request(node: int, model: nn.Module, common: Tensor | None) -> Message:
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    content = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "config": ConfigRecord({"server-round": 2}),
        }
    )
    if common is not None:
        content["extras"] = ArrayRecord({"common": common})
    return Message(content=content, message_type=MessageType.TRAIN, dst_node_id=node)


def context(node: int, **settings) -> Context:
    run_config = {
        **SETTINGS,
        "client.class-prior": True,
        "data.partition": "dirichlet",
        "data.train-samples": 40,
        **settings,
    }
    node_config = {"partition-id": node, "num-partitions": NUM_CLIENTS}
    return Context(1, node, node_config, RecordDict(), run_config)


UPDATE = {"privacy.mode": "update", "privacy.epsilon": 1e6, "privacy.seeded-noise": True}


@pytest.mark.parametrize("settings", [{}, {"strategy": "fedavg"}, UPDATE])
def test_many_messages_are_answered_as_each_would_be_alone(settings: dict):
    models = [build_model("own_models:smooth", DIGITS, node) for node in range(NUM_CLIENTS)]
    commons = [torch.empty(0), None, torch.zeros(680 + 10), torch.empty(0)]
    requests = [
        [train_request(*each) for each in zip(range(NUM_CLIENTS), models, commons, strict=True)]
        for _ in range(2)
    ]
    contexts = [[context(node, **settings) for node in range(NUM_CLIENTS)] for _ in range(2)]
    alone = [train_message(*each) for each in zip(requests[0], contexts[0], strict=True)]
    batch = batched.train_messages(requests[1], contexts[1])
    for node, (one, other) in enumerate(zip(alone, batch, strict=True)):
        assert one.content.keys() == other.content.keys()
        assert ("extras" in one.content) == (not settings and commons[node] is not None)
        for name in ("arrays", "extras"):
            if name in one.content:
                torch.testing.assert_close(
                    one.content[name].to_torch_state_dict(),
                    other.content[name].to_torch_state_dict(),
                    atol=2e-5,
                    rtol=0,
                )
        metrics, others = (dict(each.content["metrics"]) for each in (one, other))
        assert metrics.pop("seconds") > 0
        assert others.pop("seconds") > 0
        assert metrics.keys() == others.keys()
        for key, value in metrics.items():
            assert others[key] == pytest.approx(value, rel=1e-4), key
        assert other.metadata.src_node_id == node
        assert contexts[0][node].state.keys() == contexts[1][node].state.keys()


def test_methods_of_plain_trainings_and_no_others_leave_training_as_it_is():
    plain = {name for name, method in METHODS.items() if method.train is Method.train}
    # Clients of pFedHN and FedAPA are FedAvg's; noise, or many at once, has not been tried.
    assert plain == {*PLAIN_STRATEGIES, "pfedhn", "fedapa"}


def test_each_batch_is_drawn_before_the_next_training_is_asked_for():
    """As for halves, whose order comes from the generator of the training before them."""

    def fits(task: Task):
        yield Fit(task, task.model)
        order.append(torch.randperm(9, generator=task.generator))
        yield Fit(replace(task, generator=make_generator(3)), copy.deepcopy(task.model))

    order: list[Tensor] = []
    alone, batch = make_task(0), make_task(0)
    for fit in fits(alone):
        fit.task.fit(fit.model)
    drawn = batched.draw(fits(batch))
    assert torch.equal(*order)
    assert [len(rows) for rows in drawn[0].batches] == [4, 4, 2] * 4


RUN = {
    **SETTINGS,
    "num-server-rounds": 2,
    "client.local-epochs": 1,
    "diffusion.device": "cpu",
    "diffusion.train-steps": 20,
    "diffusion.measure-every": 2,
}


class OtherApp(PoolGrid):
    client_app = ClientApp()


def run(**settings) -> list[dict]:
    config = Config.from_flat({**RUN, **settings})
    _, rows = simulate(config, NUM_CLIENTS, num_processes=0)
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


@pytest.mark.parametrize("strategy", ["pfedgpa", "fedavg-ft"])
def test_runs_of_both_engines_differ_by_rounding_and_each_repeats_itself(strategy: str):
    loop = run(strategy=strategy)
    vmap = run(strategy=strategy, **{"client.engine": "vmap"})
    assert run(strategy=strategy, **{"client.engine": "vmap"}) == vmap
    assert vmap != loop
    for one, other in zip(loop, vmap, strict=True):
        for key, value in one.items():
            assert other[key] == pytest.approx(value, abs=1e-3), key


def test_clients_that_train_together_need_no_processes():
    config = Config.from_flat({**RUN, "client.engine": "vmap"})
    grid = PoolGrid(config, NUM_CLIENTS, 2)
    assert not multiprocessing.active_children()
    grid.close()


def test_another_app_does_not_train_many_clients_together():
    config = Config.from_flat({**RUN, "client.engine": "vmap"})
    with pytest.raises(ValueError, match=r'any other ClientApp .*right would be "loop"'):
        simulate(config, NUM_CLIENTS, num_processes=0, make_grid=OtherApp)


def test_the_benchmark_measures_both_engines():
    row = benchmark.row("cnn-8x8", torch.device("cpu"), 2, 12, 1, 1)
    name, parameters, loop, vmap, ratio, *differences = row.strip("| ").split(" | ")
    assert (name, parameters) == ("cnn-8x8", "13,706")
    assert min(map(float, (loop, vmap, ratio))) > 0
    assert all(0 < float(part) < 1e-2 for part in differences)
