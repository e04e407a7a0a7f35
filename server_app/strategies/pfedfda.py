"""pFedFDA: an average body, and global Gaussians of the features of each class."""

from typing import Any, ClassVar

import torch

from pfedgpa_app.model_spec import ModelSpec
from pfedgpa_app.parameters import ParameterLayout, StateDict, weighted_average
from pfedgpa_app.protocol import CLASS_MEANS, COVARIANCE
from pfedgpa_app.randomness import make_generator
from server_app.global_model import weights_of
from server_app.replies import ReplyError, Upload
from server_app.strategies.clientwise import ClientwiseFedAvg


class PFedFDA(ClientwiseFedAvg):
    """Feature distribution adaptation, https://arxiv.org/abs/2411.00329.

    The global means and covariance are the averages of clients' mixtures, weighted by examples. At
    first the means are uniform in 0 .. 1 and the covariance is the identity. Only clients know
    their heads. Momentum is that of the average body.
    """

    clients_keep_parts: ClassVar[bool] = True

    def __init__(self, **kwargs: Any) -> None:
        self.gaussians: StateDict = {}
        super().__init__(**kwargs)

    def begin(self, spec: ModelSpec) -> None:
        """Draw the means."""
        super().begin(spec)
        num_classes, dim = spec.linear_head.size
        means = torch.rand(num_classes, dim, generator=make_generator(self.seed, "means"))
        self.gaussians = {CLASS_MEANS: means, COVARIANCE: torch.eye(dim)}
        self.extras_layout = ParameterLayout.of(self.gaussians)

    def extras(self, client: int) -> StateDict:
        """Return the global means and covariance."""
        return self.gaussians

    def check(self, client: int, upload: Upload) -> None:
        """Refuse a covariance that is none.

        Raises `ReplyError` if it is not symmetric and positive definite.
        """
        super().check(client, upload)
        covariance = upload.extras[COVARIANCE].double()
        largest = covariance.abs().max()
        is_symmetric = bool((covariance - covariance.T).abs().max() <= 1e-5 * largest)
        if not is_symmetric or bool(torch.linalg.cholesky_ex(covariance).info):
            raise ReplyError(
                "its covariance is not symmetric and positive definite; right would be one that is"
            )

    def learn(self, server_round: int, uploads: dict[int, Upload]) -> None:
        """Average the Gaussians."""
        found = [upload.extras for upload in uploads.values()]
        self.gaussians = weighted_average(found, weights_of(uploads.values()))
