"""The registry of strategies, and the sections of their settings.

docs/contributing.md says how to add one.
"""

from collections.abc import Mapping
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field

from pfedgpa_app.section import Count, NonNegative, Positive, Section, UnitInterval


class StrategyInfo(NamedTuple):
    """The classes of a strategy, ``module:Class``, and its requirements; FedAvg's by default."""

    server: str = "clientwise:ClientwiseFedAvg"  # in server_app/strategies
    client: str = "method:Method"  # in client_app/methods
    # Whether clients train by plain SGD and upload nothing but parameters, which privacy and
    # client.engine = "vmap" need.
    is_plain: bool = False
    # Of the layer that computes the logits: "" none, "any" that there is one, "linear" that it is
    # linear, "plain" that its weight can be replaced too, "biased" that it has a bias too.
    head: Literal["", "any", "linear", "plain", "biased"] = ""
    depends_on_length: bool = False  # whether rounds depend on the total number of rounds


_SHARED_PART = "shared_part:SharedPart"

STRATEGY_INFO: dict[str, StrategyInfo] = {
    "pfedgpa": StrategyInfo("pfedgpa:PFedGPA", "pfedgpa:PFedGPA", is_plain=True),
    "local": StrategyInfo("local:Local", is_plain=True),
    "fedavg": StrategyInfo(is_plain=True),
    "fedavg-ft": StrategyInfo("fedavg_ft:FedAvgFT", is_plain=True),
    "fedprox": StrategyInfo(client="fedprox:FedProx"),
    "fedper": StrategyInfo(_SHARED_PART, "fedper:FedPer", head="any"),
    "fedrep": StrategyInfo(_SHARED_PART, "fedrep:FedRep", head="any"),
    "lg-fedavg": StrategyInfo(_SHARED_PART, "lg_fedavg:LGFedAvg", head="any"),
    "ditto": StrategyInfo(_SHARED_PART, "ditto:Ditto"),
    "fedrod": StrategyInfo(_SHARED_PART, "fedrod:FedRoD", head="plain"),
    "fedamp": StrategyInfo("fedamp:FedAMP", "fedamp:FedAMP"),
    "fedpac": StrategyInfo("fedpac:FedPAC", "fedpac:FedPAC", head="linear"),
    "pfedhn": StrategyInfo("pfedhn:PFedHN"),
    # Clients get their points after a fraction of all rounds.
    "floco": StrategyInfo("floco:Floco", "floco:Floco", head="plain", depends_on_length=True),
    "ifca": StrategyInfo("ifca:IFCA", "ifca:IFCA"),
    "fedala": StrategyInfo(_SHARED_PART, "fedala:FedALA"),
    "feddbe": StrategyInfo("feddbe:FedDBE", "feddbe:FedDBE", head="biased"),
    "pfedfda": StrategyInfo("pfedfda:PFedFDA", "pfedfda:PFedFDA", head="biased"),
    "fedapa": StrategyInfo("fedapa:FedAPA", head="any"),
}
"""The strategies by the values of the setting ``strategy``."""
PLAIN_STRATEGIES = tuple(name for name, info in STRATEGY_INFO.items() if info.is_plain)


def classes_in(package: str, registered: Mapping[str, str]) -> dict[str, type[Any]]:
    """Import the classes ``module:Class`` of a package, by strategy."""
    return {key: resolve_name(f"{package}.{name}") for key, name in registered.items()}


if TYPE_CHECKING:
    StrategyName = str
else:  # type checkers accept only literal names
    StrategyName = Literal[tuple(STRATEGY_INFO)]


class FedProxConfig(Section):
    """FedProx, arXiv 1812.06127."""

    mu: NonNegative = 0.01


class FedAvgFTConfig(Section):
    """FedAvg with fine-tuning (arXiv 2108.07313); interpolated as in arXiv 2109.01903."""

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
    evaluated: Literal["trained", "sent"] = "trained"


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


class FedALAConfig(Section):
    """FedALA, arXiv 2212.01197."""

    layers: Count = 1
    sample: Annotated[float, Field(gt=0, le=1)] = 0.8
    learning_rate: Positive = 1.0


class FedDBEConfig(Section):
    """FedDBE, arXiv 2311.14975."""

    kappa: NonNegative = 50.0
    momentum: Annotated[float, Field(gt=0, le=1)] = 1.0


class PFedFDAConfig(Section):
    """pFedFDA, arXiv 2411.00329."""

    single_beta: bool = False
    ridge: Positive = 1.0


class FedAPAConfig(Section):
    """FedAPA, arXiv 2502.07456."""

    learning_rate: Positive = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9


class StrategySections(Section):
    """The strategy of a run, and the sections of strategies with settings."""

    strategy: StrategyName = "pfedgpa"
    # Named after their strategies.
    fedavg_ft: FedAvgFTConfig = FedAvgFTConfig()
    fedprox: FedProxConfig = FedProxConfig()
    fedrep: FedRepConfig = FedRepConfig()
    ditto: DittoConfig = DittoConfig()
    fedamp: FedAMPConfig = FedAMPConfig()
    fedpac: FedPACConfig = FedPACConfig()
    pfedhn: PFedHNConfig = PFedHNConfig()
    floco: FlocoConfig = FlocoConfig()
    ifca: IFCAConfig = IFCAConfig()
    fedala: FedALAConfig = FedALAConfig()
    feddbe: FedDBEConfig = FedDBEConfig()
    pfedfda: PFedFDAConfig = PFedFDAConfig()
    fedapa: FedAPAConfig = FedAPAConfig()
