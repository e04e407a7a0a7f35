"""Local training of many clients at once, for simulations in one process.

The clients' parameters are stacked, and every SGD step is one graph over all models. All clients
take the steps of `pfedgpa_app.training` on the same batches; results differ by rounding alone.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from flwr.app import Context, Message
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from client_app.messages import prepare, training_reply
from client_app.methods import Fit, Task
from pfedgpa_app.data import ImageStats, normalize
from pfedgpa_app.parameters import StateDict
from pfedgpa_app.protocol import METRICS, SECONDS
from pfedgpa_app.randomness import repeatable
from pfedgpa_app.training import Momenta, batches, step


def train_messages(messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
    """Answer the training messages of many clients, as `train_message` answers one.

    The run has ``client.engine = "vmap"``, so that all trainings are plain. Each reply reports an
    equal share of the total seconds.
    """
    begin = time.monotonic()
    prepared = [prepare(*each) for each in zip(messages, contexts, strict=True)]
    before = [task.evaluate(method.personal_model(task)) for task, method in prepared]
    trainings = [draw(method.fits(task)) for task, method in prepared]
    train(list(chain(*trainings)))
    replies = []
    for message, context, (task, method), evaluation, own in zip(
        messages, contexts, prepared, before, trainings, strict=True
    ):
        trained = method.upload(task, [each.model for each in own])
        replies.append(training_reply(message, context, task, method, evaluation, trained))
    seconds = (time.monotonic() - begin) / len(replies)
    for reply in replies:
        reply.content.metric_records[METRICS][SECONDS] = seconds
    return replies


class Training(NamedTuple):
    """A plain training, with the example indices of each step, on the CPU."""

    task: Task
    model: nn.Module
    batches: list[Tensor]


def draw(fits: Iterable[Fit]) -> list[Training]:
    """Draw the batches of a client's trainings one by one, in the order of unbatched training."""
    trainings = []
    for task, model in fits:
        num_examples, settings = len(task.data.train_labels), task.config.client
        drawn = batches(num_examples, settings, task.generator, torch.device("cpu"))
        trainings.append(Training(task, model, list(drawn)))
    return trainings


def train(trainings: Sequence[Training]) -> None:
    """Train all models together in place, each as if it were trained alone.

    The models have one shape and device, and pass `unfit_for_vmap`; numbers of examples may differ.
    """
    # Unfinished trainings then always come first, and a slice makes no copy.
    trainings = sorted(trainings, key=lambda each: len(each.batches), reverse=True)
    tasks, models = [each.task for each in trainings], [each.model.train() for each in trainings]
    images = torch.cat([task.data.train_inputs for task in tasks])
    labels = torch.cat([task.data.train_labels for task in tasks])
    mean = torch.stack([task.data.stats.mean for task in tasks]).to(images.device)
    std = torch.stack([task.data.stats.std for task in tasks]).to(images.device)
    offsets = torch.stack([task.offset for task in tasks])
    parameters, buffers = stack_module_state(models)
    fixed = {name: tensor.detach() for name, tensor in {**parameters, **buffers}.items()}
    moving = {name: fixed.pop(name) for name in _trainable(trainings[0])}
    gradients_of = _gradients(models[0])
    momenta: Momenta = {}
    with repeatable():
        for rows, weights in _steps(trainings, labels.device):
            n = len(rows)
            state, stats = _first(n, moving), ImageStats(mean[:n], std[:n])
            batch = (images[rows], labels[rows], stats, offsets[:n], weights)
            gradients = gradients_of(state, _first(n, fixed), *batch)
            momenta = {name: m[:n] for name, m in momenta.items() if m is not None}
            step(state, gradients, momenta, tasks[0].config.client)
    with torch.no_grad():
        for place, model in enumerate(models):
            for name, stacked in moving.items():
                model.get_parameter(name).copy_(stacked[place])


def _gradients(model: nn.Module) -> Callable[..., StateDict]:
    """Return the vectorized gradient of cross-entropy, with the stacked arguments of ``loss``.

    The mean over a batch is a sum with ``weights``.
    """

    def loss(
        moving: StateDict,
        fixed: StateDict,
        images: Tensor,
        labels: Tensor,
        stats: ImageStats,
        offset: Tensor,
        weights: Tensor,
    ) -> Tensor:
        logits = functional_call(model, {**moving, **fixed}, (normalize(images, stats),))
        losses = functional.cross_entropy(logits.float() + offset, labels, reduction="none")
        return (weights * losses).sum()

    return vmap(grad(loss))


def _steps(trainings: Sequence[Training], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield indices into all examples and weights of each step, ``(unfinished trainings, batch)``.

    A smaller batch is padded with its own first example at weight 0, so that no other client's
    example enters its graph.
    """
    num_steps = len(trainings[0].batches)
    width = max(len(rows) for each in trainings for rows in each.batches)
    table = torch.zeros(num_steps, len(trainings), width, dtype=torch.int64)
    sizes = torch.zeros(num_steps, len(trainings), dtype=torch.int64)
    begin = 0
    for place, (task, _, drawn) in enumerate(trainings):
        padded = pad_sequence(drawn, batch_first=True, padding_value=-1)
        filled = torch.where(padded < 0, padded[:, :1], padded)
        table[: len(drawn), place] = begin + filled[:, :1]
        table[: len(drawn), place, : filled.shape[1]] = begin + filled
        sizes[: len(drawn), place] = torch.tensor([len(rows) for rows in drawn])
        begin += len(task.data.train_labels)
    weights = (torch.arange(width) < sizes[..., None]) / sizes[..., None].clamp(min=1)
    table, weights = table.to(device), weights.to(device)
    num_going, widths = (sizes > 0).sum(dim=1).tolist(), sizes.amax(dim=1).tolist()
    for number, (going, wide) in enumerate(zip(num_going, widths, strict=True)):
        yield table[number, :going, :wide], weights[number, :going, :wide]


def _trainable(training: Training) -> list[str]:
    """Return the names of the parameters that SGD moves: those that affect the logits."""
    task, model = training.task, training.model
    model(normalize(task.data.train_inputs[:1], task.data.stats)).sum().backward()
    names = [name for name, each in model.named_parameters() if each.grad is not None]
    model.zero_grad()
    return names


def _first(number: int, tensors: StateDict) -> StateDict:
    return {name: tensor[:number] for name, tensor in tensors.items()}
