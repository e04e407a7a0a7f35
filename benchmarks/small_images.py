"""Fashion-MNIST in a quarter of its pixels, and a model for it: for runs by the dozen."""

from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional

from pfedgpa_app.config import DataConfig, DatasetInfo
from pfedgpa_app.data import load_dataset


def fashion_mnist(root: Path) -> tuple[Tensor, Tensor]:
    """Return the images of both sets, ``(70000, 1, 14, 14)``, uint8, and their labels."""
    dataset = load_dataset(DataConfig(dataset="fashion-mnist"), seed=0)
    images = functional.avg_pool2d(dataset.images.float(), 2).round().byte()
    return images, dataset.labels


def cnn(info: DatasetInfo) -> nn.Module:
    """Return two small convolutions and two linear layers; 6,178 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.MaxPool2d(2),
        nn.LeakyReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.MaxPool2d(2),
        nn.LeakyReLU(),
        nn.Flatten(),
        nn.Linear(144, 32),
        nn.LeakyReLU(),
        nn.Linear(32, info.num_classes),
    )
