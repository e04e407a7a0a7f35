"""The forward process of DDPM (arXiv 2006.11239): how fast parameters turn into noise."""

from dataclasses import dataclass

import torch
from torch import LongTensor, Tensor

CLEAN = -1
"""The timestep before the first: no noise, ``alphas_cumprod`` is 1 there."""


@dataclass(frozen=True)
class NoiseSchedule:
    """``alphas_cumprod[t]`` is the part of the signal's variance that is left at timestep t.

    ``x_t = sqrt(alphas_cumprod[t]) x_0 + sqrt(1 - alphas_cumprod[t]) noise``, for t = 0 .. T - 1.
    """

    alphas_cumprod: Tensor

    @classmethod
    def linear(
        cls, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 2e-2
    ) -> "NoiseSchedule":
        """Return the linear schedule: beta_t rises evenly from ``beta_start`` to ``beta_end``."""
        betas = torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
        return cls(torch.cumprod(1 - betas, dim=0))

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps T."""
        return len(self.alphas_cumprod)

    def alpha_bar(self, t: Tensor, like: Tensor) -> Tensor:
        """Return ``alphas_cumprod[t]`` as a column of ``like``'s type; t is ``(batch,)``.

        `CLEAN` gives 1.
        """
        padded = torch.cat([self.alphas_cumprod, self.alphas_cumprod.new_ones(1)])
        return padded.to(like)[t.to(like.device)][:, None]

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return x_t of ``x0``, all ``(batch, dim)``, at the timesteps t ``(batch,)``."""
        alpha_bar = self.alpha_bar(t, x0)
        return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise


def sampling_timesteps(start: int, num_steps: int) -> LongTensor:
    """Return ``num_steps`` evenly spread, descending timesteps, the first of which is ``start``.

    The step after the last one leads to `CLEAN`. Raises `ValueError` if there are no ``num_steps``
    different timesteps in 1 .. start.
    """
    if not 1 <= num_steps <= start:
        raise ValueError(f"num_steps = {num_steps}: right would be 1 to start = {start}")
    steps = torch.arange(num_steps, 0, -1)
    return (start * steps + num_steps // 2) // num_steps  # type: ignore[return-value]
