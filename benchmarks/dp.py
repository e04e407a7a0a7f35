"""Accuracy by epsilon of client-side differential privacy.

    python -m benchmarks.dp --rounds 8
    python -m benchmarks.dp --rounds 8 --mode update

20 clients in 5 groups, Fashion-MNIST in 14x14 pixels. In mode example a column is the epsilon that
a client has spent after the last round; without noise there is none, and training is plain. In mode
update it is what the noise of each upload is measured by, and all rounds together tell more.
"""

from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer

from benchmarks.options import Quick, Seeds, flag, tenth
from benchmarks.small_images import CLIENTS
from benchmarks.small_runs import configs, print_table, read_config
from pfedgpa_app.config import ClientConfig, Config
from pfedgpa_app.privacy import quiet_opacus, sampling_plan
from server_app.simulation import simulate

EVALUATED_ROUNDS = 3
STRATEGIES = ("pfedgpa", "fedavg-ft", "local")
DELTA = 1e-4  # below 1 / 600, the number of a client's images
# Clipped gradients need larger learning rates. Rates were chosen on seed 0.
DP_SGD_RATE = 0.5
# Larger batches have a better signal-to-noise ratio.
CLIENT: dict[str, Any] = {
    "client.local-epochs": 2,
    "client.batch-size": 120,
    "client.learning-rate": 0.2,
    "client.momentum": 0.0,
}
EPSILONS = {"example": (10.0, 3.0, 1.0), "update": (1000.0, 300.0, 100.0)}


def settings(mode: str, epsilon: float | None, rounds: int, num_examples: int) -> dict[str, Any]:
    """Return the settings of a column; None is training without privacy."""
    if epsilon is None:
        return {}
    private = {"privacy.mode": mode, "privacy.delta": DELTA, "privacy.seeded-noise": True}
    if mode == "update":
        return {**private, "privacy.epsilon": epsilon, "privacy.clip-norm": 0.5}
    plan = ClientConfig(
        local_epochs=CLIENT["client.local-epochs"], batch_size=CLIENT["client.batch-size"]
    )
    sample_rate, steps = sampling_plan(num_examples, plan)
    with quiet_opacus():
        # Imported here: it takes a second.
        from opacus.accountants.utils import get_noise_multiplier

        noise = get_noise_multiplier(
            target_epsilon=epsilon,
            target_delta=DELTA,
            sample_rate=sample_rate,
            steps=rounds * steps,
            accountant="rdp",
        )
    return {**private, "privacy.noise-multiplier": noise, "client.learning-rate": DP_SGD_RATE}


def main(
    file: Path = Path("conf/fashion-mnist-20.toml"),
    mode: Annotated[str, typer.Option(help="example or update.")] = "example",
    rounds: int = 10,
    seeds: Seeds = "1,2,3",
    quick: Quick = False,
) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    epsilons = EPSILONS[mode][: 1 if quick else None]
    strategies = STRATEGIES[: 1 if quick else None]
    clients = CLIENTS // 4 if quick else CLIENTS
    bases = {
        strategy: configs(file, rounds, seeds, quick, {**CLIENT, "strategy": strategy})
        for strategy in strategies
    }
    rows = {
        strategy: (
            [accuracy(file, base, clients, mode, each) for each in (None, *epsilons)] for base in of
        )
        for strategy, of in bases.items()
    }
    headings = ["no privacy", *(f"epsilon {epsilon:g}" for epsilon in epsilons)]
    note = (
        f"delta = {DELTA:g}, {tenth(rounds) if quick else rounds} rounds, means over the last "
        f"{EVALUATED_ROUNDS}: python -m benchmarks.dp --mode {mode} --seeds {seeds}{flag(quick)}"
    )
    print_table(f"Accuracy with privacy.mode = {mode}", headings, rows, note)


def accuracy(file: Path, base: Config, clients: int, mode: str, epsilon: float | None) -> float:
    """Return the mean accuracy of a run's last rounds."""
    private = settings(mode, epsilon, base.num_server_rounds, base.data.train_samples)
    config = read_config(file, {**base.to_flat(), **private})
    _, rows = simulate(config, clients, evaluated_rounds=EVALUATED_ROUNDS)
    return fmean(row["personalized-accuracy"] for row in rows[-EVALUATED_ROUNDS:])


if __name__ == "__main__":
    typer.run(main)
