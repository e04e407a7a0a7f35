"""What a client does with the model that it is sent: plain local training, by default."""

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
    """What a message asks for, on one device.

    Attributes
    ----------
    model
        With the parameters that were received; a method trains it in place.
    received
        A copy of these parameters.
    extras
        What the server sent beside the model, by name.
    data
        This client's images and labels.
    config
        The settings of the run.
    offset
        What is added to the logits, ``(num_classes,)``: the client's class prior, or zeros.
    memory
        What the method kept in earlier messages; what it writes is there in the next ones.
    generator
        On the CPU; fixed by seed, client and round.
    ledger
        What the client's uploads have told so far of its data, where they are private.
    uniform
        Draws what makes them private.
    build
        Makes the configured model anew, on the CPU.
    """

    model: nn.Module
    received: StateDict
    extras: StateDict
    data: ClientData
    config: Config
    offset: Tensor
    memory: StateDict
    generator: torch.Generator
    build: Callable[[], nn.Module]
    ledger: Ledger = field(default_factory=Ledger)
    uniform: Uniform = secure_uniform

    def new_model(self, state: StateDict) -> nn.Module:
        """Return another model, with the parameters of a state_dict.

        It is built, since not every model that was trained can be copied.
        """
        model = self.build().to(self.data.train_images.device)
        # Copies: a model may take the tensors that it is given for its own.
        model.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
        return model

    @cached_property
    def spec(self) -> ModelSpec:
        """What of the model trains."""
        return ModelSpec.of(self.build())

    @cached_property
    def head(self) -> Head:
        """The layer that makes the logits.

        Raises
        ------
        ModelError
            If there is none.
        """
        head = find_head(self.build(), self.data.info)
        if head is None:
            raise ModelError("the model has no layer that makes the logits")
        return head

    @property
    def body(self) -> list[str]:
        """The names of all parameters that are not the head's."""
        head = self.head.names
        return [name for name, _ in self.model.named_parameters() if name not in head]

    def fit(
        self,
        model: nn.Module,
        loss: Loss | None = None,
        epochs: int | None = None,
        learning_rate: float | None = None,
    ) -> None:
        """Train a model in place, by cross-entropy and as the settings of clients say by default.

        Parameters that require no gradient stay as they are.
        """
        data, client = self.data, self.config.client
        given = {"local_epochs": epochs, "learning_rate": learning_rate}
        client = client.model_copy(update={k: v for k, v in given.items() if v is not None})
        loss = loss or cross_entropy(self.offset)
        sample = (data.train_images, data.train_labels, data.stats)
        privacy = self.config.privacy
        if privacy.mode != "example":
            train(model, *sample, client, self.generator, loss=loss)
            return
        from client_app.dp_sgd import train_privately  # a package that only privacy needs

        self.ledger = self.ledger.after(*cost_of_round(privacy, client, len(data.train_labels)))
        train_privately(model, *sample, client, privacy, self.uniform, self.generator, loss=loss)

    def fit_near_received(self, model: nn.Module, strength: float) -> None:
        """Train a model in place by cross-entropy and ``strength / 2 |w - received|^2``."""
        plain, distance = cross_entropy(self.offset), proximal(self.received, strength)
        self.fit(model, lambda each, images, labels: plain(each, images, labels) + distance(each))

    def may_train(self) -> bool:
        """Tell whether another training leaves the client within its privacy budget."""
        privacy, client = self.config.privacy, self.config.client
        if privacy.mode != "example" or not privacy.epsilon:
            return True
        after = self.ledger.after(*cost_of_round(privacy, client, len(self.data.train_labels)))
        return after.epsilon(privacy.delta) <= privacy.epsilon

    def keep_private(self, state: StateDict) -> StateDict:
        """Return an upload as it may leave the client, with noise where the settings want it.

        The model has the parameters of it from then on, so that nothing tells of others.
        """
        privacy = self.config.privacy
        if not privacy.is_on:
            return state
        received = copy_of(self.received)
        if privacy.mode == "example":
            # What does not train is not noised, whatever the model wrote into it.
            return {n: t if n in self.spec.trained else received[n] for n, t in state.items()}
        cost = cost_of_round(privacy, self.config.client, len(self.data.train_labels))
        self.ledger = self.ledger.after(*cost)
        private = private_update(state, received, self.spec, privacy, self.uniform)
        private = self.spec.refreshed(private)
        self.model.load_state_dict(private)
        return private

    def judge(self, model: nn.Module) -> Evaluation:
        """Return accuracy and loss on this client's test set."""
        return Evaluation.of(self.test_logits(model), self.data.test_labels)

    def test_logits(self, model: nn.Module) -> Tensor:
        """Return a model's logits on this client's test set, ``(num_examples, num_classes)``."""
        data, precision = self.data, self.config.client.precision
        return logits_of(model, data.test_images, data.stats, precision) + self.offset


class Trained(NamedTuple):
    """What a client uploads: the parameters, and what its strategy wants beside them."""

    state: StateDict
    extras: StateDict


class Fit(NamedTuple):
    """A plain training: of a model, in place, as the task says by default."""

    task: Task
    model: nn.Module


class Method:
    """FedAvg's client (arXiv 1602.05629): SGD from the received model, all of which is uploaded.

    Subclasses say what else a client trains, uploads, keeps and is judged by. Those whose trainings
    are plain and do not depend on each other's results leave `train` as it is, so that the
    trainings of many clients can be done together (`client_app.batched`).
    """

    def personal_model(self, task: Task) -> nn.Module:
        """Return the model that this client uses, before or after its training."""
        return task.model

    def personal_state(self, task: Task) -> StateDict:
        """Return this model as a state_dict of the configured one, which others can load."""
        return copy_of(self.personal_model(task).state_dict())

    def fits(self, task: Task) -> Iterator[Fit]:
        """Yield what is trained, in the order in which it draws from the task's generator."""
        yield Fit(task, task.model)

    def upload(self, task: Task, models: Sequence[nn.Module]) -> Trained:
        """Return what is uploaded when the models of `fits` are trained."""
        return Trained(copy_of(models[0].state_dict()), {})

    def train(self, task: Task) -> Trained:
        """Train, and return what is uploaded."""
        models = []
        for fit in self.fits(task):
            fit.task.fit(fit.model)
            models.append(fit.model)
        return self.upload(task, models)
