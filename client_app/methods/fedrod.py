"""FedRoD: a generic head for balanced classes, and a personal one for the client's own."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from client_app.methods.heads import logits_and_features
from client_app.methods.method import Method, Task, Trained
from pfedgpa_app.model_spec import Head
from pfedgpa_app.parameters import StateDict, copy_of


class TwoHeads(nn.Module):
    """A model with an additional personal head, whose logits are added on the same features."""

    def __init__(self, generic: nn.Module, head: Head) -> None:
        super().__init__()
        layer = generic.get_submodule(head.layer)
        self.generic = generic
        self.head = head
        num_classes, dim = head.size
        device = next(layer.parameters()).device
        self.personal = nn.Linear(dim, num_classes, bias=layer.bias is not None, device=device)
        for parameter in self.personal.parameters():
            nn.init.zeros_(parameter)

    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return generic and personal logits, ``(n, num_classes)`` each.

        Gradients of the personal logits reach the personal head alone.
        """
        logits, features = logits_and_features(self.generic, self.head, images)
        return logits, logits.detach() + self.personal(features.detach())

    def forward(self, images: Tensor) -> Tensor:
        """Return the personal logits."""
        return self.both(images)[1]


class FedRoD(Method):
    """Balanced risk for the generic model, empirical risk for the personal head.

    The linear variant of arXiv 2107.00778 (Algorithm 1): the generic model minimizes the
    cross-entropy of ``logits + log n_c`` (balanced softmax), the personal head that of the sum of
    both heads' logits, without gradient into the generic model. The personal head is initialized
    at zero and never uploaded. ``client.class-prior`` applies to the personal logits alone.
    """

    def personal_model(self, task: Task) -> TwoHeads:
        """Return the model with both heads."""
        model = TwoHeads(task.model, task.head)
        if task.memory:
            model.personal.load_state_dict(task.memory)
        return model

    def personal_state(self, task: Task) -> StateDict:
        """Return the model with one head, the sum of both."""
        state = copy_of(task.model.state_dict())
        layer = task.head.layer
        for name, tensor in task.memory.items():
            whole = f"{layer}.{name}" if layer else name
            summed = state[whole] + tensor.cpu()
            state |= dict.fromkeys(task.spec.with_aliases([whole]), summed)
        return state

    def train(self, task: Task) -> Trained:
        """Train both heads and the features."""
        model = self.personal_model(task)
        num_classes = task.data.info.num_classes
        # -inf for missing classes removes their logits from the softmax.
        prior = torch.bincount(task.data.train_labels, minlength=num_classes).log()

        def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            assert isinstance(model, TwoHeads)
            generic, personal = (logits.float() for logits in model.both(images))
            balanced = functional.cross_entropy(generic + prior, labels)
            return balanced + functional.cross_entropy(personal + task.offset, labels)

        task.fit(model, loss)
        task.memory = copy_of(model.personal.state_dict())
        return self.upload(task, [task.model])
