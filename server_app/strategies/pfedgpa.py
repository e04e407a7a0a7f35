"""pFedGPA: the server trains a diffusion model on the clients' parameters."""

from logging import INFO, WARNING
from typing import Any

from flwr.common import log

from pfedgpa_app.aggregation import GenerativeAggregator
from pfedgpa_app.config import DiffusionConfig
from pfedgpa_app.parameters import StateDict
from pfedgpa_app.state import below, under
from server_app.replies import Upload
from server_app.roster import Roster
from server_app.strategies.clientwise import ClientwiseFedAvg


class PFedGPA(ClientwiseFedAvg):
    """Generative parameter aggregation for personalized federated learning.

    Implementation based on https://arxiv.org/abs/2409.05701. Every upload is inverted to a latent
    code and denoised by a diffusion model of all clients' parameters; what comes back is the
    client's own model, improved by what the others learned. It is sent to that client alone, for
    training and for evaluation.

    Parameters
    ----------
    seed : int (default: 0)
        Fixes sampling, the denoiser's training and the noises.
    roster : Roster, optional
        Numbers the clients. By default in the order of their node ids.
    diffusion : DiffusionConfig, optional
        Settings of the diffusion model, among them which layers it generates.
    **kwargs : Any
        The arguments of Flower's `FedAvg`, such as ``fraction_train``.

    Examples
    --------
    >>> strategy = PFedGPA(fraction_train=0.5, diffusion=DiffusionConfig(fidelity=0.5))
    >>> strategy.start(grid, initial_arrays=ArrayRecord(model.state_dict()), num_rounds=20)
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        roster: Roster | None = None,
        diffusion: DiffusionConfig | None = None,
        **kwargs: Any,
    ) -> None:
        diffusion = diffusion or DiffusionConfig()
        super().__init__(generated_layers=diffusion.patterns, seed=seed, roster=roster, **kwargs)
        self.aggregator = GenerativeAggregator(diffusion, seed)

    def learn(self, server_round: int, uploads: dict[int, Upload]) -> None:
        """Put the uploads into the bank, train the diffusion model and denoise every client."""
        assert self.layout is not None
        for client, upload in uploads.items():
            self.aggregator.observe(client, self.layout.split(upload.state)[0])
        try:
            self.aggregator.fit(server_round, self.layout.split(self.average)[0])
        except FloatingPointError as error:
            log(WARNING, "pFedGPA: everyone keeps its upload in this round: %s", error)
            return
        log(
            INFO,
            "pFedGPA: %d clients in %d dimensions",
            len(self.aggregator.bank),
            self.aggregator.subspace.dim if self.aggregator.subspace else 0,
        )

    def state(self) -> StateDict:
        """Return all that the next round needs, as named tensors."""
        return super().state() | under("aggregator", self.aggregator.state())

    def restore(self, tensors: StateDict) -> None:
        """Take over what `state` returned."""
        super().restore(tensors)
        self.aggregator.restore(below("aggregator", tensors))

    def training_state(self, client: int) -> StateDict:
        """Return the model generated for a client, or the average if nothing is known of it."""
        if client not in self.aggregator.bank:
            return self.average
        assert self.layout is not None
        vector = self.aggregator.personalize(client)
        return self.layout.merge(vector, self.layout.rest(self.average))

    def evaluation_state(self, client: int) -> StateDict:
        """Return the model generated for a client, or the average if nothing is known of it."""
        return self.training_state(client)

    def summary(self) -> None:
        """Log the settings."""
        super().summary()
        log(INFO, "\t└──> Diffusion: %s", self.aggregator.config)
