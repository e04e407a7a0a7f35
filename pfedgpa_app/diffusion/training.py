"""Training a denoiser on a bank of vectors, with DDPM's simple loss."""

import torch
from torch import Tensor, nn

from pfedgpa_app.diffusion.inversion import Denoiser
from pfedgpa_app.diffusion.schedule import NoiseSchedule


def ddpm_loss(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x0: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Return the mean of |noise - denoiser(x_t, t)|^2 for x0 ``(batch, dim)``, t uniform.

    Equation 14 of arXiv 2006.11239, as a mean over the entries.
    """
    t = torch.randint(
        schedule.num_timesteps, (len(x0),), generator=generator, device=generator.device
    )
    noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=generator.device)
    return (noise - denoiser(schedule.add_noise(x0, t, noise), t)).square().mean()


def train_denoiser(
    denoiser: nn.Module,
    schedule: NoiseSchedule,
    bank: Tensor,
    *,
    train_steps: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
) -> None:
    """Train a denoiser in place on the vectors of a bank ``(num_vectors, dim)``.

    Adam with a learning rate that falls to zero along a cosine. Every batch is drawn from the bank
    with replacement.
    """
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=learning_rate, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, train_steps)
    denoiser.train()
    for _ in range(train_steps):
        rows = torch.randint(len(bank), (batch_size,), generator=generator, device=generator.device)
        loss = ddpm_loss(denoiser, schedule, bank[rows], generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    denoiser.eval()
