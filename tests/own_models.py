"""Models of a user's own, as ``package.module:function`` names them."""

from torch import nn

from pfedgpa_app.config import DatasetInfo


def linear(info: DatasetInfo) -> nn.Module:
    """Return a linear classifier."""
    channels, height, width = info.shape
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, info.num_classes))


def with_dropout(info: DatasetInfo) -> nn.Module:
    """Return a linear classifier behind dropout."""
    channels, height, width = info.shape
    classify = nn.Linear(channels * height * width, info.num_classes)
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), classify)


def smooth(info: DatasetInfo) -> nn.Module:
    """Return a small CNN without kinks, in which rounding cannot become more than rounding."""
    channels, height, width = info.shape
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(height * width, info.num_classes),
    )
