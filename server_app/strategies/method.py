"""What the server of a strategy does, by default what FedAvg's does."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from pfedgpa_app.model_spec import ModelSpec
from pfedgpa_app.parameters import ParameterLayout, StateDict
from pfedgpa_app.rounds import Row
from pfedgpa_app.state import states_below, states_under
from server_app.global_model import GlobalModel, average_of
from server_app.replies import ReplyError, Upload


class ServerMethod:
    """All that a strategy may override. It knows clients by number, and nothing of messages.

    In a round come `prepare`, `training_states` and `extras` of each client, `check` of each
    upload, `judge` and `counts`, `combine` and `learn`, then `evaluation_states` and
    `evaluation_extras`.

    Parameters
    ----------
    generated_layers : Sequence[str]
        Patterns of the names of the parameters that uploads have as a vector.
    seed : int
        Fixes all that the strategy draws at random.
    momentum : float
        Part of its last step by which the average goes on.
    model : torch.nn.Module, optional
        The clients' model, if `start` shall know what of it trains. Without it everything of
        floating point does, but the statistics of normalization layers.
    **kwargs : Any
        The arguments of what comes next in the order of classes, Flower's `FedAvg`.

    Attributes
    ----------
    clients_keep_parts : bool
        Whether a personalized model is known to its client alone, so that the server can neither
        write it down nor go on with another run's clients.
    extras_are_optional : bool
        Whether an upload without what is expected beside the parameters is used all the same.
    global_model : GlobalModel
        The average of all, once `begin` has made it.
    has_begun : bool
        Whether it has.
    extras_layout : ParameterLayout | None
        What clients must upload beside the parameters, as `extras` is what they are sent.
    sites : dict[int, StateDict]
        What each client last told of its data, by client, as `Upload.site` has it.
    unusual : dict[int, str]
        From which clients of the current round the others do not learn, and why.
    """

    clients_keep_parts: ClassVar[bool] = False
    extras_are_optional: ClassVar[bool] = False
    global_model: GlobalModel

    def __init__(
        self,
        *,
        generated_layers: Sequence[str],
        seed: int,
        momentum: float,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.generated_layers = tuple(generated_layers)
        self.seed = seed
        self.momentum = momentum
        self.model = model
        self.has_begun = False
        self.extras_layout: ParameterLayout | None = None
        self.sites: dict[int, StateDict] = {}
        self.unusual: dict[int, str] = {}

    def begin(self, spec: ModelSpec) -> None:
        """Make all that depends on the clients' model, whose tensors are in the vectors' order.

        Raises
        ------
        ParameterError
            If a pattern takes no tensor of it, or nothing would be generated.
        """
        self.global_model = GlobalModel(spec, self.generated_layers, self.momentum)
        self.has_begun = True

    @property
    def average(self) -> StateDict:
        """The average of all clients' models."""
        return self.global_model.average

    def training_state(self, client: int) -> StateDict:
        """Return the state_dict that a client starts its local training from."""
        return self.average

    def evaluation_state(self, client: int) -> StateDict:
        """Return the state_dict of a client's personalized model."""
        return self.average

    def training_states(self, clients: Sequence[int]) -> Iterable[StateDict]:
        """Return the `training_state` of each client, which may be cheaper of many at once."""
        return map(self.training_state, clients)

    def evaluation_states(self, clients: Sequence[int]) -> Iterable[StateDict]:
        """Return the `evaluation_state` of each client, one by one as they are asked for."""
        return map(self.evaluation_state, clients)

    def prepare(self, server_round: int, clients: Sequence[int]) -> None:
        """Take note of who will train in a round; by default nothing is to be done."""

    def extras(self, client: int) -> StateDict:
        """Return what a client is sent beside its parameters."""
        return {}

    def evaluation_extras(self, client: int) -> StateDict:
        """Return what a client is sent beside the parameters that it judges."""
        return self.extras(client)

    def expected_extras(self, client: int) -> ParameterLayout | None:
        """Return what a client must upload beside the parameters; None for nothing."""
        return self.extras_layout

    def judge(self, uploads: dict[int, Upload]) -> dict[int, str]:
        """Return from which clients of a round the others should not learn, and why."""
        return {}

    def counts(self, client: int) -> bool:
        """Tell whether a client's upload has its part in the average."""
        return client not in self.unusual

    def check(self, client: int, upload: Upload) -> None:
        """Refuse an upload that fits the model and cannot be used all the same.

        Raises
        ------
        ReplyError
            If its data are another partition than before, as when a run is resumed with more
            clients.
        """
        before = self.sites.get(client, {}).get("partition")
        now = upload.site.get("partition")
        if before is not None and now is not None and not torch.equal(before, now):
            raise ReplyError(
                f"its data are partition {now[0]} of {now[1]}, and were {before[0]} of "
                f"{before[1]}; right would be as many clients as in the rounds before"
            )

    def combine(self, uploads: Sequence[Upload]) -> StateDict:
        """Return what the average becomes, by default that of uploads by their examples."""
        return average_of(uploads)

    def learn(self, server_round: int, uploads: dict[int, Upload]) -> None:
        """Take in the uploads of a round by client; the average is up to date already."""

    def trace(self) -> Row:
        """Return what was learned in the round, as numbers for method.jsonl; by default nothing."""
        return {}

    def store_below(self, folder: Path, earlier: Path | None) -> None:
        """Keep what is seldom needed in files below a run's folder; by default there is nothing.

        ``earlier`` is the folder of the run to go on from.
        """

    def sweep(self) -> None:
        """Remove such files that no checkpoint counts on any more."""

    def state(self) -> StateDict:
        """Return all that the next round needs, as named tensors."""
        return self.global_model.state() | states_under("site", self.sites)

    def restore(self, tensors: StateDict) -> None:
        """Take over what `state` returned, after `begin`.

        Raises
        ------
        ValueError
            If it is another model's, or of other settings.
        """
        self.global_model.restore(tensors)
        self.sites = states_below("site", tensors)
