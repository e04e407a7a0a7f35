"""Diffusion on vectors of parameters: schedule, denoiser, training, inversion and generation."""
