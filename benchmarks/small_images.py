"""Fashion-MNIST in 14x14 pixels and small models for it."""

from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional

from pfedgpa_app.config import DataConfig, DatasetInfo
from pfedgpa_app.data import load_dataset

CLIENTS = 20
"""In five groups in most benchmarks."""
SMALL_IMAGES = {
    "data.dataset": "benchmarks.small_images:fashion_mnist",
    "data.shape": "1x14x14",
    "data.num-classes": 10,
    "model.name": "benchmarks.small_images:cnn",
    "server.min-available-nodes": 2,
}
"""Overrides of conf/fashion-mnist-20.toml for these images."""


def fashion_mnist(root: Path) -> tuple[Tensor, Tensor]:
    """Return the images of both sets, ``(70000, 1, 14, 14)``, uint8, and their labels."""
    dataset = load_dataset(DataConfig(dataset="fashion-mnist"), seed=0)
    images = functional.avg_pool2d(dataset.images.float(), 2).round().byte()
    return images, dataset.labels


def cnn(info: DatasetInfo) -> nn.Module:
    """Return two small convolutions and two linear layers; 6,218 parameters."""
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


def normalized_cnn(info: DatasetInfo) -> nn.Module:
    """Return `cnn` with batch normalization after both convolutions."""
    first, *pooled, second, pool, activation, flat, hidden, act, head = cnn(info)
    norms = nn.BatchNorm2d(8), nn.BatchNorm2d(16)
    return nn.Sequential(
        first, norms[0], *pooled, second, norms[1], pool, activation, flat, hidden, act, head
    )


def vision_transformer(info: DatasetInfo) -> nn.Module:
    """Return a small vision transformer of torchvision: 49 patches, 2 layers, 32 units."""
    from torchvision.models import VisionTransformer  # imported here: it takes seconds

    model = VisionTransformer(
        image_size=14,
        patch_size=2,
        num_layers=2,
        num_heads=4,
        hidden_dim=32,
        mlp_dim=64,
        num_classes=info.num_classes,
    )
    channels, _, _ = info.shape
    model.conv_proj = nn.Conv2d(channels, 32, kernel_size=2, stride=2)
    return model
