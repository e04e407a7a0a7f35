"""The models that clients train. Every one maps ``(batch, *shape)`` to logits."""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from pfedgpa_app.config import DatasetInfo
from pfedgpa_app.model_spec import ModelError
from pfedgpa_app.own_functions import OwnFunctionError, own_function
from pfedgpa_app.randomness import drawing_from, global_draws, make_generator

_MLP_WIDTH = 64


def small_cnn(info: DatasetInfo) -> nn.Module:
    """Two 3x3 convolutions and two linear layers for 8x8 images; 13,706 parameters on digits."""
    channels, _, _ = info.shape
    convolutions = [nn.Conv2d(channels, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)]
    return _chain(convolutions, [nn.Linear(32 * 2 * 2, 64), nn.Linear(64, info.num_classes)])


def cnn(info: DatasetInfo) -> nn.Module:
    """Return the CNN of the FedPAC line of work for 28x28 images; 117,066 parameters on MNIST."""
    channels, _, _ = info.shape
    convolutions = [nn.Conv2d(channels, 16, 5), nn.Conv2d(16, 32, 5, padding=1)]
    return _chain(convolutions, [nn.Linear(32 * 5 * 5, 128), nn.Linear(128, info.num_classes)])


def cifar_cnn(info: DatasetInfo) -> nn.Module:
    """Three 3x3 convolutions and two linear layers for 32x32 images; 156,074 parameters."""
    channels, _, _ = info.shape
    convolutions = [
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.Conv2d(32, 64, 3, padding=1),
    ]
    return _chain(convolutions, [nn.Linear(64 * 4 * 4, 128), nn.Linear(128, info.num_classes)])


def resnet18(info: DatasetInfo) -> nn.Module:
    """torchvision's ResNet-18 for images of any size; small ones skip the first down-sampling."""
    import torchvision  # imported here: it takes seconds

    channels, height, width = info.shape
    model: nn.Module = torchvision.models.resnet18(num_classes=info.num_classes)
    if min(height, width) < 64:
        model.conv1 = nn.Conv2d(channels, 64, kernel_size=3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    elif channels != 3:
        model.conv1 = nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
    return model


def mlp(info: DatasetInfo) -> nn.Module:
    """Two hidden layers of 64 for the rows of a table; 6,274 parameters for 30 features."""
    (features,) = info.shape
    linears = [
        nn.Linear(features, _MLP_WIDTH),
        nn.Linear(_MLP_WIDTH, _MLP_WIDTH),
        nn.Linear(_MLP_WIDTH, info.num_classes),
    ]
    return _chain([], linears)


def signal_cnn(info: DatasetInfo) -> nn.Module:
    """Two 1-D convolutions and a linear layer for signals; 18,471 parameters for 6x100."""
    channels, length = info.shape
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv1d(channels, 32, 5, padding=2),
            activation1=nn.LeakyReLU(),
            pool1=nn.MaxPool1d(2),
            conv2=nn.Conv1d(32, 64, 5, padding=2),
            activation2=nn.LeakyReLU(),
            pool2=nn.MaxPool1d(3),
            flatten=nn.Flatten(),
            fc=nn.Linear(64 * (length // 2 // 3), info.num_classes),
        )
    )


MODELS: dict[str, Callable[[DatasetInfo], nn.Module]] = {
    "cnn-8x8": small_cnn,
    "cnn-28x28": cnn,
    "cnn-cifar": cifar_cnn,
    "resnet18": resnet18,
    "mlp": mlp,
    "cnn-1d": signal_cnn,
}


def build_model(name: str, info: DatasetInfo, seed: int) -> nn.Module:
    """Build a model by its name, or by ``package.module:function``, called with ``info``.

    The initial parameters depend on ``seed`` alone; the global random state does not change. Raises
    `ModelError` if the function cannot be imported or fails, or does not return a module.
    """
    named, make = f'model.name = "{name}"', MODELS.get(name)
    with drawing_from(make_generator(seed, "model")):
        try:
            model = (make or own_function(name))(info)
        except OwnFunctionError as error:
            raise ModelError(f"{named}: {error}") from error
        except Exception as error:  # user code may raise anything
            raise ModelError(f"{named}: building it failed with {error!r}") from error
        if not isinstance(model, nn.Module):
            raise ModelError(f"{named}: returned {type(model).__name__}, not a torch.nn.Module")
    return model


def _chain(convolutions: list[nn.Conv2d], linears: list[nn.Linear]) -> nn.Module:
    """Chain the layers with leaky ReLU and pooling; their names are conv1, ..., fc1, ..."""
    layers: dict[str, nn.Module] = {}
    for number, convolution in enumerate(convolutions, start=1):
        layers[f"conv{number}"] = convolution
        layers[f"activation{number}"] = nn.LeakyReLU()
        layers[f"pool{number}"] = nn.MaxPool2d(2)
    layers["flatten"] = nn.Flatten()
    for number, linear in enumerate(linears, start=1):
        if number > 1:
            layers[f"fc_activation{number - 1}"] = nn.LeakyReLU()
        layers[f"fc{number}"] = linear
    return nn.Sequential(OrderedDict(layers))


def mixing_layers(model: nn.Module) -> str:
    """Return the layers that compute or keep statistics over a batch, with their types."""
    return _listed(
        model,
        lambda each: isinstance(each, _BatchNorm) or getattr(each, "track_running_stats", False),
    )


def unfit_for_vmap(build: Callable[[], nn.Module], info: DatasetInfo) -> list[str]:
    """Return why ``client.engine = "vmap"`` cannot train a model; empty if it can.

    Unsuitable layer types are looked up; then one step of two models is tried on blank examples.
    """
    trials = [build().train() for _ in range(2)]
    model = trials[0]
    if mixing := mixing_layers(model):
        return [f"layers with batch statistics are not supported: {mixing}"]
    if drawing := _listed(model, lambda each: isinstance(each, _DropoutNd) and each.p > 0):
        return [f"random layers are not supported: {drawing}"]
    images = torch.zeros(2, 2, *info.shape)
    parameters, buffers = stack_module_state(trials)

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor) -> Tensor:
        logits: Tensor = functional_call(trials[0], (parameters, buffers), (images,))
        return logits.float().sum()

    try:
        with torch.no_grad(), drawing_from(make_generator(0, "trial"), images.device):
            before = global_draws()
            trials[1](images[1])
            if global_draws() != before:
                return ["random numbers of NumPy or Python in the forward pass are not supported"]
        changed = [n for n, b in trials[1].named_buffers() if not torch.equal(b, buffers[n][1])]
        if changed:
            return [f"buffers that change in training are not supported: {', '.join(changed)}"]
        vmap(grad(loss))(parameters, buffers, images)
    except Exception as error:  # user code may raise anything
        reason = str(error).partition("\n")[0]
        return [f"torch.func.vmap cannot train it: {reason}"]
    return []


def _listed(model: nn.Module, is_wanted: Callable[[nn.Module], bool]) -> str:
    """Return the names and types of some layers; "" if there are none."""
    return ", ".join(
        f"{name or 'the model'} ({type(layer).__name__})"
        for name, layer in model.named_modules()
        if is_wanted(layer)
    )
