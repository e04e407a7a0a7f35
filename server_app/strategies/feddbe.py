"""FedDBE: FedAvg, and a global mean of the features."""

from typing import Any

import torch

from pfedgpa_app.model_spec import ModelSpec
from pfedgpa_app.parameters import ParameterLayout, StateDict, weighted_average
from pfedgpa_app.protocol import FEATURE_MEAN
from server_app.global_model import weights_of
from server_app.replies import Upload
from server_app.strategies.shared_part import SharedPart


class FedDBE(SharedPart):
    """Domain bias eliminator, https://arxiv.org/abs/2311.14975.

    The global mean is that of the clients of the first round, weighted by examples, and stays as
    it is. The authors collect it from all clients before the first round.
    """

    def __init__(self, **kwargs: Any) -> None:
        self.mean: StateDict = {}
        super().__init__(**kwargs)

    def begin(self, spec: ModelSpec) -> None:
        """Set up the layout of extras."""
        super().begin(spec)
        dim = spec.linear_head.size[1]
        self.extras_layout = ParameterLayout.of({FEATURE_MEAN: torch.zeros(dim)})

    def extras(self, client: int) -> StateDict:
        """Return the global mean; empty in the first round."""
        return self.mean

    def learn(self, server_round: int, uploads: dict[int, Upload]) -> None:
        """Average the means of the first round."""
        if not self.mean:
            means = [upload.extras for upload in uploads.values()]
            self.mean = weighted_average(means, weights_of(uploads.values()))
            self.extras_layout = None  # clients upload theirs once
