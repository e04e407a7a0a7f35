"""A ClientApp that trains on poisoned data if its node config says so.

``poison='labels'`` has every label c read ``num_classes - 1 - c``. ``poison='trigger'`` marks every
other image in a corner and labels it `TARGET`, as for a backdoor.
"""

from unittest import mock

from flwr.app import Context, Message
from torch import Tensor

from benchmarks.dishonest import honest, training_by
from client_app import messages
from pfedgpa_app.config import Config
from pfedgpa_app.data import ClientData

TARGET = 0
"""The class that a backdoor predicts for images with the trigger."""
_SIZE = 3


def train(message: Message, context: Context) -> Message:
    """Train like the honest client, on poisoned data."""
    with mock.patch.object(messages, "load_data", _load_falsified):
        return honest(message, context)


def with_trigger(images: Tensor) -> Tensor:
    """Return images ``(n, channels, height, width)`` with a bright square in a corner."""
    marked = images.clone()
    marked[..., :_SIZE, :_SIZE] = images.max()
    return marked


def falsified(data: ClientData, poison: str) -> ClientData:
    """Return a client's data with poisoned training examples."""
    images, labels = data.train_inputs, data.train_labels
    match poison:
        case "labels":
            return data._replace(train_labels=data.info.num_classes - 1 - labels)
        case "trigger":
            images, labels = images.clone(), labels.clone()
            images[::2] = with_trigger(images[::2])
            labels[::2] = TARGET
            return data._replace(train_inputs=images, train_labels=labels)
        case "":
            return data
    raise ValueError(f'poison = "{poison}"')


_load = messages.load_data


def _load_falsified(config: Config, context: Context) -> ClientData:
    return falsified(_load(config, context), str(context.node_config.get("poison", "")))


app = training_by(train)
