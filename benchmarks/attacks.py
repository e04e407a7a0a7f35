"""The effect of malicious clients on the accuracy of honest ones.

    python -m benchmarks.attacks --rules pfedgpa

20 clients in 5 groups, Fashion-MNIST in 14x14 pixels. Malicious clients ("liars") know all uploads
and collude. Each run is compared with a run of the same seed in which they are honest; only clients
that are honest in both are evaluated.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, ClassVar

import torch
import typer
from flwr.app import ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, FedMedian, FedTrimmedAvg, Krum
from torch import Tensor
from torch.nn import functional

from benchmarks import lying_client
from benchmarks.lying_client import TARGET, with_trigger
from benchmarks.options import Quick, Seeds, flag
from benchmarks.small_images import CLIENTS
from benchmarks.small_runs import configs
from pfedgpa_app.config import Config
from pfedgpa_app.data import client_data
from pfedgpa_app.evaluation import logits_of
from pfedgpa_app.model_spec import ModelSpec
from pfedgpa_app.models import build_model
from pfedgpa_app.parameters import ParameterLayout, StateDict, default_trained
from pfedgpa_app.protocol import EXTRAS
from pfedgpa_app.randomness import make_generator
from pfedgpa_app.rounds import RoundRecord, mean_and_spread
from pfedgpa_app.tables import Cell, Table
from server_app.replies import Upload
from server_app.simulation import PoolGrid, simulate
from server_app.strategies import ClientwiseFedAvg, FedAvgFT, PFedGPA

EVALUATED_ROUNDS = 3
ONLY = "Only these; may be repeated."


@dataclass(frozen=True)
class Case:
    """The malicious clients, what they falsify, and the settings.

    Attributes
    ----------
    liars
        Client i is in group i % 5.
    lies
        The falsified part of an upload: ``all``, ``statistics`` of normalization, ``averaged``
        layers or ``halves``.
    settings
        Of the runs.
    of
        The evaluated clients; empty for all honest ones.
    """

    liars: tuple[int, ...]
    lies: str = "all"
    settings: Mapping[str, Any] = field(default_factory=dict)
    of: tuple[int, ...] = ()


_FOUR = (16, 17, 18, 19)
_NORMALIZED = {"model.name": "benchmarks.small_images:normalized_cnn"}
_LAST_LAYER = {"diffusion.generated-layers": "9.*"}
CASES = {
    "one of 20": Case((19,)),
    "20 %, in four groups": Case(_FOUR),
    "three of the four of a group": Case((4, 9, 14)),
    "one of 20, statistics": Case((19,), "statistics", _NORMALIZED),
    "20 %, statistics": Case(_FOUR, "statistics", _NORMALIZED),
    "one of 20, averaged layers": Case((19,), "averaged", _LAST_LAYER),
    "20 %, averaged layers": Case(_FOUR, "averaged", _LAST_LAYER),
    "one of 20, halves": Case((19,), "halves"),
    "one of 20, 30 % a round": Case((19,), settings={"server.fraction-train": 0.3}),
    "20 %, 30 % a round": Case(_FOUR, settings={"server.fraction-train": 0.3}),
    "three liars, 20 % a round": Case((17, 18, 19), settings={"server.fraction-train": 0.2}),
    "one of 15, for five newcomers": Case(
        (14,),
        settings={"onboarding.late-clients": 5, "onboarding.join-round": 6},
        of=(15, 16, 17, 18, 19),
    ),
}

Forge = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""Returns a forged update ``(d,)``, given the own ``(d,)`` and the honest ones ``(n, d)``."""


@dataclass(frozen=True)
class Attack:
    """The behaviour of malicious clients.

    Attributes
    ----------
    forge
        Applied to their updates and to extras.
    halves
        Applied instead to the updates of their two halves, concatenated.
    poison
        Data poisoning of `benchmarks.lying_client`.
    examples
        Factor on the reported number of examples.
    first_round
        The first round of the attack.
    last_round
        The last round in which they are connected.
    """

    forge: Forge = lambda own, honest, generator: own
    halves: Forge | None = None
    poison: str = ""
    examples: int = 1
    first_round: int = 1
    last_round: int | None = None


