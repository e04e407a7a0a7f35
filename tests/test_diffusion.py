"""The numerical core against closed forms and independent computations in float64."""

import itertools

import numpy as np
import pytest
import torch
from exact_denoiser import ExactDenoiser
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pfedgpa_app.diffusion import mixture
from pfedgpa_app.diffusion.denoiser import ResidualDenoiser, UNetDenoiser
from pfedgpa_app.diffusion.generation import generate
from pfedgpa_app.diffusion.guidance import guide
from pfedgpa_app.diffusion.inversion import invert, posterior_mean
from pfedgpa_app.diffusion.mixture import mix
from pfedgpa_app.diffusion.raw import RawSpace
from pfedgpa_app.diffusion.schedule import CLEAN, NoiseSchedule, sampling_timesteps
from pfedgpa_app.diffusion.training import ddpm_loss, train_denoiser
from pfedgpa_app.randomness import make_generator

SCHEDULE = NoiseSchedule.linear()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=make_generator(seed), dtype=torch.float64)


def test_linear_schedule_is_the_cumulative_product_of_one_minus_beta():
    betas = np.linspace(1e-4, 2e-2, 1000)
    np.testing.assert_allclose(SCHEDULE.alphas_cumprod.numpy(), np.cumprod(1 - betas), rtol=1e-12)


@pytest.mark.parametrize("width", [2**22, 64])
def test_mixtures_are_sums_in_float64_and_do_not_depend_on_each_other(
    monkeypatch: pytest.MonkeyPatch, width: int
):
    monkeypatch.setattr(mixture, "_CACHED", width)
    vectors = normal(9, 1000).float()
    weights = normal(7, 9, seed=1)
    weights[2:5, 4:] = 0
    weights[5] = 0
    mixtures = mix(weights, list(vectors))
    expected = np.einsum("mn,nd->md", weights.numpy(), vectors.double().numpy())
    np.testing.assert_array_equal(mixtures.numpy(), expected.astype(np.float32))
    for row in range(7):
        assert torch.equal(mix(weights[row], list(vectors)), mixtures[row])


@pytest.mark.parametrize("t", [0, 10, 200, 999])
def test_forward_process_has_the_moments_of_its_definition(t: int):
    x0 = torch.tensor([[3.0, -2.0]], dtype=torch.float64)
    noise = normal(200_000, 2)
    x = SCHEDULE.add_noise(x0.expand(200_000, 2), torch.full((200_000,), t), noise)
    alpha_bar = float(np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))[t])
    np.testing.assert_allclose(x.mean(0), np.sqrt(alpha_bar) * x0[0], atol=0.01)
    np.testing.assert_allclose(x.var(0), [1 - alpha_bar] * 2, rtol=0.02)


def test_clean_timestep_has_no_noise():
    x0, noise = normal(4, 3), normal(4, 3, seed=1)
    t = torch.full((4,), CLEAN)
    assert torch.equal(SCHEDULE.add_noise(x0, t, noise), x0)


@given(start=st.integers(1, 999), data=st.data())
def test_sampling_timesteps_descend_from_start_and_never_repeat(start: int, data: st.DataObject):
    num_steps = data.draw(st.integers(1, start))
    timesteps = sampling_timesteps(start, num_steps)
    assert timesteps.dtype == torch.long
    assert len(timesteps) == num_steps
    assert timesteps[0] == start
    assert timesteps[-1] >= 1
    assert (timesteps.diff() < 0).all()
    # Evenly spread: gaps differ by one at most.
    gaps = (-timesteps.diff()).tolist()
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(("start", "num_steps"), [(10, 11), (10, 0), (0, 1)])
def test_impossible_sampling_timesteps_are_refused(start: int, num_steps: int):
    with pytest.raises(ValueError, match="num_steps"):
        sampling_timesteps(start, num_steps)


def test_posterior_mean_is_that_of_the_forward_process_given_x0():
    """With the true noise as prediction, it is E[x_s | x_t, x_0], here by Gaussian conditioning."""
    t, s = 200, 150
    x0, noise = normal(5, 3), normal(5, 3, seed=1)
    x_t = SCHEDULE.add_noise(x0, torch.full((5,), t), noise)
    abar_t, abar_s = SCHEDULE.alphas_cumprod[t], SCHEDULE.alphas_cumprod[s]
    # x_t = sqrt(a) x_s + sqrt(1 - a) e, a = abar_t / abar_s: the covariance of x_s and x_t given
    # x_0 is sqrt(a) (1 - abar_s), the variance of x_t is 1 - abar_t.
    gain = (abar_t / abar_s).sqrt() * (1 - abar_s) / (1 - abar_t)
    expected = abar_s.sqrt() * x0 + gain * (x_t - abar_t.sqrt() * x0)
    actual = posterior_mean(lambda x, t: noise, SCHEDULE, x_t, t, s)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_last_step_gives_the_predicted_parameters():
    x0, noise = normal(5, 3), normal(5, 3, seed=1)
    x_t = SCHEDULE.add_noise(x0, torch.full((5,), 10), noise)
    actual = posterior_mean(lambda x, t: noise, SCHEDULE, x_t, 10, CLEAN)
    torch.testing.assert_close(actual, x0)


