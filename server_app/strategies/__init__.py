"""Flower strategies: pFedGPA and the baselines it is compared with."""

from server_app.strategies.clientwise import ClientwiseFedAvg
from server_app.strategies.fedavg_ft import FedAvgFT
from server_app.strategies.local import Local
from server_app.strategies.pfedgpa import PFedGPA

__all__ = ["ClientwiseFedAvg", "FedAvgFT", "Local", "PFedGPA"]
