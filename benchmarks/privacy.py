"""Inference of clients about each other, and the cost of limiting it.

    python -m benchmarks.privacy

12 clients, Fashion-MNIST in 14x14 pixels, in groups of two, three and four. A client of a group
knows its upload, the model that it is sent, and the mean of all. The part of the model that is not
explained by its upload and the mean comes from others.
"""

from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
import typer
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional

from benchmarks.options import Quick, Seeds, flag
from benchmarks.small_runs import configs, print_table
from pfedgpa_app.config import Config
from pfedgpa_app.data import client_data
from pfedgpa_app.evaluation import logits_of
from pfedgpa_app.models import build_model
from server_app.replies import Upload
from server_app.simulation import simulate
from server_app.strategies import PFedGPA

CLIENTS = 12
EVALUATED_ROUNDS = 3
GROUP_SIZES = (2, 3, 4)
COLUMNS = ("accuracy", "cosine to another's upload", "members of another's data, AUC")


class Kept(PFedGPA):
    """Keeps the uploads of the last round as vectors."""

    def learn(self, server_round: int, uploads: dict[int, Upload]) -> None:
        """Keep the uploads, and learn from them."""
        self.vectors = {client: each.vector for client, each in uploads.items()}
        super().learn(server_round, uploads)


class Result(NamedTuple):
    """Accuracy, and success of inferring uploads and membership of training images."""

    accuracy: float
    cosine: float
    membership: float


def run(config: Config, num_groups: int) -> Result:
    """Return the accuracy of a run, and each client's inference about another of its group."""
    strategy, rows = simulate(
        config, CLIENTS, evaluated_rounds=EVALUATED_ROUNDS, make_strategy=Kept.of
    )
    assert isinstance(strategy, Kept)
    mean = torch.stack([*strategy.vectors.values()]).mean(dim=0)
    cosines, aucs = [], []
    for client in range(CLIENTS):
        state = strategy.evaluation_state(client)
        own = functional.normalize(strategy.vectors[client] - mean, dim=0)
        learned = unexplained(strategy.global_model.vector(state) - mean, own)
        others = [c for c in range(client % num_groups, CLIENTS, num_groups) if c != client]
        hidden = [unexplained(strategy.vectors[other] - mean, own) for other in others]
        cosines.append(max(float(functional.cosine_similarity(learned, h, 0)) for h in hidden))
        aucs += [membership(state, config, other) for other in others]
    accuracy = fmean(row["personalized-accuracy"] for row in rows[-EVALUATED_ROUNDS:])
    return Result(accuracy, fmean(cosines), fmean(aucs))


def unexplained(vector: Tensor, direction: Tensor) -> Tensor:
    """Return a vector ``(d,)`` without its part along a unit vector."""
    return vector - (vector @ direction) * direction


def membership(state: dict[str, Tensor], config: Config, client: int) -> float:
    """Return the AUC of membership inference by the loss."""
    data = client_data(config.data, config.seed, client, CLIENTS)
    model = build_model(config.model.name, data.info, config.seed)
    model.load_state_dict(state)
    losses = [
        functional.cross_entropy(logits_of(model, images, data.stats), labels, reduction="none")
        for images, labels in (
            (data.train_inputs, data.train_labels),
            (data.test_inputs, data.test_labels),
        )
    ]
    is_member = torch.cat([torch.ones(len(losses[0])), torch.zeros(len(losses[1]))])
    return float(roc_auc_score(is_member.numpy(), -torch.cat(losses).numpy()))


def main(
    file: Path = Path("conf/fashion-mnist-20.toml"),
    rounds: int = 10,
    seeds: Seeds = "0,1,2",
    quick: Quick = False,
) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    sizes = GROUP_SIZES[: 1 if quick else None]
    rows = {
        f"groups of {size}, min-contributors = {min_contributors}": (
            run(config, config.data.num_groups)
            for config in configs(
                file,
                rounds,
                seeds,
                quick,
                {
                    "data.num-groups": CLIENTS // size,
                    "diffusion.min-contributors": min_contributors,
                },
            )
        )
        for size in sizes
        for min_contributors in (1, 3)
    }
    note = (
        f"Accuracies are means over the last {EVALUATED_ROUNDS} rounds: "
        f"python -m benchmarks.privacy{flag(quick)}"
    )
    print_table(f"What models reveal of others, {CLIENTS} clients", COLUMNS, rows, note)


if __name__ == "__main__":
    typer.run(main)
