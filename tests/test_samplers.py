"""Sampler tables against closed forms: Gaussian data, the DDPM posterior, and the order of convergence."""

import math

import numpy as np
import pytest
from exact_denoisers import gaussian_mean, walk
from hypothesis import given
from hypothesis import strategies as st

from ul_runtime.errors import UsageError
from ul_runtime.noise_process import alpha, sigma
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
    needs_noise,
    sampler_table,
)

LOW, HIGH = -10.0, 5.0
each_sampler = pytest.mark.parametrize("sampler", list(SAMPLERS))
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


def test_the_first_step_of_dpmpp2m_is_ddims():
    assert np.array_equal(prior_table("dpmpp2m", 5)[0], prior_table("ddim", 5)[0])


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


def leaving_variance(table: np.ndarray, std: float, start: float = 1.0) -> float:
    """Variance of the last state for N(0, std^2) latents: every state is linear in the start and the noises."""
    state = {"start": math.sqrt(start)}
    earlier: dict[object, float] = {}
    for k, row in enumerate(table):
        gain = gaussian_mean(1.0, row[LOGSNR], std)
        pred = {source: gain * value for source, value in state.items()}
        sources = {*state, *earlier, k}
        state = {
            source: row[A] * state.get(source, 0.0)
            + row[B_0] * pred.get(source, 0.0)
            + row[B_1] * earlier.get(source, 0.0)
            + (row[S] if source == k else 0.0)
            for source in sources
        }
        earlier = pred
    return sum(value**2 for value in state.values())


@each_sampler
@pytest.mark.parametrize("std", [0.0, 0.05, 0.5, 1.0, 2.0])
def test_z_0_leaves_the_prior_with_its_noise(sampler, std):
    """Var z_0 = alpha_0^2 std^2 + sigma_0^2, which for latents without spread is the noise alone."""
    start = float(alpha(LOW) ** 2 * std**2 + sigma(LOW) ** 2)
    expected = float(alpha(HIGH) ** 2 * std**2 + sigma(HIGH) ** 2)
    assert leaving_variance(prior_table(sampler, 600), std, start) == pytest.approx(expected, rel=0.02)


@each_sampler
def test_z_0_of_latents_without_spread_has_exactly_the_noise_of_the_last_level(sampler):
    table = prior_table(sampler, 10)
    variance = leaving_variance(table, 0.0, start=float(sigma(LOW) ** 2))
    assert variance == pytest.approx(float(sigma(HIGH) ** 2), rel=1e-12)


@each_sampler
def test_negative_control_a_table_that_ends_clean_leaves_no_noise(sampler):
    table = sampler_table(sampler, "uniform", 600, logsnr_min=LOW, logsnr_max=HIGH, ends_clean=True)
    assert leaving_variance(table, 0.0) == 0.0
    assert leaving_variance(table, 0.05) < 0.5 * (0.05**2 + float(sigma(HIGH) ** 2))


CENTRES, WIDTH = np.array([-1.0, 0.3, 1.2]), 0.35


def mixture_mean(z: np.ndarray, logsnr: float) -> np.ndarray:
    """E[x | z] for an even mixture of three Gaussians: not linear in z."""
    a, s = float(alpha(logsnr)), float(sigma(logsnr))
    variance = a**2 * WIDTH**2 + s**2
    log_share = -((z[:, None] - a * CENTRES) ** 2) / (2 * variance)
    share = np.exp(log_share - log_share.max(axis=1, keepdims=True))
    means = CENTRES + a * WIDTH**2 / variance * (z[:, None] - a * CENTRES)
    return (share * means).sum(axis=1) / share.sum(axis=1)


def flow_endpoint(z: np.ndarray, num_steps: int = 2000) -> np.ndarray:
    """The probability flow from LOW to HIGH, by Runge-Kutta on y = z / sigma: dy/dl = e^l E[x | z], l = logsnr / 2."""
    step, y = 0.5 * (HIGH - LOW) / num_steps, z / sigma(LOW)

    def slope(half: float, y: np.ndarray) -> np.ndarray:
        return math.exp(half) * mixture_mean(float(sigma(2 * half)) * y, 2 * half)

    for k in range(num_steps):
        half = 0.5 * LOW + k * step
        first = slope(half, y)
        second = slope(half + step / 2, y + step / 2 * first)
        third = slope(half + step / 2, y + step / 2 * second)
        y = y + step / 6 * (first + 2 * second + 2 * third + slope(half + step, y + step * third))
    return y * float(sigma(HIGH))


