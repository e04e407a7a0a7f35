"""pFedHN: a hypernetwork on the server that generates every client's model."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pfedgpa_app.config import ConfigError
from pfedgpa_app.model_spec import ModelSpec
from pfedgpa_app.parameters import StateDict
from pfedgpa_app.randomness import drawing_from, make_generator
from pfedgpa_app.stateful import Kept
from pfedgpa_app.strategies import PFedHNConfig
from server_app.replies import Upload
from server_app.strategies.clientwise import ClientwiseFedAvg

MAX_WEIGHTS = 5 * 10**8
"""Limit of a hypernetwork: 2 GB, and 2 GB for its momentum."""


class PFedHN(ClientwiseFedAvg):
    """Personalized federated hypernetworks, https://arxiv.org/abs/2103.04628.

    A network h generates ``theta_i = h(v_i; phi)`` from a learned embedding of each client. If a
    client trains theta_i to theta~_i, phi and v_i follow the vector-Jacobian product with
    ``theta_i - theta~_i`` (Algorithm 1), by SGD with momentum and clipped gradients, with the step
    sizes of the authors' code. The paper has one client per round. Here a round's clients follow
    each other, each with its current theta_i: steps from the same phi would sum up too far. Buffers
    are averaged. The momentum of `ClientwiseFedAvg` does not apply.
    """

    arguments: ClassVar[Mapping[str, str]] = {"settings": "pfedhn"}
    embeddings: Kept[dict[int, Tensor]]
    network: Kept[nn.Sequential]
    velocity: Kept[dict[str, Tensor]]

    def __init__(self, *, settings: PFedHNConfig | None = None, **kwargs: Any) -> None:
        self.settings = settings or PFedHNConfig()
        self.embeddings = {}
        self.velocity = {}
        super().__init__(**kwargs)

    def begin(self, spec: ModelSpec) -> None:
        """Build the hypernetwork; a `ConfigError` if it would be too large."""
        super().begin(spec)
        settings, dim = self.settings, self.global_model.layout.dim
        size = settings.hidden_size
        num_weights = size * (dim + settings.hidden_layers * size)
        if num_weights > MAX_WEIGHTS:
            raise ConfigError(
                [
                    f"pfedhn.hidden-size = {size}: the hypernetwork of a model of "
                    f"{dim:,} parameters would have {num_weights:,} weights; right "
                    f"would be a smaller one, or a smaller model, with at most {MAX_WEIGHTS:,}"
                ]
            )
        sizes = [settings.embedding_dim] + [size] * (1 + settings.hidden_layers)
        with drawing_from(make_generator(self.seed, "hypernetwork")):
            layers: list[nn.Module] = []
            for inputs, outputs in pairwise(sizes):
                layers += [nn.Linear(inputs, outputs), nn.ReLU()]
            # One output layer for all tensors is the same as one each: rows are independent.
            self.network = nn.Sequential(*layers[:-1], nn.Linear(sizes[-1], dim))

    def training_state(self, client: int) -> StateDict:
        """Return the generated model of a client."""
        with torch.no_grad():
            theta = self.network(self._embedding(client))
        return self.global_model.with_vector(theta)

    evaluation_state = training_state

    def learn(self, server_round: int, uploads: dict[int, Upload]) -> None:
        """Take a step for each client's update."""
        for client, upload in uploads.items():
            self._step(client, upload.vector)

    def _step(self, client: int, trained: Tensor) -> None:
        """Update phi and the client's embedding, given its trained parameters ``(d,)``."""
        settings = self.settings
        embedding = self._embedding(client).clone().requires_grad_()
        names = [f"client.{client}", *(name for name, _ in self.network.named_parameters())]
        moving = [embedding, *self.network.parameters()]
        theta = self.network(embedding)
        gradients = torch.autograd.grad(theta, moving, grad_outputs=theta.detach() - trained)
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        scale = (settings.max_gradient_norm / (norm + 1e-6)).clamp(max=1.0)
        with torch.no_grad():
            for name, tensor, gradient in zip(names, moving, gradients, strict=True):
                step = gradient * scale + settings.weight_decay * tensor
                if name in self.velocity:
                    step += settings.momentum * self.velocity[name]
                self.velocity[name] = step
                tensor -= settings.learning_rate * step
        self.embeddings[client] = embedding.detach()

    def _embedding(self, client: int) -> Tensor:
        if client not in self.embeddings:
            generator = make_generator(self.seed, "embedding", client)
            self.embeddings[client] = torch.randn(self.settings.embedding_dim, generator=generator)
        return self.embeddings[client]
