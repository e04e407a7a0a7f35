"""What a site demands of the privacy of a run before it trains, and what it never tells."""

import math
from dataclasses import dataclass

from flwr.app import Context

from client_app.node import NodeError
from pfedgpa_app.config import ClientConfig, PrivacyConfig
from pfedgpa_app.files import quoted
from pfedgpa_app.privacy import Ledger, cost_of_round

PRIVACY_FLOOR = "privacy-floor"
"""The key of a node config with the words of a `Floor`."""
# The modes that protect as much: whoever hides all data of a client hides each example.
_AT_LEAST = {"example": ("example", "update"), "update": ("update",)}


@dataclass(frozen=True)
class Floor:
    """The least privacy with which a site trains.

    Attributes
    ----------
    mode
        ``example`` or ``update``, as ``privacy.mode``; empty if the site demands neither.
    epsilon
        What its uploads of a run may spend in all.
    delta
        For which epsilon holds, whatever the delta of the run is.
    tells_metrics
        Whether accuracy and loss on its test set may leave it.
    tells_normalization
        Whether mean and deviation of its data may.
    """

    mode: str = ""
    epsilon: float = math.inf
    delta: float = PrivacyConfig().delta
    tells_metrics: bool = True
    tells_normalization: bool = True

    @classmethod
    def of(cls, context: Context) -> "Floor":
        """Read the node config, such as ``privacy-floor="example epsilon=3 no-metrics"``.

        Raises
        ------
        NodeError
            If a word of it is not known: a floor that is not understood protects nobody.
        """
        text = str(context.node_config.get(PRIVACY_FLOOR, ""))
        words = text.split()
        modes = [word for word in words if word in _AT_LEAST]
        pairs = dict(word.split("=", 1) for word in words if "=" in word)
        flags = {"no-metrics", "no-normalization"} & set(words)
        try:
            numbers = {name: float(value) for name, value in pairs.items()}
            is_right = (
                len(modes) + len(pairs) + len(flags) == len(words)
                and len(modes) <= 1
                and (bool(modes) or not pairs)
                and numbers.keys() <= {"epsilon", "delta"}
                and 0 < numbers.get("epsilon", 1.0) < math.inf
                and 0 < numbers.get("delta", 0.5) < 1
            )
        except ValueError:
            is_right = False
        if not is_right:
            raise NodeError(
                f"the {PRIVACY_FLOOR} of its node config is {quoted(text)}; right would be, for "
                'example, "example epsilon=3", "update epsilon=8 delta=0.00001" or "no-metrics '
                'no-normalization"'
            )
        return cls(
            mode="".join(modes),
            tells_metrics="no-metrics" not in flags,
            tells_normalization="no-normalization" not in flags,
            **numbers,
        )

    @property
    def demand(self) -> str:
        """The least privacy in words, such as ``example epsilon=3 delta=1e-05``."""
        if self.epsilon == math.inf:
            return self.mode
        return f"{self.mode} epsilon={self.epsilon:g} delta={self.delta:g}"

    def shortfall(
        self, privacy: PrivacyConfig, client: ClientConfig, ledger: Ledger, num_examples: int
    ) -> str:
        """Say what another training lacks of the privacy that the site demands; empty if nothing.

        ``ledger`` is what the site has told in this run so far.
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