@pytest.fixture(scope="module")
def flow():
    z = np.linspace(-2.0, 2.0, 21)
    return z, flow_endpoint(z)


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1.0), ("dpmpp2m", 2.0)])
def test_error_on_a_mixture_falls_with_the_order_of_the_sampler(sampler, order, flow):
    z, exact = flow
    errors = [np.abs(walk(prior_table(sampler, n), z, mixture_mean) - exact).max() for n in (128, 256, 512)]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.12)
    assert np.log2(errors[1] / errors[2]) == pytest.approx(order, abs=0.08)


def test_ancestral_samples_of_a_mixture_have_its_moments():
    rng, num = np.random.default_rng(0), 40_000
    state = walk(prior_table("ancestral", 300), rng.normal(size=num), mixture_mean, lambda k: rng.normal(size=num))
    mean, square = CENTRES.mean(), (CENTRES**2).mean() + WIDTH**2
    assert state.mean() == pytest.approx(float(alpha(HIGH)) * mean, abs=0.02)
    expected = float(alpha(HIGH) ** 2) * square + float(sigma(HIGH) ** 2)
    assert (state**2).mean() == pytest.approx(expected, rel=0.02)


@each_sampler
@each_grid
@pytest.mark.parametrize("num_steps", [1, 2, 32])
def test_a_table_has_one_row_a_step_with_alpha_and_sigma_of_its_level(sampler, grid, num_steps):
    table = prior_table(sampler, num_steps, grid)
    assert table.shape == (num_steps, len(ROW))
    assert table.dtype == np.float64
    assert np.allclose(table[:, ALPHA], alpha(table[:, LOGSNR]))
    assert np.allclose(table[:, SIGMA], sigma(table[:, LOGSNR]))
    assert np.isfinite(table).all()


@each_grid
@given(num_steps=st.integers(1, 300), low=st.floats(-15.0, -1.0), span=st.floats(1.0, 25.0))
def test_a_grid_rises_from_one_end_to_the_other(grid, num_steps, low, span):
    nodes = GRIDS[grid](num_steps, low, low + span)
    assert len(nodes) == num_steps + 1
    assert (np.diff(nodes) > 0).all()
    assert nodes[[0, -1]] == pytest.approx([low, low + span], abs=1e-9)


def test_grids_are_what_they_are_called():
    uniform, cosine, mix = (GRIDS[name](100, LOW, HIGH) for name in ("uniform", "cosine", "mix"))
    assert np.allclose(np.diff(uniform), 0.15)
    angles = np.arctan(np.exp(-0.5 * cosine))
    assert np.allclose(np.diff(angles), np.diff(angles)[0], rtol=1e-6)
    middle = np.abs(mix + 0.5) < 2
    assert middle.sum() > 1.4 * (np.abs(uniform + 0.5) < 2).sum()


@each_sampler
def test_a_table_that_ends_clean_returns_its_last_prediction(sampler):
    table = sampler_table(sampler, "cosine", 4, logsnr_min=-10.0, logsnr_max=10.0, ends_clean=True)
    open_end = sampler_table(sampler, "cosine", 4, logsnr_min=-10.0, logsnr_max=10.0, ends_clean=False)
    assert table[-1, A:].tolist() == [0.0, 1.0, 0.0, 0.0, 0.0]
    assert np.array_equal(table[:-1], open_end[:-1])


@pytest.mark.parametrize(("sampler", "noisy"), [("ddim", False), ("dpmpp2m", False), ("ancestral", True)])
def test_only_ancestral_needs_noise(sampler, noisy):
    assert needs_noise(prior_table(sampler, 4)) is noisy


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
        ({"sampler": "euler"}, "sampler 'euler' is not known; expected one of ddim, ancestral, dpmpp2m"),
        ({"grid": "karras"}, "grid 'karras' is not known; expected one of uniform, cosine, mix"),
        ({"num_steps": 0}, "the number of steps is 0; expected 1 or more"),
        ({"num_steps": -3}, "the number of steps is -3; expected 1 or more"),
    ],
)
def test_a_table_that_cannot_be_is_refused(change, message):
    given_ = {"sampler": "ddim", "grid": "uniform", "num_steps": 4} | change
    with pytest.raises(UsageError, match=f"^{message}$"):
        sampler_table(**given_, logsnr_min=LOW, logsnr_max=HIGH, ends_clean=False)
