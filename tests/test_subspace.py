"""The subspace loses nothing: against NumPy's SVD, and against diffusion in the full space."""

import numpy as np
import pytest
import torch
from exact_denoiser import ExactDenoiser
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pfedgpa_app.diffusion.generation import generate
from pfedgpa_app.diffusion.inversion import invert
from pfedgpa_app.diffusion.schedule import NoiseSchedule, sampling_timesteps
from pfedgpa_app.diffusion.subspace import Spectrum, Subspace, dispersion_ratio
from pfedgpa_app.randomness import make_generator


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=make_generator(seed), dtype=torch.float64)


@given(num=st.integers(2, 12), dim=st.integers(2, 40), seed=st.integers(0, 2**20))
def test_every_component_reconstructs_the_bank(num: int, dim: int, seed: int):
    vectors = normal(num, dim, seed=seed) + 5
    subspace = Subspace.fit(vectors)
    assert subspace.dim <= min(num - 1, dim)
    torch.testing.assert_close(
        subspace.mean + subspace.displacement(subspace.project(vectors)), vectors
    )


def test_axes_and_eigenvalues_are_those_of_the_singular_value_decomposition():
    vectors = normal(9, 300)
    subspace = Subspace.fit(vectors)
    centered = vectors.numpy() - vectors.numpy().mean(0)
    _, singular, axes = np.linalg.svd(centered, full_matrices=False)
    np.testing.assert_allclose(Spectrum.of(vectors).eigenvalues, singular[:8] ** 2 / 9, rtol=1e-9)
    cosines = np.abs((subspace.basis.numpy() * axes[:8]).sum(1))
    np.testing.assert_allclose(cosines, 1.0, atol=1e-9)
    np.testing.assert_allclose(subspace.basis @ subspace.basis.T, np.eye(8), atol=1e-9)


@pytest.mark.parametrize("rank", [None, 3])
def test_coordinates_have_unit_root_mean_square(rank: int | None):
    vectors = normal(10, 200) * 7
    coordinates = Subspace.fit(vectors, rank).project(vectors)
    assert float(coordinates.square().mean()) == pytest.approx(1.0)


def test_rank_keeps_the_first_components():
    vectors = normal(10, 50)
    whole, part = Subspace.fit(vectors), Subspace.fit(vectors, rank=3)
    assert part.dim == 3
    torch.testing.assert_close(part.basis, whole.basis[:3])


def test_the_axes_have_signs_that_rounding_does_not_turn():
    vectors = normal(8, 50)
    turned = vectors.flip(1)  # other sums in another order, the same spectrum
    basis = Subspace.fit(turned).basis.flip(1)
    torch.testing.assert_close(basis, Subspace.fit(vectors).basis, atol=1e-9, rtol=0)


def test_a_list_of_vectors_is_a_bank_as_a_matrix_is():
    vectors = normal(6, 40)
    matrix, rows = Subspace.fit(vectors), Subspace.fit(list(vectors))
    assert torch.equal(matrix.basis, rows.basis)
    assert torch.equal(matrix.project(vectors), rows.project(list(vectors)))


def test_what_sticks_out_of_the_subspace_is_dropped():
    subspace = Subspace.fit(normal(4, 30))
    outside = normal(30, seed=1)
    outside -= subspace.basis.T @ (subspace.basis @ outside)
    point = subspace.mean + subspace.basis[0]
    torch.testing.assert_close(
        subspace.project((point + outside)[None]), subspace.project(point[None])
    )


