"""The bitrate of exact cases, through the functions that training calls, with an exact denoiser for a network.

What R is exactly, with logsnr from l_1 = -10 to l_0 = 5: the derivative of mutual information with respect to the SNR
is half the least squared error (Guo, Shamai & Verdu 2005), so the integral is I(x; z_0) - I(x; z_1). The terminal term
is I(x; z_1) + KL(q(z_1) || N(0, I)). So R = I(x; z_0) + KL(q(z_1) || N(0, I)): no tail is cut off by a finite l_1.
"""

import math

import numpy as np
import pytest
import torch
from exact_denoisers import (
    LATENT_SCHEDULE,
    discrete_term,
    expected_nats,
    fine_gaussian,
    gaussian_mean,
    gaussian_rate,
    gaussian_v,
    one_point,
    two_node_gaussian,
    two_point_v,
)

from ul_runtime import diffusion
from ul_runtime.diffusion import Schedule, alpha, sigma, sigmoid
from ul_train import objective as ul

FIVE_DIGITS = 5e-6
STDS = [0.1, 0.5, 1.0, 2.0]
COSINE = Schedule("cosine", -10.0, 5.0)


def information(std: float, snr: float = math.exp(5.0)) -> float:
    """I(x; z) in nats of x ~ N(0, std^2) seen at this SNR."""
    return 0.5 * math.log(1.0 + std**2 * snr)


def noise_of_z_0(schedule: Schedule = LATENT_SCHEDULE) -> float:
    """The noise scale that noisy_latent really adds."""
    zero, one = torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    return float(ul.noisy_latent(zero, one, schedule))


@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize("schedule", [LATENT_SCHEDULE, COSINE], ids=["linear", "cosine"])
def test_gaussian_latents_cost_half_log_1_plus_s2_e5_nats_a_dimension(std, schedule):
    assert gaussian_rate(std, schedule=schedule) == pytest.approx(information(std), abs=FIVE_DIGITS)


@pytest.mark.parametrize("std", [0.5, 2.0])
def test_the_exact_rate_is_the_information_in_z_0_plus_the_kl_of_the_last_marginal(std):
    schedule = Schedule("linear", -2.0, 5.0)  # ends so early that the second term is seen
    variance = float(alpha(-2.0) ** 2 * std**2 + sigma(-2.0) ** 2)
    marginal = 0.5 * (variance - 1.0 - math.log(variance))
    rate = gaussian_rate(std, schedule=schedule)
    assert rate == pytest.approx(information(std) + marginal, abs=FIVE_DIGITS)
    assert marginal > 1e-3


@pytest.mark.parametrize("spread", [0.05, 0.5])
def test_a_learned_variance_costs_the_information_in_z_clean(spread):
    # beside what the noise of z_0 makes of the prior: 1/2 log of (1 + s^2 + e^-5) / (1 + s^2) nats
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    z_clean, nats = ul.drawn_latent(zero, zero + 2 * math.log(spread), zero + 1.0, LATENT_SCHEDULE)
    assert float(z_clean) == pytest.approx(spread)
    rate = gaussian_rate(math.hypot(1.0, spread)) + float(nats)
    hidden = 0.5 * math.log1p(math.exp(-5.0) / (1.0 + spread**2))
    assert rate == pytest.approx(0.5 * math.log1p(1.0 / spread**2) + hidden, abs=FIVE_DIGITS)


def test_unit_gaussian_latents_cost_3_61_bits_a_dimension():
    assert ul.bits(gaussian_rate(1.0)) == pytest.approx(3.61158, abs=FIVE_DIGITS)


def test_latents_of_plus_or_minus_one_cost_1_bit_a_dimension():
    # At logsnr 5 the sign is all but known: I(x; z_0) is 1 bit less about e^(-74). By symmetry x = 1 stands for both.
    nats = expected_nats(two_point_v, one_point(1.0), fine_gaussian(), num_times=1024)
    assert ul.bits(nats) == pytest.approx(1.0, abs=FIVE_DIGITS)


def test_float32_as_in_training_gives_the_rate_to_four_digits():
    def in_float32(predict, z_clean, eps, t, schedule):
        return ul.prior_nats(predict, z_clean.float(), eps.float(), t.float(), schedule).double()

    assert gaussian_rate(1.0, nats=in_float32) == pytest.approx(information(1.0), abs=5e-5)


def test_a_worse_prior_costs_more():
    nodes = two_node_gaussian(0.5), two_node_gaussian(1.0)
    assert expected_nats(gaussian_v(0.7), *nodes) > information(0.5) + 0.01


@pytest.mark.parametrize(("num_steps", "expected"), [(8, 6.86), (32, 3.13), (128, 2.64), (1024, 2.52)])
def test_a_unit_gaussian_in_discrete_steps_costs(num_steps, expected):
    assert discrete_cost(num_steps) == pytest.approx(expected, abs=0.005)


def test_a_unit_gaussian_in_ever_finer_steps_costs_2_503():
    assert discrete_cost(2**17) == pytest.approx(2.503, abs=5e-4)
    assert discrete_cost(2**17) == pytest.approx(information(1.0), abs=2e-4)