@given(
    batch=st.integers(1, 4),
    dim=st.integers(1, 6),
    start=st.integers(20, 999),
    seed=st.integers(0, 2**20),
)
def test_fidelity_one_returns_the_upload_whatever_the_denoiser(
    batch: int, dim: int, start: int, seed: int
):
    x0 = normal(batch, dim, seed=seed)
    matrix = normal(dim, dim, seed=seed + 1)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(x @ matrix) + t[:, None] / 1000

    code = invert(denoiser, SCHEDULE, x0, sampling_timesteps(start, 20), make_generator(seed))
    torch.testing.assert_close(generate(denoiser, SCHEDULE, code, 1.0), x0, rtol=1e-8, atol=1e-8)


def test_fidelity_one_returns_the_upload_of_a_trained_network_in_float32():
    torch.manual_seed(0)
    denoiser = ResidualDenoiser(7)
    x0 = normal(3, 7).float()
    code = invert(denoiser, SCHEDULE, x0, sampling_timesteps(200, 20), make_generator(0))
    torch.testing.assert_close(generate(denoiser, SCHEDULE, code, 1.0), x0, rtol=1e-4, atol=1e-4)


def test_fidelity_zero_forgets_the_residuals():
    exact = ExactDenoiser(normal(6, 3), SCHEDULE)
    code = invert(
        exact, SCHEDULE, normal(4, 3, seed=1), sampling_timesteps(200, 20), make_generator(0)
    )
    without = code._replace(residuals=torch.zeros_like(code.residuals))
    assert torch.equal(
        generate(exact, SCHEDULE, code, 0.0), generate(exact, SCHEDULE, without, 1.0)
    )


def test_latent_code_has_a_residual_a_step_and_starts_from_the_diffused_parameters():
    timesteps = sampling_timesteps(300, 10)
    x0 = torch.full((50_000, 1), 2.0, dtype=torch.float64)
    code = invert(lambda x, t: torch.zeros_like(x), SCHEDULE, x0, timesteps, make_generator(0))
    assert code.residuals.shape == (10, 50_000, 1)
    alpha_bar = SCHEDULE.alphas_cumprod[300]
    assert code.x_start.mean() == pytest.approx(float(2 * alpha_bar.sqrt()), abs=0.02)
    assert code.x_start.var() == pytest.approx(float(1 - alpha_bar), rel=0.03)


def bayes_noise(points: np.ndarray, x: np.ndarray, abar: np.ndarray) -> np.ndarray:
    """E[noise | x_t] of a finite bank, by Bayes' rule with explicit Gaussian densities."""
    rows = []
    for row, a in zip(x, abar, strict=True):
        densities = np.array(
            [np.prod(np.exp(-((row - np.sqrt(a) * p) ** 2) / (2 * (1 - a)))) for p in points]
        )
        x0 = (densities[:, None] * points).sum(0) / densities.sum()
        rows.append((row - np.sqrt(a) * x0) / np.sqrt(1 - a))
    return np.array(rows)


def test_exact_denoiser_is_the_posterior_mean_of_the_bank_at_mixed_timesteps():
    points, x = normal(5, 3), normal(8, 3, seed=1)
    t = torch.tensor([50, 100, 200, 300, 500, 700, 900, 999])
    expected = bayes_noise(points.numpy(), x.numpy(), SCHEDULE.alphas_cumprod[t].numpy())
    np.testing.assert_allclose(
        ExactDenoiser(points, SCHEDULE)(x, t), expected, rtol=1e-8, atol=1e-9
    )


@pytest.fixture(scope="module")
def trained() -> tuple[ResidualDenoiser, Tensor]:
    bank = normal(12, 3).float()
    bank = bank / bank.square().mean().sqrt()
    torch.manual_seed(0)
    denoiser = ResidualDenoiser(3)
    train_denoiser(
        denoiser,
        SCHEDULE,
        bank,
        train_steps=600,
        batch_size=256,
        learning_rate=5e-3,
        generator=make_generator(0),
    )
    return denoiser, bank


@torch.no_grad()
def test_trained_denoiser_is_never_better_than_the_exact_one_and_comes_near_it(
    trained: tuple[ResidualDenoiser, Tensor],
):
    denoiser, bank = trained
    many = bank.repeat(4000, 1)
    exact = float(ddpm_loss(ExactDenoiser(bank, SCHEDULE), SCHEDULE, many, make_generator(1)))
    loss = float(ddpm_loss(denoiser, SCHEDULE, many, make_generator(1)))
    assert exact <= loss < 1.25 * exact + 0.02


def test_training_is_fixed_by_its_generator():
    def train() -> Tensor:
        torch.manual_seed(0)
        denoiser = ResidualDenoiser(2, hidden_size=16, num_blocks=1)
        train_denoiser(
            denoiser,
            SCHEDULE,
            normal(5, 2).float(),
            train_steps=5,
            batch_size=8,
            learning_rate=1e-2,
            generator=make_generator(3),
        )
        return denoiser.leave.weight.detach()

    assert torch.equal(train(), train())


