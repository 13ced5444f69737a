"""Sampler tables against closed forms and independent integrals: Gaussian data, the DDPM posterior, quadrature."""

import math
from itertools import pairwise

import numpy as np
import pytest
from exact_denoisers import final_variance, gaussian_mean, mixture_mean, needs_noise, walk
from hypothesis import example, given
from hypothesis import strategies as st

from ul_runtime.diffusion import alpha, sigma
from ul_runtime.errors import UsageError
from ul_runtime.samplers import (
    ALPHA,
    B_0,
    B_1,
    B_2,
    GRIDS,
    LOGSNR,
    ROW,
    SAMPLERS,
    SIGMA,
    A,
    S,
    adams_bashforth,
    exact_weights,
    moments,
    sampler_table,
)

LOW, HIGH = -10.0, 5.0
each_sampler = pytest.mark.parametrize("sampler", [*SAMPLERS, "sa2:0.6", "sa2:0"])
each_grid = pytest.mark.parametrize("grid", list(GRIDS))


def prior_table(sampler: str, num_steps: int, grid: str = "uniform") -> np.ndarray:
    return sampler_table(sampler, grid, num_steps, logsnr_min=LOW, logsnr_max=HIGH, ends_clean=False)


def nodes_of(table: np.ndarray, last: float = HIGH) -> np.ndarray:
    return np.append(table[:, LOGSNR], last)


@each_grid
@pytest.mark.parametrize("num_steps", [1, 2, 7, 64])
def test_ddim_multiplies_unit_gaussian_latents_by_the_product_of_cosines(grid, num_steps):
    table = prior_table("ddim", num_steps, grid)
    nodes = nodes_of(table)
    product = np.prod(alpha(nodes[1:]) * alpha(nodes[:-1]) + sigma(nodes[1:]) * sigma(nodes[:-1]))
    z = np.array([-1.7, 0.3, 2.0])
    assert np.allclose(walk(table, z, lambda z, logsnr: gaussian_mean(z, logsnr, 1.0)), product * z, rtol=1e-12)


def test_the_product_of_cosines_goes_to_one_with_many_steps():
    table = prior_table("ddim", 4000)
    assert walk(table, np.ones(1), lambda z, logsnr: alpha(logsnr) * z)[0] == pytest.approx(1.0, abs=1e-3)


@each_grid
def test_ancestral_draws_from_the_ddpm_posterior(grid):
    """Mean and variance of q(z_t | z_s, x) by conditioning one Gaussian on another."""
    table = prior_table("ancestral", 9, grid)
    nodes = nodes_of(table)
    alpha_s, alpha_t, sigma_s, sigma_t = alpha(nodes[:-1]), alpha(nodes[1:]), sigma(nodes[:-1]), sigma(nodes[1:])
    kept = alpha_s / alpha_t  # z_s = kept z_t + noise
    gain = kept * sigma_t**2 / sigma_s**2  # cov(z_t, z_s | x) / var(z_s | x)
    assert np.allclose(table[:, A], gain, rtol=1e-11)
    assert np.allclose(table[:, B_0], alpha_t - gain * alpha_s, rtol=1e-9)
    assert np.allclose(table[:, S] ** 2, sigma_t**2 * (1.0 - gain * kept), rtol=1e-9)


def test_negative_control_the_variance_of_the_other_ddpm_choice_is_another_table():
    table = prior_table("ancestral", 9)
    nodes = nodes_of(table)
    beta = sigma(nodes[:-1]) ** 2 - (alpha(nodes[:-1]) / alpha(nodes[1:])) ** 2 * sigma(nodes[1:]) ** 2
    assert not np.allclose(table[:, S] ** 2, beta, rtol=1e-2)


@each_grid
@pytest.mark.parametrize(("sampler", "tau"), [("ddim", 0.0), ("ancestral", 1.0)])
def test_a_published_sampler_of_order_1_is_the_exponential_integrator_with_its_noise(sampler, tau, grid):
    table = prior_table(sampler, 9, grid)
    general = [adams_bashforth(nodes_of(table), k, 1, tau)[0] for k in range(9)]
    assert np.allclose(table[:, A:], general, rtol=1e-12, atol=0.0)