def gaussian(ratio: float) -> Forge:
    """Return the attack of noise with ``ratio`` times the median norm of honest updates."""

    def forge(own: Tensor, honest: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(own.shape, generator=generator)
        return ratio * honest.norm(dim=1).median() * noise / noise.norm()

    return forge


def knowing(name: str, **settings: float) -> Forge:
    """Return an attack of ByzFL, which computes an update from the honest ones."""

    def forge(own: Tensor, honest: Tensor, generator: torch.Generator) -> Tensor:
        import byzfl  # imported here: it takes seconds

        forged: Tensor = getattr(byzfl, name)(**settings)(honest)
        return forged

    return forge


def adaptive(own: Tensor, honest: Tensor, generator: torch.Generator) -> Tensor:
    """Return an update against the attacker's neighbours that just passes outlier detection.

    It has nearly twice the median norm and a small positive cosine with the mean update; the rest
    points away from the most similar clients' updates.
    """
    lengths = honest.norm(dim=1)
    units = honest / lengths[:, None]
    together = functional.normalize(units.mean(dim=0), dim=0)
    neighbours = units[(units @ functional.normalize(own, dim=0)).topk(3).indices].mean(dim=0)
    away = -functional.normalize(neighbours - (neighbours @ together) * together, dim=0)
    return 1.9 * lengths.median() * (0.05 * together + (1 - 0.05**2) ** 0.5 * away)


def together(own: Tensor, honest: Tensor, generator: torch.Generator) -> Tensor:
    """Return an update that just passes outlier detection, in one direction for all attackers."""
    lengths = honest.norm(dim=1)
    mean = functional.normalize((honest / lengths[:, None]).mean(dim=0), dim=0)
    direction = torch.randn(own.shape, generator=make_generator(0, "together"))
    direction = functional.normalize(direction - (direction @ mean) * mean, dim=0)
    return 1.9 * lengths.median() * (0.05 * mean + (1 - 0.05**2) ** 0.5 * direction)


def opposed(own: Tensor, honest: Tensor, generator: torch.Generator) -> Tensor:
    """Return opposite halves, which look like noise alone."""
    first, _ = own.chunk(2)
    return torch.cat([first, -first])


def unrelated(own: Tensor, honest: Tensor, generator: torch.Generator) -> Tensor:
    """Return halves that agree only in the mean update."""
    mean = honest.mean(dim=0)
    noise = torch.randn(mean.shape, generator=make_generator(0, "apart"))
    return mean + mean.norm() * noise / noise.norm()


ATTACKS = {
    "sign flip": Attack(lambda own, honest, generator: -own),
    "10 times as far": Attack(lambda own, honest, generator: 10 * own),
    "inner product": Attack(knowing("InnerProductManipulation", tau=2.0)),
    "a little is enough": Attack(knowing("ALittleIsEnough", tau=1.5)),
    "mimic": Attack(knowing("Mimic", epsilon=0)),
    "noise": Attack(gaussian(1.0)),
    "noise, 100 times as far": Attack(gaussian(100.0)),
    "the same, rounds 1 and 2 only": Attack(gaussian(100.0), last_round=2),
    "1000 times the examples, flipped": Attack(lambda own, honest, generator: -own, examples=1000),
    "adaptive": Attack(adaptive),
    "label flip": Attack(poison="labels"),
    "backdoor, replacing the model": Attack(
        lambda own, honest, generator: 5 * own, poison="trigger"
    ),
    "100 added": Attack(lambda own, honest, generator: own + 100),
    "minus 50 times": Attack(lambda own, honest, generator: -50 * own),
    "cancelling the others": Attack(lambda own, honest, generator: -honest.sum(dim=0)),
    "noise, 100 times as far, from round 6 on": Attack(gaussian(100.0), first_round=6),
    "together": Attack(together),
    "together, opposed halves": Attack(together, opposed),
    "together, unrelated halves": Attack(together, unrelated),
}
NONE = Attack()


class AttackedGrid(PoolGrid):
    """A pool of clients, some of them malicious."""

    client_app: ClassVar[ClientApp] = lying_client.app

    def __init__(
        self, attack: Attack, case: Case, config: Config, num_clients: int, *args: Any
    ) -> None:
        super().__init__(config, num_clients, *args)
        self.attack = attack
        self.liars = set(case.liars)
        self.lies = case.lies
        self.patterns = config.diffusion.patterns
        self.seed = config.seed

    def node_config(self, node: int) -> dict[str, Any]:
        """Return the node config, with the data poisoning."""
        poison = self.attack.poison if node in self.liars else ""
        return super().node_config(node) | {"poison": poison}

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Return replies, with those of malicious clients forged from all others."""
        messages = list(messages)
        replies = super().send_and_receive(messages, timeout=timeout)
        training = [m for m in messages if m.metadata.message_type == MessageType.TRAIN]
        sent = {message.metadata.dst_node_id: message.content for message in training}
        if sent:
            self._forge(sent, {reply.metadata.src_node_id: reply.content for reply in replies})
        return replies

    def _forge(self, sent: dict[int, RecordDict], uploaded: dict[int, RecordDict]) -> None:
        server_round = int(next(iter(sent.values()))["config"]["server-round"])
        if server_round < self.attack.first_round or uploaded.keys() <= self.liars:
            return
        for record in ("arrays", EXTRAS):
            states = {
                node: content[record].to_torch_state_dict()
                for node, content in uploaded.items()
                if record in content
            }
            names = self.attacked(record, next(iter(states.values()), {}))
            honest_nodes = states.keys() - self.liars
            if not names or not honest_nodes:  # nothing to falsify, or no honest update
                continue
            starts, moves = {}, {}
            for node, state in states.items():
                vector, starts[node] = _flat(state, names), torch.zeros(())
                if record == "arrays":
                    starts[node] = _flat(sent[node][record].to_torch_state_dict(), names)
                moves[node] = vector - starts[node]
            honest = torch.stack([moves[node] for node in sorted(honest_nodes)])
            forge = self.attack.forge
            if record == EXTRAS and self.attack.halves:
                forge = self.attack.halves
            for node in sorted(self.liars & moves.keys()):
                move = moves[node]
                if not bool(torch.isfinite(move).all()):  # its training diverged by the attack
                    move = honest.mean(dim=0)
                generator = make_generator(self.seed, "attack", record, node, server_round)
                forged = starts[node] + forge(move, honest, generator)
                sizes = [states[node][name].numel() for name in names]
                for name, piece in zip(names, forged.split(sizes), strict=True):
                    before = states[node][name]
                    least = 0.0 if name.endswith("running_var") else -torch.inf
                    states[node][name] = piece.reshape(before.shape).clamp(min=least).to(before)
                uploaded[node][record] = ArrayRecord(states[node])
        # Their own metrics would reveal the attack.
        plausible = dict(next(uploaded[n]["metrics"] for n in uploaded if n not in self.liars))
        plausible["num-examples"] *= self.attack.examples
        for node in self.liars & uploaded.keys():
            partition = uploaded[node]["metrics"]["partition"]
            uploaded[node]["metrics"] = MetricRecord({**plausible, "partition": partition})

    def attacked(self, record: str, state: StateDict) -> list[str]:
        """Return the falsified entries of a record."""
        if record == EXTRAS:
            return list(state) if self.lies in ("all", "halves") else []
        trained = default_trained(state)
        generated = {e.name for e in ParameterLayout.of(state, self.patterns).generated}
        names = {
            "all": trained,
            "statistics": {n for n in state if n.endswith(("running_mean", "running_var"))},
            "averaged": trained - generated,
            "halves": set(),
        }[self.lies]
        return [name for name in state if name in names]


def _flat(state: StateDict, names: Iterable[str]) -> Tensor:
    """Return tensors of a state_dict as a vector ``(d,)``."""
    return torch.cat([state[name].reshape(-1).float() for name in names])


class Robust(FedAvgFT):
    """FedAvg-FT with the aggregation of one of Flower's robust strategies."""

    rule: FedAvg

    def combine(self, uploads: list[Upload]) -> StateDict:  # type: ignore[override]
        """Return the robust aggregate of the uploads."""
        replies = [
            Message(
                RecordDict(
                    {
                        "arrays": ArrayRecord(upload.state),
                        "metrics": MetricRecord({self.weighted_by_key: upload.num_examples}),
                    }
                ),
                dst_node_id=0,
                message_type=MessageType.TRAIN,
            )
            for upload in uploads
        ]
        arrays, _ = self.rule.aggregate_train(0, replies)
        assert arrays is not None
        return arrays.to_torch_state_dict()


Make = Callable[[Config, ModelSpec], ClientwiseFedAvg]


def _robust(rule: FedAvg) -> Make:
    def make(config: Config, spec: ModelSpec) -> ClientwiseFedAvg:
        strategy = Robust.of(config, spec)
        strategy.rule = rule
        return strategy

    return make


RULES: dict[str, tuple[Make, dict[str, Any]]] = {
    "pfedgpa": (PFedGPA.of, {}),
    "pfedgpa, no guard": (PFedGPA.of, {"diffusion.guard": False}),
    "fedavg-ft": (FedAvgFT.of, {"strategy": "fedavg-ft"}),
    "Krum, FT": (_robust(Krum(num_malicious_nodes=4)), {"strategy": "fedavg-ft"}),
    "trimmed mean, FT": (_robust(FedTrimmedAvg(beta=0.2)), {"strategy": "fedavg-ft"}),
    "median, FT": (_robust(FedMedian()), {"strategy": "fedavg-ft"}),
}


@dataclass(frozen=True)
class Result:
    """Final mean and worst accuracy of honest clients, and backdoor success."""

    accuracy: float
    worst: float
    backdoor: float


def run(
    config: Config,
    make: Make,
    attack: Attack,
    case: Case,
    evaluated: Collection[int],
) -> Result:
    """Run the app under attack and average ``evaluated`` clients over the last rounds."""
    found: dict[int, list[float]] = {node: [] for node in evaluated}
    made: list[ClientwiseFedAvg] = []

    def make_one(config: Config, spec: ModelSpec) -> ClientwiseFedAvg:
        made.append(make(config, spec))
        made[0].fraction_train = config.server.fraction_train
        return made[0]

    def note(record: RoundRecord) -> None:
        for client, row in record.clients.items():
            node = made[0].roster.node_id(client)
            if node in found and "personalized-accuracy" in row:
                found[node].append(row["personalized-accuracy"])

    last = attack.last_round
    strategy, _ = simulate(
        config,
        CLIENTS,
        evaluated_rounds=EVALUATED_ROUNDS,
        on_round=note,
        absent=lambda server_round: case.liars if last and server_round > last else (),
        make_strategy=make_one,
        make_grid=partial(AttackedGrid, attack, case),
    )
    accuracies = [fmean(values[-EVALUATED_ROUNDS:]) for values in found.values()]
    backdoor = fmean(backdoor_success(strategy, config, client) for client in evaluated)
    return Result(fmean(accuracies), min(accuracies), backdoor)


def backdoor_success(strategy: ClientwiseFedAvg, config: Config, client: int) -> float:
    """Return the fraction of a client's test images that the trigger turns into `TARGET`."""
    data = client_data(config.data, config.seed, client, CLIENTS)
    images = data.test_inputs[data.test_labels != TARGET]
    model = build_model(config.model.name, data.info, config.seed)
    model.load_state_dict(strategy.evaluation_state(client))
    predicted = logits_of(model, with_trigger(images), data.stats).argmax(dim=1)
    return float((predicted == TARGET).double().mean())


def main(
    file: Path = Path("conf/fashion-mnist-20.toml"),
    rounds: int = 10,
    images: Annotated[int, typer.Option(help="Of a client, and 200 for testing; 0: 600, 300.")] = 0,
    seeds: Seeds = "0,1,2",
    rules: Annotated[list[str], typer.Option(help=ONLY)] = [],  # noqa: B006
    attacks: Annotated[list[str], typer.Option(help=ONLY)] = [],  # noqa: B006
    cases: Annotated[list[str], typer.Option("--liars", help=ONLY)] = [],  # noqa: B006
    quick: Quick = False,
) -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    rules, attacks, cases = rules or list(RULES), attacks or list(ATTACKS), cases or list(CASES)
    if quick:  # includes a robust aggregation
        rules, attacks, cases = rules[::3], attacks[:1], cases[:1]
    for who in cases:
        case = CASES[who]
        evaluated = case.of or sorted(set(range(CLIENTS)) - set(case.liars))
        results: dict[tuple[str, str], list[Result]] = {}
        for rule, name in product(rules, ["none", *attacks]):
            make, settings = RULES[rule]
            settings = {**case.settings, **settings}
            if images:
                settings |= {"data.train-samples": images, "data.test-samples": 200}
            if quick:  # its only round has no late clients
                settings = {k: v for k, v in settings.items() if not k.startswith("onboarding.")}
            for config in configs(file, rounds, seeds, quick, settings):
                lying = case if name != "none" else replace(case, liars=())
                result = run(config, make, ATTACKS.get(name, NONE), lying, evaluated)
                results.setdefault((rule, name), []).append(result)
            each = results[rule, name]
            print(
                f"{who}, {rule}, {name}: {mean_and_spread([one.accuracy for one in each])}, worst "
                f"client {fmean(one.worst for one in each):.4f}, backdoor "
                f"{fmean(one.backdoor for one in each):.1%}",
                flush=True,
            )
        for table in tables(who, rules, attacks, results, flag(quick)):
            print(table.markdown())


def tables(
    who: str,
    rules: Collection[str],
    attacks: Collection[str],
    results: dict[tuple[str, str], list[Result]],
    end: str,
) -> list[Table]:
    """Return tables of mean accuracy, worst accuracy and backdoor success."""
    measures: dict[str, Callable[[Result], float]] = {
        "Accuracy of the honest clients": lambda result: result.accuracy,
        "Accuracy of the worst honest client": lambda result: result.worst,
        "Backdoor success on honest clients": lambda result: result.backdoor,
    }
    found = []
    for title, measure in measures.items():
        harms = [max, min]["Accuracy" in title]
        rows = {
            name: [
                Cell(mean_and_spread([measure(r) for r in results[rule, name]])) for rule in rules
            ]
            for name in ["none", *attacks]
        }
        rows["worst case"] = [
            Cell(f"{harms(fmean(measure(r) for r in results[rule, name]) for name in attacks):.4f}")
            for rule in rules
        ]
        rounds = f"means over the last {EVALUATED_ROUNDS} rounds"
        note = f"Liars: {who}; {rounds}: python -m benchmarks.attacks{end}"
        found.append(Table(title, list(rules), rows, note))
    return found


if __name__ == "__main__":
    typer.run(main)
