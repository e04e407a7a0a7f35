"""What a large model costs the server: the bank, and little beside it."""

import json
import subprocess
import sys

# A process of its own: its peak of memory is that of this computation and nothing else.
SCRIPT = """
import json, resource, sys
import torch
from pfedgpa_app.aggregation import GenerativeAggregator
from pfedgpa_app.config import DATASETS, DiffusionConfig
from pfedgpa_app.models import build_model
from pfedgpa_app.parameters import ParameterLayout
from pfedgpa_app.randomness import make_generator

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

layout = ParameterLayout.of(build_model("resnet18", DATASETS["cifar10"], seed=0).state_dict())
centres = [torch.randn(layout.dim, generator=make_generator(0, group)) for group in range(2)]
before = peak()
aggregator = GenerativeAggregator(DiffusionConfig(blocks=sys.argv[1], device="cpu"))
aggregator.begin(None, layout.blocks() if sys.argv[1] == "per-layer" else [slice(None)])
for client in range(20):
    noise = torch.randn(layout.dim, generator=make_generator(1, client))
    aggregator.observe(client, noise.mul_(0.5).add_(centres[client % 2]))
aggregator.fit(1)
generated = aggregator.personalize(3)
error = float((generated - centres[1]).norm() / (aggregator.bank[3] - centres[1]).norm())
print(json.dumps({"dim": layout.dim, "peak": peak() - before, "error": error}))
"""


def test_twenty_resnets_take_three_times_the_memory_of_their_bank():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "whole"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["dim"] > 11_000_000
    assert result["peak"] < 3 * 20 * 4 * result["dim"]
    # Ten clients a group: their mean has a tenth of the noise's variance.
    assert result["error"] < 0.4
