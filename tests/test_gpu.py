"""Whole runs on a GPU: the same digits twice, and about what a CPU comes to."""

from pathlib import Path

import pytest
import torch

from pfedgpa_app.aggregation import GenerativeAggregator
from pfedgpa_app.config import Config, DiffusionConfig
from pfedgpa_app.randomness import make_generator
from pfedgpa_app.rounds import RoundRecord
from pfedgpa_app.state import load_state, save_state
from pfedgpa_app.strategies import STRATEGY_INFO
from server_app.simulation import simulate

pytestmark = pytest.mark.cuda

EVALUATED = "personalized-accuracy"
RAW = {
    "diffusion.space": "raw",
    "diffusion.start": 200,
    "diffusion.train-steps": 5,
    "diffusion.batch-size": 8,
    "diffusion.hidden-size": 8,
}
TASK = {"data.train-samples": 40, "data.uniform-fraction": 0.2, "num-server-rounds": 3}


def run(device: str, **settings) -> list[dict]:
    """Return a row a round of four clients, without its seconds."""
    devices = {"client.device": device, "diffusion.device": device}
    config = Config.from_flat({**TASK, **devices, **settings})
    statuses: set[str] = set()

    def note(record: RoundRecord) -> None:
        statuses.update(row["status"] for row in record.clients.values())

    _, rows = simulate(config, 4, num_processes=0, on_round=note)
    assert statuses == {"ok"}
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


@pytest.mark.parametrize(
    "settings",
    [
        *({"strategy": name} for name in STRATEGY_INFO),
        {"client.engine": "vmap"},
        {"client.precision": "bf16"},
        {"model.name": "cnn-8x8", "diffusion.sharing": "affinity"},
        {**RAW, "model.name": "own_models:smooth"},
        {"privacy.mode": "update", "privacy.epsilon": 100.0, "privacy.seeded-noise": True},
    ],
    ids=str,
)
def test_a_run_learns_as_on_a_cpu_and_the_same_twice(settings: dict):
    rows = run("cuda", **settings)
    assert run("cuda", **settings) == rows
    assert rows[-1][EVALUATED] == pytest.approx(run("cpu", **settings)[-1][EVALUATED], abs=0.1)


def test_dp_sgd_runs_on_a_gpu():
    pytest.importorskip("opacus")
    settings = {"privacy.mode": "example", "privacy.epsilon": 100.0}
    assert 0 <= run("cuda", **settings)[-1][EVALUATED] <= 1


def test_what_a_gpu_learned_is_read_where_there_is_none(tmp_path: Path):
    vectors = torch.randn(8, 500, generator=make_generator(0)).add(torch.arange(8)[:, None] // 4)
    onward = {}
    for device in ("cuda", "cpu"):
        config = DiffusionConfig(device=device, train_steps=50)
        aggregator = GenerativeAggregator(torch.zeros(500), config)
        if device == "cuda":
            for client, vector in enumerate(vectors):
                aggregator.observe(client, vector)
            aggregator.fit(1)
            save_state(tmp_path / "state.safetensors", "state", aggregator.state())
        else:
            aggregator.restore(load_state(tmp_path / "state.safetensors", "state")[0])
        onward[device] = torch.stack([aggregator.personalize(client) for client in range(8)])
    torch.testing.assert_close(onward["cpu"], onward["cuda"], atol=1e-4, rtol=1e-4)
    assert not torch.equal(onward["cuda"], vectors)
