"""IFCA: one model per cluster, among which clients choose."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from pfedgpa_app.model_spec import ModelSpec
from pfedgpa_app.parameters import ParameterLayout, StateDict, weighted_average
from pfedgpa_app.protocol import CHOICE, CLUSTER, RECEIVED
from pfedgpa_app.randomness import make_generator
from pfedgpa_app.state import states_under
from pfedgpa_app.stateful import Kept
from server_app.global_model import weights_of
from server_app.momentum import Momentum
from server_app.replies import ReplyError, Upload
from server_app.strategies.clientwise import ClientwiseFedAvg


class IFCA(ClientwiseFedAvg):
    """Iterative federated clustering, https://arxiv.org/abs/2006.04088.

    Algorithm 1 with model averaging (option II): every client receives the models of all clusters
    and trains the one with the lowest loss on its own data; a cluster's model becomes the average
    of its clients' uploads. The first cluster starts with the initial model, the others with its
    entries permuted within each tensor.
    """

    arguments: ClassVar[Mapping[str, str]] = {"num_clusters": "ifca.num_clusters"}
    clusters: Kept[dict[int, StateDict]]
    choices: Kept[dict[int, int]]
    cluster_momentum: Kept[Momentum]

    def __init__(self, *, num_clusters: int = 2, **kwargs: Any) -> None:
        self.num_clusters = num_clusters
        self.choices = {}
        super().__init__(**kwargs)

    def begin(self, spec: ModelSpec) -> None:
        """Initialize the clusters' models."""
        super().begin(spec)
        self.cluster_momentum = Momentum(self.momentum, spec.trained)
        layout = self.global_model.layout
        vector, rest = layout.split(spec.initial)
        sizes = [entry.numel for entry in layout.generated]
        self.clusters = {0: spec.initial}
        for cluster in range(1, self.num_clusters):
            generator = make_generator(self.seed, "cluster", cluster)
            shuffled = [
                piece[torch.randperm(len(piece), generator=generator)]
                for piece in vector.split(sizes)
            ]
            self.clusters[cluster] = spec.refreshed(layout.merge(torch.cat(shuffled), rest))
        self.extras_layout = ParameterLayout.of({CHOICE: torch.zeros(self.num_clusters)})

    def extras(self, client: int) -> StateDict:
        """Return the number of the client's cluster, and the models of the others."""
        own, to_send = self.choices.get(client, 0), self.global_model.layout.to_send
        others = {each: to_send(state) for each, state in self.clusters.items() if each != own}
        return {RECEIVED: torch.tensor(own)} | states_under(CLUSTER, others)

    def check(self, client: int, upload: Upload) -> None:
        """Raise a `ReplyError` for an upload that does not choose one cluster."""
        super().check(client, upload)
        choice = upload.extras[CHOICE]
        if sorted(choice.tolist()) != [0.0] * (len(choice) - 1) + [1.0]:
            raise ReplyError(
                f"its cluster is {choice.tolist()}; right would be a 1 among {len(choice) - 1} 0s"
            )

    def learn(self, server_round: int, uploads: dict[int, Upload]) -> None:
        """Average every cluster's uploads."""
        chosen = {client: int(upload.extras[CHOICE].argmax()) for client, upload in uploads.items()}
        self.choices |= chosen
        # Limited over the round: a cluster's median may be that of one malicious client.
        counts = dict(zip(uploads, weights_of(uploads.values()), strict=True))
        for cluster in self.clusters:
            members = [client for client in chosen if chosen[client] == cluster]
            if members:
                states = [uploads[client].state for client in members]
                average = weighted_average(states, [counts[client] for client in members])
                moved = self.cluster_momentum.step(self.clusters[cluster], average, cluster)
                self.clusters[cluster] = self.global_model.spec.refreshed(moved)

    def evaluation_state(self, client: int) -> StateDict:
        """Return the model of the client's last cluster, at first the first one."""
        return self.clusters[self.choices.get(client, 0)]

    training_state = evaluation_state
