"""FedAvg-FT: the average, fine-tuned by every client on its own data."""

from typing import Any

from pfedgpa_app.parameters import StateDict
from pfedgpa_app.state import states_below, states_under
from server_app.replies import Upload
from server_app.strategies.clientwise import ClientwiseFedAvg


class FedAvgFT(ClientwiseFedAvg):
    """FedAvg judged after local fine-tuning.

    A client's personalized model is what it made of the average in its last round of local
    training, so that the comparison spends no more training on it than on any other strategy.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.fine_tuned: dict[int, StateDict] = {}

    def learn(self, server_round: int, uploads: dict[int, Upload]) -> None:
        """Keep the fine-tuned models."""
        self.fine_tuned |= {client: upload.state for client, upload in uploads.items()}

    def state(self) -> StateDict:
        """Return all that the next round needs, as named tensors."""
        return super().state() | states_under("fine-tuned", self.fine_tuned)

    def restore(self, tensors: StateDict) -> None:
        """Take over what `state` returned."""
        super().restore(tensors)
        self.fine_tuned = states_below("fine-tuned", tensors)

    def evaluation_state(self, client: int) -> StateDict:
        """Return the client's fine-tuned model, or the average if it never took part."""
        return self.fine_tuned.get(client, self.average)
