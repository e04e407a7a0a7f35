"""pFedGPA's clients: FedAvg's, who tell now and then how far two halves of their images agree."""

import copy
from dataclasses import replace

import torch
from torch import Tensor

from client_app.methods.method import Method, Task, Trained
from pfedgpa_app.diffusion import SKETCH, sketched
from pfedgpa_app.parameters import ParameterLayout
from pfedgpa_app.randomness import make_generator

COMMON = "common"
HALVES = "halves"


class PFedGPA(Method):
    """FedAvg's client; when asked, it trains twice more, on each half of its images apart."""

    def train(self, task: Task) -> Trained:
        """Train, and upload with the parameters what was asked for.

        Where uploads are private the halves stay untold: they would need noise of their own.
        """
        trained = super().train(task)
        tells = COMMON in task.extras and not task.config.privacy.is_on
        extras = {HALVES: half_moves(task)} if tells else {}
        return Trained(trained.state, extras)


def half_moves(task: Task) -> Tensor:
    """Return how training on two random halves moves what all have in common.

    Both start from the parameters that came for it, ``(d,)``, or from the received ones if none
    did. Moves that say nothing are 0: those of fewer than four images, and those of a training that
    diverged.

    Returns
    -------
    Tensor
        Sketches, ``(2, SKETCH)``.
    """
    layout = ParameterLayout.of(task.received, task.config.diffusion.patterns)
    received, rest = layout.split(task.received)
    start = task.extras[COMMON] if len(task.extras[COMMON]) else received
    nothing = torch.zeros(2, SKETCH)
    data = task.data
    order = torch.randperm(len(data.train_labels), generator=task.generator)
    if len(order) < 4:
        return nothing
    moves = []
    for number, rows in enumerate(order.to(data.train_labels.device).tensor_split(2)):
        model = copy.deepcopy(task.model)
        model.load_state_dict(layout.merge(start, rest))
        half = data._replace(
            train_images=data.train_images[rows], train_labels=data.train_labels[rows]
        )
        # Of its own, so that dropout does not leave out the same for both.
        generator = make_generator(task.generator.initial_seed(), "half", number)
        replace(task, data=half, generator=generator).fit(model)
        moves.append(sketched((layout.split(model.state_dict())[0] - start).cpu()))
    both = torch.stack(moves)
    return both if bool(torch.isfinite(both).all()) else nothing
