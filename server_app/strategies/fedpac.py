"""FedPAC: one body for all, and an optimal combination of heads for each client."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pfedgpa_app.model_spec import ModelSpec
from pfedgpa_app.parameters import ParameterLayout, StateDict, weighted_average
from pfedgpa_app.protocol import CLASS_COUNTS, CLASS_MEANS, VARIANCE, WEIGHTED_MEANS
from pfedgpa_app.stateful import Kept
from server_app.global_model import weights_of
from server_app.momentum import Momentum
from server_app.replies import ReplyError, Upload
from server_app.strategies.fedavg_ft import FedAvgFT

MIN_SHARE = 1e-3


class FedPAC(FedAvgFT):
    """Feature alignment and classifier collaboration, https://arxiv.org/abs/2306.11867.

    A client starts from the average body and its own head, the convex combination of the round's
    heads with the smallest estimated error on its data (equation 12). Global class means of the
    features are weighted by examples. Clients that were not in a round keep their heads. Momentum
    is that of the average body and of each client's head.
    """

    arguments: ClassVar[Mapping[str, str]] = {"evaluated": "fedpac.evaluated"}
    heads: Kept[dict[int, StateDict]]
    head_momentum: Kept[Momentum]
    means: Kept[StateDict]

    def __init__(self, *, evaluated: str = "trained", **kwargs: Any) -> None:
        self.evaluated = evaluated
        self.heads = {}
        self.means = {}
        super().__init__(**kwargs)

    def begin(self, spec: ModelSpec) -> None:
        """Initialize the layout of extras."""
        super().begin(spec)
        self.head_momentum = Momentum(self.momentum, spec.trained)
        head = spec.linear_head
        self.head_names, (num_classes, dim) = head.names, head.size
        self.extras_layout = ParameterLayout.of(
            {
                CLASS_MEANS: torch.zeros(num_classes, dim),
                CLASS_COUNTS: torch.zeros(num_classes),
                WEIGHTED_MEANS: torch.zeros(num_classes, dim),
                VARIANCE: torch.zeros(1),
            }
        )

    def extras(self, client: int) -> StateDict:
        """Return the global class means; empty in the first round."""
        return self.means

    def check(self, client: int, upload: Upload) -> None:
        """Raise a `ReplyError` for invalid class statistics."""
        super().check(client, upload)
        counts, variance = upload.extras[CLASS_COUNTS], upload.extras[VARIANCE]
        if bool((counts < 0).any()) or bool((variance < 0).any()):
            raise ReplyError("its class-counts or its variance are negative")
        if not torch.equal(counts, counts.round()):
            raise ReplyError("its class-counts are not whole numbers")
        if int(counts.sum()) != upload.num_examples:
            raise ReplyError(
                f"its class-counts are {int(counts.sum())} in all; right would be the "
                f"{upload.num_examples} of its examples"
            )

    def learn(self, server_round: int, uploads: dict[int, Upload]) -> None:
        """Combine the heads and update the class means."""
        super().learn(server_round, uploads)
        self._learn_means(list(uploads.values()))
        heads = [
            {name: upload.state[name] for name in self.head_names} for upload in uploads.values()
        ]
        weighted = torch.stack([upload.extras[WEIGHTED_MEANS] for upload in uploads.values()])
        variances = torch.cat([upload.extras[VARIANCE] for upload in uploads.values()])
        for row, client in enumerate(uploads):
            shares = head_shares(weighted, variances, row)
            combined = weighted_average(heads, shares.tolist())
            head = self.heads.get(client, combined)
            self.heads[client] = self.head_momentum.step(head, combined, client)

    def _learn_means(self, uploads: list[Upload]) -> None:
        counts = torch.stack([upload.extras[CLASS_COUNTS] for upload in uploads])
        means = torch.stack([upload.extras[CLASS_MEANS] for upload in uploads])
        # Class counts are scaled by the limited number of examples.
        limits = [w / u.num_examples for w, u in zip(weights_of(uploads), uploads, strict=True)]
        counts = counts * torch.tensor(limits).unsqueeze(1)
        total = counts.sum(dim=0)
        weighted = (counts.unsqueeze(2) * means).sum(dim=0)
        mean = weighted / torch.where(total > 0, total, 1.0).unsqueeze(1)
        if self.means:  # classes without examples in this round keep theirs
            mean = torch.where(total.unsqueeze(1) > 0, mean, self.means[CLASS_MEANS])
            total = torch.where(total > 0, total, self.means[CLASS_COUNTS])
        self.means = {CLASS_MEANS: mean, CLASS_COUNTS: total}

    def training_state(self, client: int) -> StateDict:
        """Return the average with the client's head."""
        if client not in self.heads:
            return self.average
        return self.global_model.spec.refreshed(self.average | self.heads[client])

    def evaluation_state(self, client: int) -> StateDict:
        """Return the client's upload or, by the setting, the model that is sent."""
        trained = self.fine_tuned.get(client) if self.evaluated == "trained" else None
        return trained or self.training_state(client)


def head_shares(weighted: Tensor, variances: Tensor, row: int) -> Tensor:
    """Return the weights ``(n,)``, float64, of n clients' heads in that of client ``row``.

    They minimize ``sum_j a_j^2 V_j + |sum_j a_j (h_i - h_j)|^2`` with ``a >= 0``, ``sum a = 1``;
    ``weighted`` has h ``(n, num_classes, dim)``, ``variances`` V ``(n,)``. Shares below 0.001 are
    dropped, as in the authors' code, unless all are.
    """
    from scipy.optimize import nnls  # imported here: few runs need it, and it takes long

    deviations = (weighted[row] - weighted).flatten(1).double()
    matrix = torch.diag(variances.double()) + deviations @ deviations.T
    values, vectors = torch.linalg.eigh(matrix)
    root = values.clamp(min=0).sqrt().unsqueeze(1) * vectors.T
    # For x = s a with sum a = 1, |R x|^2 + (sum x - c)^2 is s^2 a'Pa + (s - c)^2: the minimizer a
    # does not depend on s, so non-negative least squares finds it. R is scaled for conditioning.
    scale = float(values[-1].clamp(min=1e-30).sqrt())
    system = torch.cat([root / scale, torch.ones(1, len(matrix), dtype=torch.float64)])
    target = np.append(np.zeros(len(matrix)), 1.0)
    solution, _ = nnls(system.numpy(), target)
    shares = torch.from_numpy(solution / solution.sum())
    if bool((shares >= MIN_SHARE).any()):
        shares[shares < MIN_SHARE] = 0.0
    return shares / shares.sum()