def test_negative_control_the_exponential_integrator_with_other_noise_is_another_table():
    table = prior_table("ancestral", 9)
    general = [adams_bashforth(nodes_of(table), k, 1, 0.99)[0] for k in range(9)]
    assert not np.allclose(table[:, A:], general, rtol=1e-3, atol=0.0)


def test_sa2_without_noise_is_ab2_and_with_that_of_ddpm_begins_as_ancestral():
    assert np.array_equal(prior_table("sa2:0", 9), prior_table("ab2", 9))
    assert np.array_equal(prior_table("sa2:1", 9), prior_table("sa2", 9))
    assert np.allclose(prior_table("sa2", 9)[0], prior_table("ancestral", 9)[0], rtol=1e-12)
    assert not np.allclose(prior_table("sa2", 9)[1], prior_table("ancestral", 9)[1], rtol=1e-2)


@each_grid
def test_ab2_weighs_the_last_difference_by_its_exact_integral(grid):
    """Integral_0^h e^{-u} (h - u) du = h - 1 + e^{-h}, for the slope (pred - pred_1) / h_previous."""
    table = prior_table("ab2", 6, grid)
    half = 0.5 * nodes_of(table)
    for k in range(1, 6):
        h, previous = half[k + 1] - half[k], half[k] - half[k - 1]
        slope = alpha(2 * half[k + 1]) * (h + math.expm1(-h)) / previous
        assert table[k, B_1] == pytest.approx(-slope, rel=1e-11)
        assert table[k, B_0] == pytest.approx(-alpha(2 * half[k + 1]) * math.expm1(-h) + slope, rel=1e-12)


def quadrature(y: float, of, upper: float = 1.0) -> float:
    """Integral_0^upper y e^{-y u} of(u) du by Gauss-Legendre on 40 pieces."""
    u, weight = np.polynomial.legendre.leggauss(12)
    pieces = upper * (np.arange(40)[:, None] + 0.5 * (u + 1.0)) / 40
    return float((weight * y * np.exp(-y * pieces) * of(pieces)).sum() * upper / 80)


@given(y=st.floats(1e-9, 40.0), k=st.integers(0, 2))
@example(y=1e-4, k=2)  # where the recurrence cancels: chance does not always try such a small one
@example(y=0.29, k=2)
def test_moments_are_their_integrals(y, k):
    assert moments(y, 3)[k] == pytest.approx(quadrature(y, lambda u: u**k), rel=2e-13)


def test_negative_control_the_recurrence_alone_cancels_where_steps_are_small():
    y, values = 1e-4, [-math.expm1(-1e-4)]
    for k in (1, 2):
        values.append(k / y * values[-1] - math.exp(-y))
    assert values[2] != pytest.approx(quadrature(y, lambda u: u**2), rel=1e-9)


@given(
    steps=st.lists(st.floats(0.01, 8.0), min_size=3, max_size=3),
    tau=st.floats(0.0, 2.0),
    order=st.integers(1, 3),
)
def test_weights_are_integrals_of_the_lagrange_basis(steps, tau, order):
    """b_j = alpha_t Integral_0^h kappa e^{-kappa u} L_j(u) du, each L_j as a product.

    To what float64 can give where nodes lie close together: the condition of their Vandermonde matrix.
    """
    logsnr = np.cumsum([-6.0, *steps])
    known = [2 - j for j in range(order)]
    back = (logsnr[3] - logsnr[known]) / steps[2]
    within = max(1e-11, 10 * np.finfo(np.float64).eps * np.linalg.cond(np.vander(back)))
    weights = exact_weights(logsnr, 2, known, tau) / alpha(logsnr[3])
    for j, weight in enumerate(weights):

        def basis(u, j=j):
            return math.prod((u - back[i]) / (back[j] - back[i]) for i in range(order) if i != j) + 0.0 * u

        exact = quadrature((1.0 + tau**2) * steps[2] / 2, basis)
        assert weight == pytest.approx(exact, rel=within, abs=within * np.abs(weights).max())


def test_the_first_step_of_every_solver_without_noise_is_ddims():
    for sampler in ("dpmpp2m", "ab2", "ab3", "unipc2", "heun"):
        assert np.allclose(prior_table(sampler, 5)[0], prior_table("ddim", 5)[0], rtol=1e-14), sampler


