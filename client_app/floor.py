"""The privacy floor: what a site demands of a run before it trains, and what it never sends."""

import math
from typing import Annotated, Literal

from flwr.app import Context
from pydantic import BaseModel, Field

from client_app.node import NodeError
from pfedgpa_app.config import ClientConfig, PrivacyConfig
from pfedgpa_app.files import quoted
from pfedgpa_app.privacy import Ledger, cost_of_round

PRIVACY_FLOOR = "privacy-floor"
"""The key of a node config with the words of a `Floor`."""
# The modes that protect as much: whoever hides all data of a client hides each example.
_AT_LEAST = {"example": ("example", "update"), "update": ("update",)}


class Floor(BaseModel, frozen=True):
    """The least privacy with which a site trains, and what of its metrics leaves it."""

    # As privacy.mode; empty if the site demands neither.
    mode: Literal["", "example", "update"] = ""
    # What uploads of a run spend at most, for this delta, whatever that of the run is.
    epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] = math.inf
    delta: Annotated[float, Field(gt=0, lt=1)] = PrivacyConfig().delta
    sends_metrics: bool = True  # accuracy and loss on its test set
    sends_normalization: bool = True  # mean and deviation of its data

    @classmethod
    def of(cls, context: Context) -> "Floor":
        """Read the node config, such as ``privacy-floor="example epsilon=3 no-metrics"``.

        Raises `NodeError` if a word is unknown: a floor that is not understood protects nobody.
        """
        text = str(context.node_config.get(PRIVACY_FLOOR, ""))
        fields: dict[str, str | bool] = {}
        try:
            for word in text.split():
                field: tuple[str, str | bool] = ("mode", word)
                match word.split("="):
                    case ["no-metrics" | "no-normalization"]:
                        field = (f"sends_{word.removeprefix('no-')}", False)
                    case ["epsilon" | "delta" as name, number]:
                        field = (name, number)
                if field[0] in fields:
                    raise ValueError(f"{field[0]} is repeated")
                fields |= [field]
            if "mode" not in fields and fields.keys() & {"epsilon", "delta"}:
                raise ValueError("there is no mode")
            return cls.model_validate(fields)
        except ValueError as error:
            raise NodeError(
                f"the {PRIVACY_FLOOR} of its node config is {quoted(text)}; right would be, for "
                'example, "example epsilon=3", "update epsilon=8 delta=0.00001" or "no-metrics '
                'no-normalization"'
            ) from error

    @property
    def demand(self) -> str:
        """The least privacy in words, such as ``example epsilon=3 delta=1e-05``."""
        if self.epsilon == math.inf:
            return self.mode
        return f"{self.mode} epsilon={self.epsilon:g} delta={self.delta:g}"

    def shortfall(
        self, privacy: PrivacyConfig, client: ClientConfig, ledger: Ledger, num_examples: int
    ) -> str:
        """Return what another training lacks of the privacy that the site demands, or "".

        ``ledger`` has what the site has spent in this run so far.
        """
        if not self.mode:
            return ""
        if privacy.mode not in _AT_LEAST[self.mode]:
            return f'privacy.mode = "{privacy.mode}"'
        if privacy.seeded_noise:
            return "privacy.seeded-noise = true"
        if self.epsilon < math.inf:
            after = ledger.after(*cost_of_round(privacy, client, num_examples))
            if (epsilon := after.epsilon(self.delta)) > self.epsilon:
                return f"epsilon would be {epsilon:.3g} for delta = {self.delta:g}"
        return ""
