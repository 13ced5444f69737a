"""The bits of a latent: exact cases through the functions that runtime and training call."""

import math

import numpy as np
import pytest

from ul_runtime.diffusion import Schedule, alpha, diffusion_term, kl_terminal, sigma

SCHEDULE = Schedule("linear", -10.0, 5.0)
T = (np.arange(20000) + 0.5) / 20000  # midpoint rule


def gaussian_rate(std: float, as_array=np.asarray) -> float:
    """Nats a dimension of N(0, std^2) with the exact denoiser: its mean squared error put in as one latent a time."""
    logsnr = SCHEDULE.logsnr(T)
    error = std * sigma(logsnr) / np.sqrt(alpha(logsnr) ** 2 * std**2 + sigma(logsnr) ** 2)
    z_clean, pred = as_array(np.zeros((len(T), 1))), as_array(error[:, None])
    nats = diffusion_term(z_clean, pred, as_array(logsnr), as_array(SCHEDULE.slope(T)))
    return float(nats.mean() + kl_terminal(as_array(np.full((1, 1), std)), -10.0)[0])


@pytest.mark.parametrize("std", [0.3, 1.0, 2.0])
def test_gaussian_latents_cost_half_log_1_plus_s2_e5_nats_a_dimension(std):
    assert gaussian_rate(std) == pytest.approx(0.5 * math.log(1 + std**2 * math.exp(5)), abs=1e-4)


def test_unit_gaussian_latents_cost_3_61_bits():
    assert gaussian_rate(1.0) / math.log(2) == pytest.approx(3.61158, abs=1e-4)


def test_torch_tensors_give_the_same_numbers():
    torch = pytest.importorskip("torch")
    assert gaussian_rate(0.7, torch.from_numpy) == pytest.approx(gaussian_rate(0.7), abs=1e-12)


def test_values_of_a_latent_are_summed_not_averaged():
    z_clean, pred = np.ones((2, 4, 3, 3)), np.zeros((2, 4, 3, 3))
    one = diffusion_term(z_clean[:, :1, :1, :1], pred[:, :1, :1, :1], np.zeros(2), np.full(2, -15.0))
    assert np.allclose(diffusion_term(z_clean, pred, np.zeros(2), np.full(2, -15.0)), 36 * one)
    assert np.allclose(kl_terminal(z_clean, -3.0), 36 * kl_terminal(z_clean[:, :1, :1, :1], -3.0))


def test_a_decreasing_schedule_costs_positive_nats():
    assert (diffusion_term(np.ones((1, 1)), np.zeros((1, 1)), np.zeros(1), np.array([-15.0])) > 0).all()


def test_terminal_kl_is_the_kl_of_two_gaussians():
    mean, std = float(alpha(-4.0)) * 0.7, float(sigma(-4.0))
    expected = 0.5 * (mean**2 + std**2 - 1 - math.log(std**2))
    assert kl_terminal(np.array([[0.7]]), -4.0)[0] == pytest.approx(expected, rel=1e-12)