def test_unipc2_predicts_and_corrects_as_published_though_it_keeps_one_state():
    """Zhao et al. 2023, algorithm 5: the corrected state beside the predicted one, from which the network is called."""
    table = prior_table("unipc2", 7, "mix")
    nodes, midpoint = nodes_of(table), prior_table("dpmpp2m", 7, "mix")
    predicted = corrected = z = np.linspace(-2.0, 2.0, 5)
    preds: list[np.ndarray] = []
    for k in range(7):
        preds.insert(0, mixture_mean(predicted, nodes[k]))
        if k > 0:
            gain = alpha(nodes[k]) * -math.expm1(-(nodes[k] - nodes[k - 1]) / 2)
            b = [gain / 2, gain / 2] if k == 1 else exact_weights(nodes, k - 1, [k, k - 1, k - 2])
            corrected = midpoint[k - 1, A] * corrected + sum(c * pred for c, pred in zip(b, preds, strict=False))
        predicted = midpoint[k, A] * corrected + midpoint[k, B_0] * preds[0]
        predicted = predicted + (midpoint[k, B_1] * preds[1] if k > 0 else 0.0)
    assert np.allclose(walk(table, z, mixture_mean), predicted, rtol=1e-12)
    assert not np.allclose(walk(midpoint, z, mixture_mean), predicted, rtol=1e-2)


def test_heun_averages_the_predictions_at_both_ends_of_a_step():
    table = prior_table("heun", 5, "mix")
    nodes, z = nodes_of(table)[::2], np.linspace(-2.0, 2.0, 5)
    state = z
    for s, t in pairwise(nodes):
        a, gain = sigma(t) / sigma(s), -alpha(t) * math.expm1(-(t - s) / 2)
        pred = mixture_mean(state, s)
        end = mixture_mean(a * state + gain * pred, t)
        state = a * state + gain * (pred + end) / 2
    assert np.allclose(walk(table, z, mixture_mean), state, rtol=1e-12)


@each_grid
def test_dpmpp2m_is_the_published_midpoint_rule(grid):
    """Lu et al. 2022, algorithm 2: D = (1 + 1/(2r)) pred - 1/(2r) pred_1, r = h_previous / h, in half logsnr."""
    table = prior_table("dpmpp2m", 6, grid)
    half = 0.5 * nodes_of(table)
    for k in range(1, 6):
        h, ratio = half[k + 1] - half[k], (half[k] - half[k - 1]) / (half[k + 1] - half[k])
        gain = -alpha(2 * half[k + 1]) * math.expm1(-h)
        expected = [gain * (1 + 1 / (2 * ratio)), -gain / (2 * ratio), 0.0, 0.0]
        assert np.allclose(table[k, B_0:], expected, rtol=1e-12)
        assert table[k, A] == pytest.approx(sigma(2 * half[k + 1]) / sigma(2 * half[k]), rel=1e-12)


@each_sampler
@each_grid
def test_a_constant_prediction_is_followed_exactly(sampler, grid):
    """What is left of the start shrinks with the table's a; the clean value arrives at the scale of the last level."""
    table = prior_table(sampler, 12, grid)
    start = np.array([0.4])
    left = start - alpha(LOW) * 0.7
    state = walk(table, start, lambda z, logsnr: np.array([0.7]))
    assert state == pytest.approx(alpha(HIGH) * 0.7 + np.prod(table[:, A]) * left, rel=1e-10)


@each_sampler
def test_a_table_goes_on_from_any_exact_state_when_the_clean_value_is_known(sampler):
    """z = alpha x + sigma eps stays of that form: variance a^2 sigma_s^2 + s^2 = sigma_t^2, in every row."""
    table = prior_table(sampler, 12, "mix")
    sigmas = sigma(nodes_of(table))
    assert np.allclose(table[:, A] ** 2 * sigmas[:-1] ** 2 + table[:, S] ** 2, sigmas[1:] ** 2, rtol=1e-10)


@each_sampler
def test_z_0_leaves_the_prior_with_its_noise(sampler):
    """Var z_0 = alpha_0^2 std^2 + sigma_0^2, which for latents without spread is the noise alone."""
    table = prior_table(sampler, 600)
    for std in (0.0, 0.05, 0.5, 1.0, 2.0):
        start = float(alpha(LOW) ** 2 * std**2 + sigma(LOW) ** 2)
        expected = float(alpha(HIGH) ** 2 * std**2 + sigma(HIGH) ** 2)
        assert final_variance(table, std, start) == pytest.approx(expected, rel=0.02), std


