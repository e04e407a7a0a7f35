"""pFedGPA's clients: FedAvg's, who tell now and then how far two halves of their images agree."""

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
    """FedAvg's client; when asked, it trains twice more, on each half of its images apart."""

    def fits(self, task: Task) -> Iterator[Fit]:
        """Yield the training, and that of both halves if the client is to tell of them."""
        yield from super().fits(task)
        if _tells(task):
            yield from _halves(task)

    def upload(self, task: Task, models: Sequence[nn.Module]) -> Trained:
        """Return the parameters, and with them what was asked for."""
        trained = super().upload(task, models)
        extras = {HALVES: _half_moves(task, models[1:])} if _tells(task) else {}
        return trained._replace(extras=extras)


def _tells(task: Task) -> bool:
    """Tell whether halves are asked for; private uploads would need noise of their own for them."""
    return COMMON in task.extras and not task.config.privacy.is_on


def _halves(task: Task) -> Iterator[Fit]:
    """Yield the training on each of two random halves; none of fewer than four images.

    Both start from the parameters that came for it, ``(d,)``, or from the received ones if none
    did.
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
            train_images=data.train_images[rows], train_labels=data.train_labels[rows]
        )
        # Of its own, so that dropout does not leave out the same for both.
        generator = make_generator(task.generator.initial_seed(), "half", number)
        yield Fit(replace(task, data=half, generator=generator), model)


def _half_moves(task: Task, models: Sequence[nn.Module]) -> Tensor:
    """Return how training on the halves moved what all have in common.

    Moves that say nothing are 0: those without halves, and those of a training that diverged.

    Returns
    -------
    Tensor
        Sketches, ``(2, SKETCH)``.
    """
    layout, start = _start(task)
    moves = [sketched((layout.split(model.state_dict())[0] - start).cpu()) for model in models]
    both = torch.stack(moves) if moves else torch.zeros(2, SKETCH)
    return both if bool(torch.isfinite(both).all()) else torch.zeros(2, SKETCH)


def _start(task: Task) -> tuple[ParameterLayout, Tensor]:
    """Return the layout of the generated parameters, and those from which the halves start."""
    layout = task.spec.layout(task.config.diffusion.patterns)
    common = task.extras[COMMON]
    return layout, common if len(common) else layout.split(task.received)[0]