def discrete_cost(num_steps: int) -> float:
    """Nats of N(0, 1) on uniform steps over [-12, 5]: E over x and eps by the four exact nodes."""
    nodes = np.linspace(-12.0, 5.0, num_steps + 1)
    total = 0.0
    for x, eps in ((1.0, 1.0), (1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0)):
        z_clean = np.full((num_steps, 1), x)
        level = nodes[:-1, None]
        pred = gaussian_mean(alpha(level) * z_clean + sigma(level) * eps, level, 1.0)
        total += discrete_term(z_clean, pred, nodes[:-1], nodes[1:]).sum() / 4
    return float(total + diffusion.kl_terminal(np.array([[1.0]]), -12.0)[0])


def test_discrete_steps_of_an_exact_prediction_telescope():
    z_clean, pred, nodes = np.ones((5, 3)), np.zeros((5, 3)), np.linspace(-3.0, 4.0, 6)
    total = discrete_term(z_clean, pred, nodes[:-1], nodes[1:]).sum()
    assert total == pytest.approx(0.5 * 3 * (math.exp(4.0) - math.exp(-3.0)))


def test_terminal_kl_is_the_kl_of_two_gaussians_summed_over_the_latent():
    z_clean = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    mean, std = alpha(-4.0) * z_clean, torch.full_like(z_clean, float(sigma(-4.0)))
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(mean, std), torch.distributions.Normal(0.0, 1.0))
    assert torch.allclose(diffusion.kl_terminal(z_clean, -4.0), kl.sum((1, 2, 3)), rtol=1e-12)


def test_terminal_kl_in_float32_has_four_digits():
    z_clean = 0.01 * torch.randn(2, 4, 8, 8, dtype=torch.float64)
    exact = diffusion.kl_terminal(z_clean, -10.0)
    assert torch.allclose(diffusion.kl_terminal(z_clean.float(), -10.0).double(), exact, rtol=1e-4)


def test_bits_are_nats_over_ln_2_per_image_pixel_or_latent_value():
    assert (ul.bits(math.log(2.0)), ul.bits(64 * math.log(2.0), 64)) == (1.0, 1.0)


@pytest.mark.parametrize("std", STDS)
def test_the_rate_is_the_information_in_the_z_0_that_the_decoder_is_given(std):
    noise = noise_of_z_0()
    assert gaussian_rate(std) == pytest.approx(information(std, (1 - noise**2) / noise**2), abs=FIVE_DIGITS)


def rate_error(std: float = 0.5) -> float:
    """The check of the tests above, as a distance."""
    noise = noise_of_z_0()
    return abs(gaussian_rate(std, num_times=512) - information(std, (1 - noise**2) / noise**2))


MISPRINTS = {
    "noise scaled by sigma^2": ("diffuse", lambda x, eps, level: alpha(level) * x + sigma(level) ** 2 * eps),
    "no minus before the slope": ("diffusion_term", lambda *given: -diffusion.diffusion_term(*given)),
    "weight 1/2 on the bound": ("diffusion_term", lambda *given: 0.5 * diffusion.diffusion_term(*given)),
    "x_pred from v with the sign of eps": ("x_from_v", lambda z, v, level: alpha(level) * z + sigma(level) * v),
    "encoder noise 0.1 beside another prior": ("noisy_latent", lambda z, eps, schedule: z * 0.99**0.5 + 0.1 * eps),
    "encoder noise at logsnr 10": ("noisy_latent", lambda z, eps, schedule: alpha(10.0) * z + sigma(10.0) * eps),
}


def test_the_check_of_the_negative_controls_holds_without_a_misprint():
    assert rate_error() < 2e-5


@pytest.mark.parametrize("misprint", MISPRINTS)
def test_negative_control_each_misprint_moves_the_rate(misprint, monkeypatch):
    name, function = MISPRINTS[misprint]
    monkeypatch.setattr(ul, name, function)
    assert rate_error() > 1e-2


def test_negative_control_the_terminal_kl_is_missed_where_the_schedule_ends_early(monkeypatch):
    schedule = Schedule("linear", -2.0, 5.0)
    assert gaussian_rate(1.0, schedule=schedule) == pytest.approx(information(1.0), abs=FIVE_DIGITS)
    monkeypatch.setattr(ul, "kl_terminal", lambda z_clean, logsnr_min: 0.0)
    assert gaussian_rate(1.0, schedule=schedule) < information(1.0) - 1e-2


@pytest.mark.parametrize("bias", [0.0, 2.0])
def test_negative_control_a_reweighted_loss_is_below_the_information_and_so_no_bound(bias):
    def reweighted(predict, z_clean, eps, t, schedule):
        weight = sigmoid(bias - schedule.logsnr(t))
        return ul.denoising_nats(predict, z_clean, eps, t, schedule) * weight + ul.kl_terminal(z_clean, -10.0)

    assert gaussian_rate(1.0, nats=reweighted) < information(1.0) - 0.5
