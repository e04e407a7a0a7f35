"""The client side of each strategy."""

from client_app.methods.method import Fit, Method, Task, Trained
from pfedgpa_app.strategies import STRATEGY_INFO, classes_in

METHODS: dict[str, type[Method]] = classes_in(
    __name__, {name: info.client for name, info in STRATEGY_INFO.items()}
)
"""The client method of each strategy; `Method` is FedAvg's."""

__all__ = ["METHODS", "Fit", "Method", "Task", "Trained"]
