"""The strategies: what each is called, what the settings must know of it, and its own section.

A new one is named in `STRATEGY_INFO` and, if it has settings, in `StrategySections`. Its server is
named in server_app/strategies, what its clients do in client_app/methods: docs/contributing.md.
"""

from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import Field

from pfedgpa_app.section import Count, NonNegative, Positive, Section, UnitInterval


class StrategyInfo(NamedTuple):
    """What the settings must know of a strategy.

    Attributes
    ----------
    is_plain
        Whether its clients train by plain SGD and upload nothing but parameters, so that noise can
        make that private, and many clients can be trained as one graph.
    head
        What it needs of the layer that makes the logits: "" nothing, "any" that there is one,
        "linear" that it is linear, "plain" that its weight can be replaced too.
    depends_on_length
        Whether a round depends on how many there are in all.
    """

    is_plain: bool = False
    head: Literal["", "any", "linear", "plain"] = ""
    depends_on_length: bool = False


STRATEGY_INFO: dict[str, StrategyInfo] = {
    "pfedgpa": StrategyInfo(is_plain=True),
    "local": StrategyInfo(is_plain=True),
    "fedavg": StrategyInfo(is_plain=True),
    "fedavg-ft": StrategyInfo(is_plain=True),
    "fedprox": StrategyInfo(),
    "fedper": StrategyInfo(head="any"),
    "fedrep": StrategyInfo(head="any"),
    "ditto": StrategyInfo(),
    "fedrod": StrategyInfo(head="plain"),
    "fedamp": StrategyInfo(),
    "fedpac": StrategyInfo(head="linear"),
    "pfedhn": StrategyInfo(),
    # Its clients get their points after a part of all rounds.
    "floco": StrategyInfo(head="plain", depends_on_length=True),
    "ifca": StrategyInfo(),
}
"""Every name that the setting ``strategy`` may have."""
PLAIN_STRATEGIES = tuple(name for name, info in STRATEGY_INFO.items() if info.is_plain)

if TYPE_CHECKING:
    StrategyName = str
else:  # type checkers want the names spelled out once more
    StrategyName = Literal[tuple(STRATEGY_INFO)]


class FedProxConfig(Section):
    """FedProx, arXiv 1812.06127."""

    mu: NonNegative = 0.01


class FedAvgFTConfig(Section):
    """FedAvg with local fine-tuning, as in arXiv 2108.07313; halfway, as in arXiv 2109.01903."""

    own_weight: UnitInterval = 1.0


class FedRepConfig(Section):
    """FedRep, arXiv 2102.07078."""

    head_epochs: Count = 10
    body_epochs: Count = 1


class DittoConfig(Section):
    """Ditto, arXiv 2012.04221."""

    penalty: NonNegative = 1.0


class FedAMPConfig(Section):
    """FedAMP, arXiv 2007.03797."""

    alpha: Positive = 1e4
    sigma: Positive = 1e6
    penalty: NonNegative = 1.0


class FedPACConfig(Section):
    """FedPAC, arXiv 2306.11867."""

    alignment: NonNegative = 1.0
    head_epochs: Count = 1
    head_learning_rate: Positive = 0.1
    judged: Literal["trained", "sent"] = "trained"


class PFedHNConfig(Section):
    """pFedHN, arXiv 2103.04628."""

    embedding_dim: Count = 6
    hidden_size: Count = 100
    hidden_layers: Count = 3
    learning_rate: Positive = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NonNegative = 1e-3
    max_gradient_norm: Positive = 50.0


class FlocoConfig(Section):
    """Floco, arXiv 2403.03333."""

    num_endpoints: Annotated[int, Field(ge=2)] = 10
    projection: UnitInterval = 0.5
    radius: Positive = 0.3


class IFCAConfig(Section):
    """IFCA, arXiv 2006.04088."""

    num_clusters: Count = 2


class StrategySections(Section):
    """The strategy of a run, and the sections of those that have settings."""

    strategy: StrategyName = "pfedgpa"
    # Sections go by the names of strategies.
    fedavg_ft: FedAvgFTConfig = FedAvgFTConfig()
    fedprox: FedProxConfig = FedProxConfig()
    fedrep: FedRepConfig = FedRepConfig()
    ditto: DittoConfig = DittoConfig()
    fedamp: FedAMPConfig = FedAMPConfig()
    fedpac: FedPACConfig = FedPACConfig()
    pfedhn: PFedHNConfig = PFedHNConfig()
    floco: FlocoConfig = FlocoConfig()
    ifca: IFCAConfig = IFCAConfig()