def test_ddpm_loss_of_a_perfect_prediction_is_zero_and_of_none_is_one():
    x0 = torch.zeros(50_000, 2, dtype=torch.float64)

    def perfect(x: Tensor, t: Tensor) -> Tensor:
        return x / (1 - SCHEDULE.alpha_bar(t, x)).sqrt()

    assert float(ddpm_loss(perfect, SCHEDULE, x0, make_generator(0))) < 1e-20
    nothing = ddpm_loss(lambda x, t: torch.zeros_like(x), SCHEDULE, x0, make_generator(0))
    assert float(nothing) == pytest.approx(1.0, abs=0.02)


def test_guidance_moves_along_the_clients_own_training():
    """Against the sum over the steps, in NumPy, for a denoiser that is known in closed form."""
    point = normal(1, 3)
    denoiser = ExactDenoiser(point, SCHEDULE)
    previous, current = normal(2, 3, seed=1), normal(2, 3, seed=2)
    timesteps = sampling_timesteps(150, 7)
    alphas_cumprod = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))

    x = current.numpy()
    steps = [*timesteps.tolist(), None]
    for t, t_previous in itertools.pairwise(steps):
        abar = alphas_cumprod[t]
        abar_previous = 1.0 if t_previous is None else alphas_cumprod[t_previous]
        eps = (x - np.sqrt(abar) * point.numpy()) / np.sqrt(1 - abar)
        eps = eps + 3.5 * np.sqrt(1 - abar) * (previous - current).numpy()
        x0 = (x - np.sqrt(1 - abar) * eps) / np.sqrt(abar)
        alpha = abar / abar_previous
        from_x0 = np.sqrt(abar_previous) * (1 - alpha) / (1 - abar)
        from_x = np.sqrt(alpha) * (1 - abar_previous) / (1 - abar)
        x = from_x0 * x0 + from_x * x
    generated = guide(denoiser, SCHEDULE, current, previous, 2.5, timesteps)
    np.testing.assert_allclose(generated, x, rtol=1e-9)


def test_the_raw_space_standardizes_pads_and_loses_nothing():
    vectors = normal(7, 21) * 3 + 5
    vectors[:, 4] = 2.0  # a parameter that does not vary
    space = RawSpace.fit(vectors, multiple=8)
    coordinates = space.project(vectors)
    assert coordinates.shape == (7, 24)
    assert (coordinates[:, 21:] == 0).all()
    varying = [entry for entry in range(21) if entry != 4]
    torch.testing.assert_close(coordinates[:, varying].mean(0), torch.zeros(20).double())
    torch.testing.assert_close(
        coordinates[:, varying].var(0, correction=0), torch.ones(20).double()
    )
    torch.testing.assert_close(space.mean + space.displacement(coordinates), vectors)
    torch.testing.assert_close(space.mean + space.displacement(coordinates[3]), vectors[3])


@pytest.mark.parametrize("num_levels", [0, 1, 3])
def test_the_unet_keeps_the_shape_and_sees_the_timestep(num_levels: int):
    torch.manual_seed(0)
    denoiser = UNetDenoiser(channels=8, num_levels=num_levels)
    x = torch.randn(3, 40)
    early, late = (denoiser(x, torch.full((3,), t)) for t in (10, 900))
    assert early.shape == x.shape
    assert not torch.equal(early, late)


def test_a_denoiser_is_trained_by_torchs_adam_along_torchs_cosine():
    bank, steps = normal(5, 3).float(), 30
    ours, theirs = (ResidualDenoiser(3, hidden_size=8, num_blocks=1) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    settings = {"train_steps": steps, "batch_size": 4, "learning_rate": 0.02}
    train_denoiser(ours, SCHEDULE, bank, **settings, generator=make_generator(3))
    generator = make_generator(3)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=0.02)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(5, (4,), generator=generator)
        optimizer.zero_grad()
        ddpm_loss(theirs, SCHEDULE, bank[rows], generator).backward()
        optimizer.step()
        decay.step()
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)


def test_the_unet_learns_what_distinguishes_two_signals():
    """On two points it comes far below where it began, and never below the optimum."""
    pattern = torch.sin(torch.arange(32) / 3).sign()
    bank = torch.stack([pattern, -pattern])
    torch.manual_seed(0)
    denoiser = UNetDenoiser(channels=16, num_levels=2)
    before = ddpm_loss(denoiser, SCHEDULE, bank.repeat(200, 1), make_generator(1))
    train_denoiser(
        denoiser,
        SCHEDULE,
        bank,
        train_steps=80,
        batch_size=64,
        learning_rate=3e-3,
        generator=make_generator(0),
    )
    after = ddpm_loss(denoiser, SCHEDULE, bank.repeat(200, 1), make_generator(1))
    exact = ddpm_loss(
        ExactDenoiser(bank, SCHEDULE), SCHEDULE, bank.repeat(200, 1), make_generator(1)
    )
    assert exact < after < 0.3 * before
