"""Flower strategies: pFedGPA and its baselines."""

from pfedgpa_app.strategies import STRATEGY_INFO, classes_in
from server_app.strategies.clientwise import ClientwiseFedAvg
from server_app.strategies.fedavg_ft import FedAvgFT
from server_app.strategies.pfedgpa import PFedGPA

STRATEGIES: dict[str, type[ClientwiseFedAvg]] = classes_in(
    __name__, {name: info.server for name, info in STRATEGY_INFO.items()}
)
"""The class of each value of the setting ``strategy``."""

__all__ = ["STRATEGIES", "ClientwiseFedAvg", "FedAvgFT", "PFedGPA"]
