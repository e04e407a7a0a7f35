"""pFedGPA's client: FedAvg's, with occasional updates of two halves of its data."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from client_app.methods.method import Fit, Method, Task, Trained
from pfedgpa_app.diffusion.signal import SKETCH, sketched
from pfedgpa_app.parameters import ParameterLayout
from pfedgpa_app.protocol import COMMON, HALVES
from pfedgpa_app.randomness import make_generator


class PFedGPA(Method):
    """FedAvg's client; on request it also trains on each of two random halves of its data."""

    def fits(self, task: Task) -> Iterator[Fit]:
        """Yield the training, and those on both halves if the server requests them."""
        yield from super().fits(task)
        if _is_requested(task):
            yield from _half_fits(task)

    def upload(self, task: Task, models: Sequence[nn.Module]) -> Trained:
        """Return the parameters, and the updates of both halves on request."""
        trained = super().upload(task, models)
        extras = {HALVES: _half_updates(task, models[1:])} if _is_requested(task) else {}
        return trained._replace(extras=extras)


def _is_requested(task: Task) -> bool:
    """Return whether the halves' updates are requested; with privacy they are not uploaded."""
    return COMMON in task.extras and not task.config.privacy.is_on


def _half_fits(task: Task) -> Iterator[Fit]:
    """Yield the training on each of two random halves; none for fewer than four examples.

    Both start from the parameters that the server sent for them, ``(d,)``, or else from the
    received model.
    """
    layout, start = _start(task)
    _, rest = layout.split(task.received)
    data = task.data
    order = torch.randperm(len(data.train_labels), generator=task.generator)
    if len(order) < 4:
        return
    for number, rows in enumerate(order.to(data.train_labels.device).tensor_split(2)):
        model = task.new_model(layout.merge(start, rest))
        half = data._replace(
            train_inputs=data.train_inputs[rows], train_labels=data.train_labels[rows]
        )
        # Separate generators, so that both halves have different dropout masks.
        generator = make_generator(task.generator.initial_seed(), "half", number)
        yield Fit(replace(task, data=half, generator=generator), model)


def _half_updates(task: Task, models: Sequence[nn.Module]) -> Tensor:
    """Return sketches of both halves' updates of the generated parameters, ``(2, SKETCH)``.

    They are 0 without halves, or if a training diverged.
    """
    layout, start = _start(task)
    updates = [sketched((layout.split(model.state_dict())[0] - start).cpu()) for model in models]
    both = torch.stack(updates) if updates else torch.zeros(2, SKETCH)
    return both if bool(torch.isfinite(both).all()) else torch.zeros(2, SKETCH)


def _start(task: Task) -> tuple[ParameterLayout, Tensor]:
    """Return the layout of the generated parameters, and the start vector of both halves."""
    layout = task.spec.layout(task.config.diffusion.patterns)
    common = task.extras[COMMON]
    return layout, common if len(common) else layout.split(task.received)[0]
