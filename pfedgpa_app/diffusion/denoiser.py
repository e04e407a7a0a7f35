"""The denoiser: a small residual network on vectors, conditioned on the timestep."""

import math

import torch
from torch import Tensor, nn


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
