"""FedAvg of what clients share, while each keeps a part of its model."""

from typing import ClassVar

from server_app.strategies.clientwise import ClientwiseFedAvg


class SharedPart(ClientwiseFedAvg):
    """The server of FedPer, FedRep, LG-FedAvg, Ditto and FedRoD; their clients differ."""

    clients_keep_parts: ClassVar[bool] = True
