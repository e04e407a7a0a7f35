"""Flower strategies: pFedGPA and the rivals that it is compared with."""

from pfedgpa_app.strategies import STRATEGY_INFO, classes_in
from server_app.strategies.clientwise import ClientwiseFedAvg
from server_app.strategies.fedavg_ft import FedAvgFT
from server_app.strategies.pfedgpa import PFedGPA

STRATEGIES: dict[str, type[ClientwiseFedAvg]] = classes_in(
    __name__, {name: info.server for name, info in STRATEGY_INFO.items()}
)
"""The class of each name that the setting ``strategy`` may have."""

__all__ = ["STRATEGIES", "ClientwiseFedAvg", "FedAvgFT", "PFedGPA"]
