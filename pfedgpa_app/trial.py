"""Trial of a model before a run: a client's training and evaluation on blank examples."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parameter import is_lazy

from pfedgpa_app.config import Config
from pfedgpa_app.data import ImageStats
from pfedgpa_app.errors import described
from pfedgpa_app.evaluation import logits_of
from pfedgpa_app.model_spec import ModelError, check_logits, gradients_of
from pfedgpa_app.parameters import copy_of, same
from pfedgpa_app.randomness import make_generator
from pfedgpa_app.training import train

# Larger batches would show no other errors.
_MAX_BATCH_SIZE = 4
# Several, since stochastic depth skips layers in some steps.
_EPOCHS = 2


def unfit_entries(model: nn.Module) -> list[str]:
    """Return problems of state_dict entries that cannot be sent and averaged."""
    state = model.state_dict()
    problems = [
        f"{name} is {reason}, which cannot be sent and averaged; right would be {right}"
        for name, value in state.items()
        for reason, right in _unfit(value)
    ]
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    if not problems and (unknown := state.keys() - known):
        problems.append(
            f"its state_dict has {', '.join(sorted(unknown)[:5])}, but no parameter or buffer of "
            "that name; right would be a state_dict without hooks that rename"
        )
    return problems


def _unfit(value: object) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with an entry of a state_dict, and what would be right."""
    if not isinstance(value, Tensor):
        yield f"of type {type(value).__name__}", "tensors alone, without get_extra_state"
    elif is_lazy(value):
        yield "not initialized", "a layer of a given size, without Lazy"
    elif value.layout != torch.strided or value.is_quantized:
        kind = "quantized" if value.is_quantized else f"a tensor of layout {value.layout}"
        yield kind, "a dense tensor, or register_buffer(..., persistent=False)"
    elif value.is_meta:
        yield "without values (on the device meta)", "a model that is built with its parameters"
    elif value.dtype.is_complex or not _has_numpy(value.dtype):
        yield f"{value.dtype}", "torch.float32 or torch.float16"


def _has_numpy(dtype: torch.dtype) -> bool:
    """Return whether NumPy, and so Flower's arrays, has a dtype."""
    try:
        torch.empty(0, dtype=dtype).numpy()
    except TypeError:
        return False
    return True


def differences_of_builds(first: nn.Module, second: nn.Module) -> list[str]:
    """Return how two builds of one model differ, as those of server and clients must not."""
    states = copy_of(first.state_dict()), copy_of(second.state_dict())
    if list(states[0]) != list(states[1]):
        return ["two builds have different parameters; right would be the same in every build"]
    differing = [
        name
        for name, tensor in states[0].items()
        if tensor.shape != states[1][name].shape or not same(tensor, states[1][name])
    ]
    if not differing:
        return []
    return [
        f"two builds differ in {', '.join(differing[:5])}; right would be values drawn from the "
        "global generators of torch, numpy or random, which are seeded"
    ]


class Trial(NamedTuple):
    """The result of a trial."""

    problem: str
    """What failed, in one line; "" if nothing did."""
    changed: frozenset[str] = frozenset()
    """Names of the entries of the state_dict that changed."""
    idle: tuple[str, ...] = ()
    """Names of the parameters that require a gradient and have none."""


def try_training(build: Callable[[], nn.Module], config: Config) -> Trial:
    """Train a model as clients do, load its parameters into another one and evaluate that.

    Training has the configured precision, batches of several sizes, and memory format; evaluation
    has two examples, then one. ``build`` builds the model.
    """
    client = config.client
    # The smallest batch that is sure to occur.
    smallest = min(2, client.batch_size, config.data.train_samples or client.batch_size)
    tried = _try(build, config, smallest, client.precision)
    problem = tried.problem
    if not problem:
        return tried
    if client.precision != "fp32" and not _try(build, config, smallest, "fp32").problem:
        return Trial(
            f'with client.precision = "{client.precision}", {problem}; right would be "fp32"'
        )
    if smallest == 1 and not _try(build, config, 2, client.precision).problem:
        where = "client.batch-size" if client.batch_size == 1 else "data.train-samples"
        return Trial(f"with {where} = 1, {problem}; right would be 2 or more")
    return tried


def _try(build: Callable[[], nn.Module], config: Config, smallest: int, precision: str) -> Trial:
    info = config.data.info
    size = max(smallest, min(config.client.batch_size, _MAX_BATCH_SIZE))
    changed = {"local_epochs": _EPOCHS, "batch_size": size, "precision": precision}
    client = config.client.model_copy(update=changed)
    stats = ImageStats(torch.zeros(info.shape[0]), torch.ones(info.shape[0]))
    model, other = build(), build()
    before = copy_of(model.state_dict())
    used, generator = set[str](), make_generator(0, "trial")

    def loss(model: nn.Module, examples: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy, and take note of the parameters with a gradient."""
        logits = model(examples)
        check_logits(logits, len(examples), info.num_classes)
        value = functional.cross_entropy(logits.float(), labels)
        if value.requires_grad:
            used.update(n for n, each in gradients_of(value, model).items() if each is not None)
        return value

    try:
        # One batch of the smallest size; then two equal batches and a larger one.
        for number in (smallest, 3 * size + 1):
            examples, labels = torch.zeros(number, *info.shape), torch.zeros(number).long()
            train(model, examples, labels, stats, client, generator, loss=loss)
    except Exception as error:  # user code may raise anything
        named = model.named_parameters()
        if sparse := [n for n, p in named if p.grad is not None and p.grad.is_sparse]:
            return Trial(f"{', '.join(sparse)} has a sparse gradient; right would be sparse=False")
        return Trial(f"training it fails: {_one_line(error)}")
    after = copy_of(model.state_dict())
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    if not trained & used:
        return Trial("the loss depends on no trained parameter: nothing would be learned")
    try:
        other.load_state_dict(after)
        for number in (2, 1):
            logits = logits_of(other, torch.zeros(number, *info.shape), stats, precision)
            check_logits(logits, number, info.num_classes)
    except Exception as error:
        return Trial(f"evaluating it fails: {_one_line(error)}")
    moved = frozenset(name for name, tensor in before.items() if not same(tensor, after[name]))
    return Trial("", moved, tuple(sorted(trained - used)))


def _one_line(error: Exception) -> str:
    return str(error) if isinstance(error, ModelError) else described(error)