def test_vectors_longer_than_a_chunk_are_reconstructed():
    vectors = torch.randn(3, 600_000, generator=make_generator(0))
    subspace = Subspace.fit(vectors)
    torch.testing.assert_close(
        subspace.mean + subspace.displacement(subspace.project(vectors)),
        vectors,
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.parametrize("vectors", [torch.ones(5, 8), torch.ones(1, 8)])
def test_a_bank_without_differences_is_a_point(vectors: Tensor):
    subspace = Subspace.fit(vectors)
    assert subspace.project(vectors).shape == (len(vectors), 0)
    assert torch.equal(subspace.mean + subspace.displacement(torch.zeros(2, 0)), torch.ones(2, 8))


def test_diffusion_in_the_subspace_is_diffusion_in_the_full_space():
    """The exact denoisers of both spaces generate the same, given the same noise in the subspace.

    Isotropic noise of R^d projects to isotropic noise of the subspace; here the full space's noise
    is the subspace's, carried over by the basis.
    """
    schedule = NoiseSchedule.linear()
    vectors = normal(6, 40)
    subspace = Subspace.fit(vectors)
    coordinates = subspace.project(vectors)
    full = (vectors - subspace.mean) / subspace.scale
    timesteps = sampling_timesteps(300, 10)
    small, large = ExactDenoiser(coordinates, schedule), ExactDenoiser(full, schedule)

    code = invert(small, schedule, coordinates, timesteps, make_generator(0))
    lifted = code._replace(
        x_start=code.x_start @ subspace.basis, residuals=code.residuals @ subspace.basis
    )
    in_subspace = subspace.mean + subspace.displacement(generate(small, schedule, code, 0.3))
    in_full = subspace.mean + subspace.scale * generate(large, schedule, lifted, 0.3)
    torch.testing.assert_close(in_subspace, in_full, rtol=1e-6, atol=1e-6)
    # And the residuals are those that the full space's denoiser would have left.
    x = code.x_start @ subspace.basis
    t = torch.full((6,), 300)
    torch.testing.assert_close(large(x, t), small(code.x_start, t) @ subspace.basis)


@pytest.mark.parametrize("num_groups", [2, 5])
@pytest.mark.parametrize("num_clients", [20, 100])
def test_signal_rank_finds_the_dimensions_that_groups_span(num_groups: int, num_clients: int):
    centres = normal(num_groups, 5000) * 0.5
    groups = torch.arange(num_clients) % num_groups
    vectors = centres[groups] + normal(num_clients, 5000, seed=1) * 0.5
    assert Spectrum.of(vectors).signal_rank == num_groups - 1


def test_signal_rank_of_pure_noise_is_nothing():
    assert Spectrum.of(normal(20, 5000)).signal_rank == 0


def test_signal_rank_of_vectors_that_are_each_different_from_all_others_is_nothing():
    """Their eigenvalues rise far above the median, but nowhere with a gap."""
    vectors = normal(20, 5000) * torch.logspace(-1, 0.5, 20)[:, None]
    spectrum = Spectrum.of(vectors)
    assert float(spectrum.eigenvalues[4]) > 2 * spectrum.floor
    assert spectrum.signal_rank == 0


@pytest.mark.parametrize("num_vectors", [2, 5, 100])
def test_divergence_does_not_depend_on_how_many_vectors_there_are(num_vectors: int):
    dim = 50_000
    vectors = 3 + normal(num_vectors, dim)  # from 1: a variance of 1, a common way of 2
    assert dispersion_ratio(vectors, torch.ones(dim)) == pytest.approx(1 / 4, rel=0.05)


@pytest.mark.parametrize("strange", [0.0, 2.0, 50.0])
def test_a_strange_vector_does_not_decide_about_divergence(strange: float):
    vectors = 1 + 0.3 * normal(10, 5000)
    vectors[9] = strange * normal(5000, seed=1)
    assert dispersion_ratio(vectors, torch.zeros(5000)) == pytest.approx(0.09, rel=0.1)


def test_divergence_of_extremes():
    everywhere = torch.cat([torch.eye(4), -torch.eye(4)])
    assert dispersion_ratio(everywhere, torch.zeros(4)) == float("inf")
    assert dispersion_ratio(torch.ones(3, 4), torch.zeros(4)) == 0
    assert dispersion_ratio(torch.ones(3, 4), torch.ones(4)) == 0


def test_signal_rank_of_pairs_of_the_same_vectors_is_that_of_the_pairs():
    """Differences of nothing are part of the floor, even if they are rounding errors."""
    vectors = normal(10, 500).repeat(2, 1)
    assert Spectrum.of(vectors).signal_rank == 9


def test_the_floor_of_more_vectors_than_dimensions_is_that_of_the_dimensions():
    spectrum = Spectrum.of(normal(50, 6))
    assert len(spectrum.eigenvalues) == 6
    assert spectrum.floor > 0.3
