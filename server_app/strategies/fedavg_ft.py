"""FedAvg-FT: the average, fine-tuned by every client on its own data."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from pfedgpa_app.parameters import StateDict
from pfedgpa_app.stateful import Kept
from server_app.replies import Upload
from server_app.strategies.clientwise import ClientwiseFedAvg


class FedAvgFT(ClientwiseFedAvg):
    """FedAvg evaluated after local fine-tuning.

    A client's personalized model is its last upload, so that it has no more local training than
    with other strategies.

    Parameters
    ----------
    own_weight : float (default: 1.0)
        Weight of the client's last upload in its model; the rest is the current average.
    """

    arguments: ClassVar[Mapping[str, str]] = {"own_weight": "fedavg_ft.own_weight"}
    fine_tuned: Kept[dict[int, StateDict]]

    def __init__(self, *, own_weight: float = 1.0, **kwargs: Any) -> None:
        self.own_weight = own_weight
        self.fine_tuned = {}
        super().__init__(**kwargs)

    def learn(self, server_round: int, uploads: dict[int, Upload]) -> None:
        """Keep the fine-tuned models."""
        self.fine_tuned |= {client: upload.state for client, upload in uploads.items()}

    def evaluation_state(self, client: int) -> StateDict:
        """Return the client's fine-tuned model, or the average if it never took part."""
        fine_tuned = self.fine_tuned.get(client, self.average)
        if self.own_weight == 1:
            return fine_tuned
        return {
            name: torch.lerp(self.average[name], own, self.own_weight)
            if own.is_floating_point()
            else own
            for name, own in fine_tuned.items()
        }
