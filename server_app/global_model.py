"""What all clients have in common: the average of their models."""

import statistics
from collections.abc import Iterable, Sequence

from torch import Tensor

from pfedgpa_app.parameters import ParameterLayout, StateDict, weighted_average
from pfedgpa_app.state import below, under
from server_app.momentum import Momentum
from server_app.replies import Upload

# A number of examples is what its client claims; what it weighs in the average has a limit.
MAX_EXAMPLES_RATIO = 10


class GlobalModel:
    """The average, and how the parameters that are generated lie in a vector ``(d,)``.

    Parameters
    ----------
    initial
        The model before the first round, whose tensors are in the order of the vectors.
    patterns
        Of the names of the parameters that are generated.
    beta
        Part of its last step by which the average goes on.

    Raises
    ------
    ParameterError
        If a pattern takes no tensor of it, or nothing would be generated.
    """

    def __init__(self, initial: StateDict, patterns: Sequence[str], beta: float) -> None:
        self.layout = ParameterLayout.of(initial, patterns)
        self.average = initial
        self.momentum = Momentum(beta)

    def move_to(self, combined: StateDict) -> None:
        """Move the average to what a round's uploads are combined to."""
        self.average = self.momentum.step(self.average, combined)

    def vector(self, state: StateDict) -> Tensor:
        """Return the generated parameters of a state_dict, ``(d,)``."""
        return self.layout.split(state)[0]

    def with_vector(self, vector: Tensor) -> StateDict:
        """Return the state_dict of generated parameters ``(d,)``; the rest is the average's."""
        return self.layout.merge(vector, self.layout.rest(self.average))

    def state(self) -> StateDict:
        """Return all that the next round needs, as named tensors."""
        return under("average", self.average) | under("momentum", self.momentum.state())

    def restore(self, tensors: StateDict) -> None:
        """Take over what `state` returned.

        Raises
        ------
        ParameterError
            If it is another model's.
        """
        average = below("average", tensors)
        self.layout.check(average)
        self.average = {entry.name: average[entry.name] for entry in self.layout.entries}
        self.momentum.restore(below("momentum", tensors))


def weights_of(uploads: Iterable[Upload]) -> list[int]:
    """Return what uploads count for in an average: their numbers of examples, with a limit.

    Nobody counts for more than `MAX_EXAMPLES_RATIO` times the median client.
    """
    numbers = [upload.num_examples for upload in uploads]
    limit = max(1, round(MAX_EXAMPLES_RATIO * statistics.median(numbers)))
    return [min(number, limit) for number in numbers]


def average_of(uploads: Sequence[Upload]) -> StateDict:
    """Return the average of uploads, by `weights_of` them."""
    return weighted_average([upload.state for upload in uploads], weights_of(uploads))
