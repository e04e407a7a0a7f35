"""The client side of a strategy: plain local training, by default."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pfedgpa_app.config import Config
from pfedgpa_app.data import ClientData
from pfedgpa_app.evaluation import Evaluation, logits_of
from pfedgpa_app.model_spec import Head, ModelError, ModelSpec, find_head
from pfedgpa_app.parameters import StateDict, copy_of
from pfedgpa_app.privacy import Ledger, Uniform, cost_of_round, private_update, secure_uniform
from pfedgpa_app.training import Loss, cross_entropy, proximal, train


@dataclass
class Task:
    """The work of one message, on one device."""

    model: nn.Module  # with the received parameters; a method trains it in place
    received: StateDict  # a copy of these parameters
    extras: StateDict  # further tensors that the server sent, by name
    data: ClientData
    config: Config
    offset: Tensor  # added to the logits, (num_classes,): the client's class prior, or zeros
    memory: StateDict  # the method's own tensors, which persist from message to message
    generator: torch.Generator  # on the CPU; seeded by run, client and round
    build: Callable[[], nn.Module]  # builds the configured model, on the CPU
    ledger: Ledger = field(default_factory=Ledger)  # privacy spent so far
    uniform: Uniform = secure_uniform  # source of the privacy noise

    def new_model(self, state: StateDict) -> nn.Module:
        """Build another model with the parameters of a state_dict.

        Not every trained model can be deep-copied.
        """
        model = self.build().to(self.data.train_inputs.device)
        # Cloned, since a model may keep the tensors that it is given.
        model.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
        return model

    @cached_property
    def spec(self) -> ModelSpec:
        """Which tensors of the model train."""
        return ModelSpec.of(self.build())

    @cached_property
    def head(self) -> Head:
        """The layer that makes the logits; raises `ModelError` if there is none."""
        head = find_head(self.build(), self.data.info)
        if head is None:
            raise ModelError("the model has no layer that makes the logits")
        return head

    @property
    def body(self) -> list[str]:
        """Names of all parameters outside the head."""
        head = self.head.names
        return [name for name, _ in self.model.named_parameters() if name not in head]

    def fit(
        self,
        model: nn.Module,
        loss: Loss | None = None,
        epochs: int | None = None,
        learning_rate: float | None = None,
    ) -> None:
        """Train a model in place, by default with cross-entropy and the settings of ``client``.

        Parameters without ``requires_grad`` stay fixed.
        """
        data, client = self.data, self.config.client
        given = {"local_epochs": epochs, "learning_rate": learning_rate}
        client = client.model_copy(update={k: v for k, v in given.items() if v is not None})
        loss = loss or cross_entropy(self.offset)
        sample = (data.train_inputs, data.train_labels, data.stats)
        privacy = self.config.privacy
        if privacy.mode != "example":
            train(model, *sample, client, self.generator, loss=loss)
            return
        from client_app.dp_sgd import train_privately  # imports opacus, an optional package

        self.ledger = self.ledger.after(*cost_of_round(privacy, client, len(data.train_labels)))
        train_privately(model, *sample, client, privacy, self.uniform, self.generator, loss=loss)

    def fit_near_received(self, model: nn.Module, strength: float) -> None:
        """Train a model in place by cross-entropy and ``strength / 2 |w - received|^2``."""
        plain, distance = cross_entropy(self.offset), proximal(self.received, strength)
        self.fit(model, lambda each, images, labels: plain(each, images, labels) + distance(each))

    @property
    def _cost(self) -> tuple[float, float, int]:
        privacy, client = self.config.privacy, self.config.client
        return cost_of_round(privacy, client, len(self.data.train_labels))

    def may_train(self) -> bool:
        """Return whether the privacy budget allows another training."""
        privacy = self.config.privacy
        if privacy.mode != "example" or not privacy.epsilon:
            return True
        return self.ledger.after(*self._cost).epsilon(privacy.delta) <= privacy.epsilon

    def keep_private(self, state: StateDict) -> StateDict:
        """Return the upload, with privacy noise if it is configured.

        The model gets the noised parameters too, so that no metric depends on the original ones.
        """
        privacy = self.config.privacy
        if not privacy.is_on:
            return state
        received = copy_of(self.received)
        if privacy.mode == "example":
            # DP-SGD covers trained tensors only; all others are sent back as received.
            return {n: t if n in self.spec.trained else received[n] for n, t in state.items()}
        self.ledger = self.ledger.after(*self._cost)
        private = private_update(state, received, self.spec, privacy, self.uniform)
        private = self.spec.refreshed(private)
        self.model.load_state_dict(private)
        return private

    def evaluate(self, model: nn.Module) -> Evaluation:
        """Return accuracy and loss on this client's test set."""
        return Evaluation.of(self.test_logits(model), self.data.test_labels)

    def test_logits(self, model: nn.Module) -> Tensor:
        """Return a model's logits on this client's test set, ``(num_examples, num_classes)``."""
        data, precision = self.data, self.config.client.precision
        return logits_of(model, data.test_inputs, data.stats, precision) + self.offset


class Trained(NamedTuple):
    """A client's upload: the parameters, and the extra tensors of its strategy."""

    state: StateDict
    extras: StateDict


class Fit(NamedTuple):
    """A training of a model by `Task.fit` with its defaults."""

    task: Task
    model: nn.Module


class Method:
    """FedAvg's client (arXiv 1602.05629): SGD from the received model, all of which is uploaded.

    Methods with plain, independent trainings keep `train`, so that many clients can be trained
    together (`client_app.batched`).
    """

    def personal_model(self, task: Task) -> nn.Module:
        """Return the client's personalized model, before or after training."""
        return task.model

    def personal_state(self, task: Task) -> StateDict:
        """Return the personalized model as a state_dict of the configured model."""
        return copy_of(self.personal_model(task).state_dict())

    def fits(self, task: Task) -> Iterator[Fit]:
        """Yield the trainings, in the order in which they use the task's generator."""
        yield Fit(task, task.model)

    def upload(self, task: Task, models: Sequence[nn.Module]) -> Trained:
        """Return the upload, given the trained models of `fits`."""
        return Trained(copy_of(models[0].state_dict()), {})

    def train(self, task: Task) -> Trained:
        """Train, and return the upload."""
        models = []
        for fit in self.fits(task):
            fit.task.fit(fit.model)
            models.append(fit.model)
        return self.upload(task, models)
