"""Local training without collaboration, the baseline."""

from typing import Any

from pfedgpa_app.model_spec import ModelSpec
from pfedgpa_app.parameters import StateDict
from pfedgpa_app.stateful import Kept
from server_app.replies import Upload
from server_app.strategies.clientwise import ClientwiseFedAvg


class Local(ClientwiseFedAvg):
    """Every client continues from its own last upload."""

    initial: Kept[StateDict]
    uploads: Kept[dict[int, StateDict]]

    def __init__(self, **kwargs: Any) -> None:
        self.uploads = {}
        super().__init__(**kwargs)

    def begin(self, spec: ModelSpec) -> None:
        """Keep the initial model."""
        super().begin(spec)
        self.initial = spec.initial

    def learn(self, server_round: int, uploads: dict[int, Upload]) -> None:
        """Keep the uploads."""
        self.uploads |= {client: upload.state for client, upload in uploads.items()}

    def training_state(self, client: int) -> StateDict:
        """Return the client's last upload, or the initial model."""
        return self.uploads.get(client, self.initial)

    evaluation_state = training_state
