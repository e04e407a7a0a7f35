"""What the clients of each strategy do."""

from client_app.methods.ditto import Ditto
from client_app.methods.fedamp import FedAMP
from client_app.methods.fedpac import FedPAC
from client_app.methods.fedper import FedPer
from client_app.methods.fedprox import FedProx
from client_app.methods.fedrep import FedRep
from client_app.methods.fedrod import FedRoD
from client_app.methods.floco import Floco
from client_app.methods.ifca import IFCA
from client_app.methods.method import Fit, Method, Task, Trained
from client_app.methods.pfedgpa import PFedGPA

METHODS: dict[str, type[Method]] = {
    "pfedgpa": PFedGPA,
    "local": Method,
    "fedavg": Method,
    "fedavg-ft": Method,
    "fedprox": FedProx,
    "fedper": FedPer,
    "fedrep": FedRep,
    "ditto": Ditto,
    "fedrod": FedRoD,
    "fedamp": FedAMP,
    "fedpac": FedPAC,
    "pfedhn": Method,
    "floco": Floco,
    "ifca": IFCA,
}
"""What the clients of each strategy do; `Method` is FedAvg's."""

__all__ = ["METHODS", "Fit", "Method", "Task", "Trained"]
