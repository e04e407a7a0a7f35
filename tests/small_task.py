"""Models of a few parameters, whose training can be redone by hand."""

import copy
from functools import partial

import torch
from torch import Tensor, nn

from client_app.methods import Task
from pfedgpa_app.config import ClientConfig, Config, DatasetInfo
from pfedgpa_app.data import ClientData, ImageStats
from pfedgpa_app.parameters import copy_of
from pfedgpa_app.randomness import make_generator

IMAGES = torch.tensor([[1.0, 2.0], [0.5, -1.0], [2.0, 0.0]]).reshape(3, 1, 1, 2)
LABELS = torch.tensor([0, 1, 0])
TARGETS = torch.eye(2, dtype=torch.float64)[LABELS]
PLAIN_SGD = ClientConfig(
    local_epochs=4, batch_size=3, learning_rate=0.2, momentum=0.0, weight_decay=0.0
)
RATE, EPOCHS = 0.2, 4

Layer = tuple[Tensor, Tensor]
"""Weight ``(out, in)`` and bias ``(out,)``, float64."""


def small_task(config: Config, *, body: bool = False, offset: Tensor | None = None) -> Task:
    """Return the task of a linear model, or of two linear layers; all examples are one batch."""
    layers = [nn.Linear(2, 2) for _ in range(1 + body)]
    with torch.no_grad():
        for number, layer in enumerate(layers):
            layer.weight.copy_(torch.tensor([[0.3, -0.2], [0.1, 0.4]]) * (1 + number))
            layer.bias.copy_(torch.tensor([0.05, -0.05]))
    model = nn.Sequential(nn.Flatten(), *layers)
    stats = ImageStats(torch.zeros(1), torch.ones(1))
    return Task(
        model=model,
        received=copy_of(model.state_dict()),
        extras={},
        data=ClientData(IMAGES, LABELS, IMAGES, LABELS, stats, DatasetInfo((1, 1, 2), 2)),
        config=config,
        offset=torch.zeros(2) if offset is None else offset,
        memory={},
        generator=make_generator(0),
        build=partial(copy.deepcopy, model),
    )


def layers_of(state: dict[str, Tensor]) -> list[Layer]:
    """Return the layers of a small task's model, in float64."""
    names = sorted({name.partition(".")[0] for name in state})
    return [(state[f"{n}.weight"].double(), state[f"{n}.bias"].double()) for n in names]


def forward(layers: list[Layer], inputs: Tensor) -> Tensor:
    for weight, bias in layers:
        inputs = inputs @ weight.T + bias
    return inputs


def error_of(logits: Tensor) -> Tensor:
    """Return the gradient of the mean cross-entropy by the logits, ``(softmax - onehot) / n``."""
    exponentials = logits.exp()
    return (exponentials / exponentials.sum(dim=1, keepdim=True) - TARGETS) / len(TARGETS)


def head_step(head: Layer, features: Tensor, error: Tensor, rate: float = RATE) -> Layer:
    """Return a linear layer after a step of gradient descent, given its inputs."""
    return head[0] - rate * error.T @ features, head[1] - rate * error.sum(dim=0)


def assert_layers(state: dict[str, Tensor], layers: list[Layer]) -> None:
    for (weight, bias), (right_weight, right_bias) in zip(layers_of(state), layers, strict=True):
        torch.testing.assert_close(weight, right_weight, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(bias, right_bias, atol=1e-6, rtol=1e-5)