@each_sampler
def test_z_0_of_latents_without_spread_has_exactly_the_noise_of_the_last_level(sampler):
    table = prior_table(sampler, 10)
    variance = final_variance(table, 0.0, start=float(sigma(LOW) ** 2))
    assert variance == pytest.approx(float(sigma(HIGH) ** 2), rel=1e-12)


@each_sampler
def test_negative_control_a_table_that_ends_clean_leaves_no_noise(sampler):
    table = sampler_table(sampler, "uniform", 600, logsnr_min=LOW, logsnr_max=HIGH, ends_clean=True)
    assert final_variance(table, 0.0, 1.0) == 0.0
    assert final_variance(table, 0.05, 1.0) < 0.5 * (0.05**2 + float(sigma(HIGH) ** 2))


@each_sampler
@each_grid
@pytest.mark.parametrize("num_steps", [1, 2, 32])
def test_a_table_has_a_row_for_each_call_with_alpha_and_sigma_of_its_level(sampler, grid, num_steps):
    table = prior_table(sampler, num_steps, grid)
    assert table.shape == (2 * num_steps if sampler == "heun" else num_steps, len(ROW))
    assert table.dtype == np.float64
    assert np.allclose(table[:, ALPHA], alpha(table[:, LOGSNR]))
    assert np.allclose(table[:, SIGMA], sigma(table[:, LOGSNR]))
    assert np.isfinite(table).all()


@each_sampler
def test_a_table_that_ends_clean_returns_its_last_prediction(sampler):
    table = sampler_table(sampler, "cosine", 4, logsnr_min=-10.0, logsnr_max=10.0, ends_clean=True)
    open_end = sampler_table(sampler, "cosine", 4, logsnr_min=-10.0, logsnr_max=10.0, ends_clean=False)
    assert table[-1, A:].tolist() == [0.0, 1.0, 0.0, 0.0, 0.0]
    assert np.array_equal(table[:-1], open_end[: len(table) - 1])


def test_the_last_step_of_heun_is_one_call_where_it_ends_clean():
    """Karras et al. 2022, algorithm 1: no second call at sigma = 0."""
    table = sampler_table("heun", "uniform", 4, logsnr_min=-10.0, logsnr_max=10.0, ends_clean=True)
    assert table[:, LOGSNR].tolist() == [-10.0, -5.0, -5.0, 0.0, 0.0, 5.0, 5.0]


@each_sampler
def test_only_ancestral_and_sa2_need_noise(sampler):
    assert needs_noise(prior_table(sampler, 4)) is (sampler in ("ancestral", "sa2", "sa2:0.6"))


def test_one_ancestral_step_that_ends_clean_needs_no_noise():
    assert not needs_noise(sampler_table("ancestral", "uniform", 1, logsnr_min=LOW, logsnr_max=HIGH, ends_clean=True))


def test_no_sampler_uses_the_prediction_of_a_step_that_was_not_made():
    for sampler in SAMPLERS:
        table = prior_table(sampler, 5)
        assert table[0, [B_1, B_2]].tolist() == [0.0, 0.0]
        assert table[1, B_2] == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "euler"}, "sampler 'euler' is not known; expected one of ddim, .*, heun"),
        ({"grid": "kosine"}, "grid 'kosine' is not known; expected one of uniform, .*; did you mean cosine[?]"),
        ({"logsnr_max": -11.0}, "grid 'uniform' does not rise in 4 steps from -10.0 to -11.0"),
        ({"num_steps": 0}, "the number of steps is 0; expected 1 or more"),
        ({"num_steps": -3}, "the number of steps is -3; expected 1 or more"),
    ],
)
def test_a_table_that_cannot_be_is_refused(change, message):
    given_ = {"sampler": "ddim", "grid": "uniform", "num_steps": 4, "logsnr_min": LOW, "logsnr_max": HIGH} | change
    with pytest.raises(UsageError, match=f"^{message}$"):
        sampler_table(**given_, ends_clean=False)
