"""A model is tried before a run: what a client will do with it is done on blank examples."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parameter import is_lazy

from pfedgpa_app.config import Config
from pfedgpa_app.data import ImageStats
from pfedgpa_app.errors import described
from pfedgpa_app.evaluation import logits_of
from pfedgpa_app.model_spec import ModelError
from pfedgpa_app.parameters import copy_of
from pfedgpa_app.randomness import make_generator
from pfedgpa_app.training import Loss, train

# Batches of so many examples, and of one more or less, are enough to see what fails.
_MAX_BATCH_SIZE = 4


def unfit_entries(model: nn.Module) -> list[str]:
    """Say which entries of a model's state_dict cannot be sent and averaged."""
    return [
        f"{name} is {reason}, which cannot be sent and averaged; right would be {right}"
        for name, value in model.state_dict().items()
        for reason, right in _unfit(value)
    ]


def _unfit(value: object) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with an entry of a state_dict, and what would be right."""
    if not isinstance(value, Tensor):
        yield (
            f"of type {type(value).__name__}",
            "tensors alone, without get_extra_state",
        )
    elif is_lazy(value):
        yield "not initialized", "a layer that is told its size, without Lazy"
    elif value.layout != torch.strided or value.is_quantized:
        kind = "quantized" if value.is_quantized else f"a tensor of layout {value.layout}"
        yield kind, "a dense tensor, or register_buffer(..., persistent=False)"
    elif value.is_meta:
        yield "without values (on the device meta)", "a model that is built with its parameters"
    elif value.dtype.is_complex or not _has_numpy(value.dtype):
        yield f"{value.dtype}", "torch.float32 or torch.float16"


def differences_of_builds(first: nn.Module, second: nn.Module) -> list[str]:
    """Say what two models differ in that were built alike, as those of server and clients are."""
    states = copy_of(first.state_dict()), copy_of(second.state_dict())
    if list(states[0]) != list(states[1]):
        return ["two models that it made have other parameters; right would be always the same"]
    differing = [
        name
        for name, tensor in states[0].items()
        if tensor.shape != states[1][name].shape
        or not torch.equal(tensor.nan_to_num(), states[1][name].nan_to_num())
    ]
    if not differing:
        return []
    return [
        f"two models that it made differ in {', '.join(differing[:5])}; right would be values "
        "drawn from the global generators of torch, numpy or random, which follow the seed"
    ]


def problems_in_training(build: Callable[[], nn.Module], config: Config) -> list[str]:
    """Train a model, give its parameters to another one and evaluate that, and say what fails.

    The steps are those of a client: training mode, memory format, precision, batches of the usual
    size and smaller ones, backward pass and SGD; then two examples and a single one in evaluation.

    Parameters
    ----------
    build
        Makes the model.
    """
    problem = _failure(build, config)
    if problem is None:
        return []
    if config.client.precision != "fp32" and _failure(build, config, precision="fp32") is None:
        return [f'with client.precision = "{config.client.precision}", {problem}; right: "fp32"']
    if _smallest(config) == 1 and _failure(build, config, smallest=2) is None:
        where = (
            "client.batch-size = 1" if config.client.batch_size == 1 else "data.train-samples = 1"
        )
        return [f"with {where}, {problem}; right would be 2 or more"]
    return [problem]


def _smallest(config: Config) -> int:
    """Return the number of examples in the smallest batch of which it is known that it comes."""
    samples = config.data.train_samples or config.client.batch_size
    return min(2, config.client.batch_size, samples)


def _failure(
    build: Callable[[], nn.Module],
    config: Config,
    precision: str | None = None,
    smallest: int | None = None,
) -> str | None:
    """Return what fails where a model is trained and evaluated, in a line; None if nothing does."""
    info = config.data.info
    smallest = smallest or _smallest(config)
    size = max(smallest, min(config.client.batch_size, _MAX_BATCH_SIZE))
    precision = precision or config.client.precision
    changed = {"local_epochs": 1, "batch_size": size, "precision": precision}
    client = config.client.model_copy(update=changed)
    stats = ImageStats(torch.zeros(info.shape[0]), torch.ones(info.shape[0]))
    model, other = build(), build()
    try:
        for number in (smallest, 2 * size + 1):  # one batch, then two, of which one is larger
            examples, labels = torch.zeros(number, *info.shape), torch.zeros(number).long()
            generator = make_generator(0, "trial")
            train(model, examples, labels, stats, client, generator, loss=_loss(info.num_classes))
    except Exception as error:  # a model of the user's raises whatever it likes
        if sparse := [n for n, p in model.named_parameters() if _is_sparse(p.grad)]:
            return f"{', '.join(sparse)} has a sparse gradient; right would be sparse=False"
        return f"training it fails: {_said(error)}"
    if all(parameter.grad is None for parameter in model.parameters()):
        return "no parameter that trains has a part in the loss: nothing would be learned"
    try:
        other.load_state_dict(copy_of(model.state_dict()))
        for number in (2, 1):
            logits = logits_of(other, torch.zeros(number, *info.shape), stats, precision)
            _check_shape(logits, number, info.num_classes)
    except Exception as error:
        return f"evaluating it fails: {_said(error)}"
    return None


def _loss(num_classes: int) -> Loss:
    """Return the cross-entropy of a model whose output is checked."""

    def loss(model: nn.Module, examples: Tensor, labels: Tensor) -> Tensor:
        logits = model(examples)
        _check_shape(logits, len(examples), num_classes)
        return functional.cross_entropy(logits.float(), labels)

    return loss


def _check_shape(output: object, number: int, num_classes: int) -> None:
    """Refuse what is no row of logits for each example.

    Raises
    ------
    ModelError
        With what would be right.
    """
    expected = (number, num_classes)
    if isinstance(output, Tensor) and tuple(output.shape) == expected:
        return
    found = type(output).__name__
    if isinstance(output, Tensor):
        found = f"an output of shape {tuple(output.shape)}"
    raise ModelError(
        f"{number} example(s) gave {found}; right would be {expected}, a logit a class, in "
        "training as in evaluation"
    )


def _said(error: Exception) -> str:
    """Return what an error says in one line."""
    return str(error) if isinstance(error, ModelError) else described(error)


def _is_sparse(gradient: Tensor | None) -> bool:
    return gradient is not None and gradient.is_sparse


def _has_numpy(dtype: torch.dtype) -> bool:
    """Return whether NumPy, and so Flower's arrays, has a type."""
    try:
        torch.empty(0, dtype=dtype).numpy()
    except TypeError:
        return False
    return True
