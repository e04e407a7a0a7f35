"""FedALA: an elementwise mixture of the client's last model and the average as start."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from client_app.methods.method import Method, Task, Trained
from pfedgpa_app.data import normalize
from pfedgpa_app.evaluation import autocast
from pfedgpa_app.parameters import StateDict, copy_of, layer_of
from pfedgpa_app.randomness import drawing_from, repeatable
from pfedgpa_app.training import batches, cross_entropy

MAX_EPOCHS = 100
"""Limit of the first learning of weights."""
_MODEL, _WEIGHT = "model.", "weight."


class FedALA(Method):
    """Adaptive local aggregation before local training (arXiv 2212.01197, Algorithm 1).

    The last ``fedala.layers`` layers start from ``old + (received - old) * W``, where ``old`` is
    what came out of the client's last training; all other parameters and buffers start as received.
    ``W`` is 1 at first, has one entry for each parameter, and takes steps of gradient descent on a
    random part of the training examples, clipped to 0 .. 1: when it is first learned until the
    standard deviation of the last ten epochs' losses is below 0.1, later for one epoch. As by the
    authors, the model after local training is evaluated. A client's first training starts as
    received. The authors' code takes consecutive examples, and the loss of an epoch's last batch;
    here they are drawn, and it is the mean.
    """

    def personal_model(self, task: Task) -> nn.Module:
        """Return the model of the client's last training, or the received one before it."""
        task.model.load_state_dict(_below(_MODEL, task.memory) or task.received)
        return task.model

    def train(self, task: Task) -> Trained:
        """Aggregate, train, and keep model and weights."""
        task.model = task.new_model(task.received)
        old, weights = _below(_MODEL, task.memory), _below(_WEIGHT, task.memory)
        if old:
            weights = learn_weights(task, old, weights)
            _mix(task.model, old, task.received, weights)
        task.fit(task.model)
        state = copy_of(task.model.state_dict())
        task.memory = {_MODEL + name: tensor for name, tensor in state.items()}
        task.memory |= {_WEIGHT + name: tensor for name, tensor in weights.items()}
        return self.upload(task, [task.model])


def learn_weights(task: Task, old: StateDict, weights: StateDict) -> StateDict:
    """Return the weights of the received parameters of the last layers, in 0 .. 1, by name.

    Without ``weights`` they are learned for the first time.
    """
    settings, data = task.config.fedala, task.data
    # Another model, since batch normalization changes its buffers.
    model = task.new_model(task.received)
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    last = list(dict.fromkeys(map(layer_of, trained)))[-settings.layers :]
    top = {name: each for name, each in trained.items() if layer_of(name) in last}
    max_epochs = 1 if weights else MAX_EPOCHS
    weights = weights or {name: torch.ones_like(each) for name, each in top.items()}
    num_examples = len(data.train_labels)
    drawn = torch.randperm(num_examples, generator=task.generator)
    rows = drawn[: max(1, round(settings.sample * num_examples))].to(data.train_labels.device)
    one_epoch = task.config.client.model_copy(update={"local_epochs": 1})
    loss, losses = cross_entropy(task.offset), []
    model.train()
    with drawing_from(task.generator, rows.device), repeatable():
        for _ in range(max_epochs):
            total = 0.0
            for places in batches(len(rows), one_epoch, task.generator, rows.device):
                _mix(model, old, task.received, weights)
                inputs, labels = data.train_inputs[rows[places]], data.train_labels[rows[places]]
                with autocast(rows.device, one_epoch.precision):
                    value = loss(model, normalize(inputs, data.stats), labels)
                total += float(value.detach()) * len(places)
                for name, gradient in _gradients(value, top).items():
                    step = gradient * (task.received[name] - old[name])
                    weights[name] = (weights[name] - settings.learning_rate * step).clamp(0, 1)
            losses.append(total / len(rows))
            if len(losses) > 10 and torch.tensor(losses[-10:]).std(correction=0) < 0.1:
                break
    return weights


def _gradients(value: Tensor, parameters: Mapping[str, Tensor]) -> StateDict:
    """Return the gradients of a loss by those parameters on which it depends."""
    if not value.requires_grad:
        return {}  # as when stochastic depth skips all trained layers
    found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    return {n: each for n, each in zip(parameters, found, strict=True) if each is not None}


@torch.no_grad()
def _mix(model: nn.Module, old: StateDict, received: StateDict, weights: StateDict) -> None:
    """Set the parameters that have weights to ``old + (received - old) * weight``."""
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.copy_(old[name] + (received[name] - old[name]) * weights[name])


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> StateDict:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
