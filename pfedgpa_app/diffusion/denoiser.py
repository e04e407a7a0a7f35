"""The denoisers, conditioned on the timestep: a residual network on vectors, and a 1-D U-Net."""

import math

import torch
from torch import Tensor, nn

# GroupNorm's groups in the U-Net; channel numbers are multiples of it.
_GROUPS = 8
_KERNEL = 5


class TimeEmbedding(nn.Module):
    """Timesteps ``(batch,)`` as ``(batch, size)``: sinusoids (arXiv 1706.03762) and two layers."""

    frequencies: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        half = size // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half) / half)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.layers = nn.Sequential(nn.Linear(2 * half, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, t: Tensor) -> Tensor:
        """Return the embedding."""
        phase = t[:, None] * self.frequencies
        embedded: Tensor = self.layers(torch.cat([phase.sin(), phase.cos()], dim=1))
        return embedded


class ResidualDenoiser(nn.Module):
    """Predict the noise in ``(batch, dim)`` vectors with residual blocks of ``hidden_size`` units.

    The time embedding is added before every block.
    """

    def __init__(self, dim: int, hidden_size: int = 64, num_blocks: int = 2) -> None:
        super().__init__()
        self.embed_time = TimeEmbedding(hidden_size)
        self.enter = nn.Linear(dim, hidden_size)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(hidden_size),
                nn.Linear(hidden_size, hidden_size),
                nn.SiLU(),
                nn.Linear(hidden_size, hidden_size),
            )
            for _ in range(num_blocks)
        )
        self.leave = nn.Linear(hidden_size, dim)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the predicted noise ``(batch, dim)`` at the timesteps t ``(batch,)``."""
        time = self.embed_time(t).to(x.dtype)
        hidden = self.enter(x)
        for block in self.blocks:
            hidden = hidden + block(hidden + time)
        predicted: Tensor = self.leave(hidden)
        return predicted


class UNetDenoiser(nn.Module):
    """Predict the noise in ``(batch, dim)`` vectors, seen as signals of one channel.

    ``num_levels`` times the signal is halved and its channels are doubled, and back with skip
    connections (arXiv 1505.04597, in one dimension as for latent codes of parameters in
    arXiv 2402.13144). ``dim`` must be a multiple of ``2 ** num_levels``.
    """

    def __init__(self, channels: int = 64, num_levels: int = 2) -> None:
        super().__init__()
        channels = max(_GROUPS, channels // _GROUPS * _GROUPS)
        sizes = [channels * 2**level for level in range(num_levels + 1)]
        self.embed_time = TimeEmbedding(channels)
        self.enter = nn.Conv1d(1, channels, _KERNEL, padding="same")
        self.down = nn.ModuleList(_Level(size, channels) for size in sizes[:-1])
        self.downsample = nn.ModuleList(
            nn.Conv1d(size, 2 * size, kernel_size=4, stride=2, padding=1) for size in sizes[:-1]
        )
        self.middle = _Level(sizes[-1], channels)
        self.upsample = nn.ModuleList(
            nn.ConvTranspose1d(2 * size, size, kernel_size=4, stride=2, padding=1)
            for size in sizes[-2::-1]
        )
        self.up = nn.ModuleList(_Level(size, channels) for size in sizes[-2::-1])
        self.leave = nn.Conv1d(channels, 1, _KERNEL, padding="same")

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the predicted noise ``(batch, dim)`` at the timesteps t ``(batch,)``."""
        time = self.embed_time(t).to(x.dtype)
        hidden = self.enter(x[:, None])
        skips = []
        for level, downsample in zip(self.down, self.downsample, strict=True):
            hidden = level(hidden, time)
            skips.append(hidden)
            hidden = downsample(hidden)
        hidden = self.middle(hidden, time)
        for upsample, level in zip(self.upsample, self.up, strict=True):
            hidden = level(upsample(hidden) + skips.pop(), time)
        predicted: Tensor = self.leave(hidden)[:, 0]
        return predicted


class _Level(nn.Module):
    """A residual block on ``(batch, channels, length)`` with the time added in its middle."""

    def __init__(self, channels: int, time_size: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.GroupNorm(_GROUPS, channels),
            nn.SiLU(),
            nn.Conv1d(channels, channels, _KERNEL, padding="same"),
        )
        self.shift = nn.Linear(time_size, channels)
        self.second = nn.Sequential(
            nn.GroupNorm(_GROUPS, channels),
            nn.SiLU(),
            nn.Conv1d(channels, channels, _KERNEL, padding="same"),
        )

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Return ``x`` with what the block adds to it."""
        added: Tensor = self.second(self.first(x) + self.shift(time)[:, :, None])
        return x + added
