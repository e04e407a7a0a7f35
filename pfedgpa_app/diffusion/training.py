"""Training a denoiser on a bank of vectors, with DDPM's simple loss."""

import math

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

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

    Adam with a learning rate that falls to zero along a cosine, by what `torch.optim.Adam` calls
    itself: the class imports torch's compiler, a second or more in every new process. Every batch
    is drawn from the bank with replacement.
    """
    parameters: list[Tensor] = list(denoiser.parameters())
    means, squares = ([torch.zeros_like(each) for each in parameters] for _ in range(2))
    steps = [torch.zeros((), device=each.device) for each in parameters]
    denoiser.train()
    for number in range(train_steps):
        rows = torch.randint(len(bank), (batch_size,), generator=generator, device=generator.device)
        loss = ddpm_loss(denoiser, schedule, bank[rows], generator)
        gradients = list(torch.autograd.grad(loss, parameters))
        with torch.no_grad():
            adam(
                parameters,
                gradients,
                means,
                squares,
                [],
                steps,
                fused=True,
                amsgrad=False,
                beta1=0.9,
                beta2=0.999,
                lr=learning_rate,
                weight_decay=0.0,
                eps=1e-8,
                maximize=False,
            )
        # From step to step, as `CosineAnnealingLR` does, so that it is rounded alike.
        learning_rate *= _cosine(number + 1, train_steps) / _cosine(number, train_steps)
    denoiser.eval()


def _cosine(step: int, num_steps: int) -> float:
    return 1 + math.cos(math.pi * step / num_steps)
