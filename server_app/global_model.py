"""The average of all clients' models."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import Tensor

from pfedgpa_app.model_spec import ModelSpec
from pfedgpa_app.parameters import StateDict, weighted_average
from pfedgpa_app.stateful import Kept, Stateful
from server_app.momentum import Momentum
from server_app.replies import Upload

# Clients report their numbers of examples, so that weights need a limit.
MAX_EXAMPLES_RATIO = 10


class GlobalModel(Stateful):
    """The average, and the vector ``(d,)`` of the generated parameters of a model.

    ``patterns`` are those of the names of generated parameters, ``beta`` is the average's momentum.
    Raises `ParameterError` if a pattern matches no tensor, or nothing would be generated.
    """

    average: Kept[StateDict]
    momentum: Kept[Momentum]

    def __init__(self, spec: ModelSpec, patterns: Sequence[str], beta: float) -> None:
        self.spec = spec
        self.layout = spec.layout(patterns)
        self.average = spec.initial
        self.momentum = Momentum(beta, spec.trained)

    def move_to(self, combined: StateDict) -> None:
        """Move the average to a round's combined uploads, with momentum."""
        self.average = self.spec.refreshed(self.momentum.step(self.average, combined))

    def vector(self, state: StateDict) -> Tensor:
        """Return the generated parameters of a state_dict, ``(d,)``."""
        return self.layout.split(state)[0]

    def with_vector(self, vector: Tensor) -> StateDict:
        """Return the state_dict of generated parameters ``(d,)``; the rest is the average's."""
        return self.spec.refreshed(self.layout.merge(vector, self.layout.rest(self.average)))

    def complete_restored(self) -> None:
        """Raise a `ParameterError` if the average is that of another model."""
        replace(self.layout, sends_fixed=True).check(self.average)
        self.average = self.layout.received(self.average)


def weights_of(uploads: Iterable[Upload]) -> list[int]:
    """Return the weights of uploads: their numbers of examples, limited by those of the median."""
    numbers = [upload.num_examples for upload in uploads]
    limit = max(1, round(MAX_EXAMPLES_RATIO * statistics.median(numbers)))
    return [min(number, limit) for number in numbers]


def average_of(uploads: Sequence[Upload]) -> StateDict:
    """Return the average of uploads, weighted by `weights_of` them."""
    return weighted_average([upload.state for upload in uploads], weights_of(uploads))
