"""FedAvg of the shared part of models whose other part stays with clients."""

from typing import ClassVar

from server_app.strategies.clientwise import ClientwiseFedAvg


class SharedPart(ClientwiseFedAvg):
    """The server of FedPer, FedRep, LG-FedAvg, Ditto, FedRoD and FedALA; their clients differ."""

    clients_keep_parts: ClassVar[bool] = True
