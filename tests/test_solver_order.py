"""How fast each solver's error falls, and what noise it leaves: an even mixture of Gaussians, and one Gaussian."""

import math

import numpy as np
import pytest
from exact_denoisers import CENTRES, final_variance, mixture_mean, needs_noise, walk

from ul_runtime.diffusion import alpha, sigma
from ul_runtime.samplers import B_0, B_1, A, S, sampler_table

LOW, HIGH = -10.0, 5.0
ORDERS = {"ddim": 1, "dpmpp2m": 2, "ab2": 2, "sa2:0": 2, "ab3": 3, "unipc2": 3, "heun": 2}


def prior_table(sampler: str, num_steps: int, grid: str = "uniform") -> np.ndarray:
    return sampler_table(sampler, grid, num_steps, logsnr_min=LOW, logsnr_max=HIGH, ends_clean=False)


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


def measured_orders(tables, flow) -> np.ndarray:
    """log2 of the ratio of the largest errors, from each table to the next one of twice the steps."""
    z, exact = flow
    errors = [np.abs(walk(table, z, mixture_mean) - exact).max() for table in tables]
    return np.log2(np.array(errors[:-1]) / errors[1:])


@pytest.mark.parametrize("sampler", ORDERS)
def test_error_on_a_mixture_falls_with_the_order_of_the_sampler(sampler, flow):
    orders = measured_orders([prior_table(sampler, n) for n in (128, 256, 512, 1024)], flow)
    assert orders[0] == pytest.approx(ORDERS[sampler], abs=0.25)
    assert orders[-1] == pytest.approx(ORDERS[sampler], abs=0.08)


def test_negative_control_a_table_that_halves_the_last_difference_loses_its_order(flow):
    def spoilt(num_steps: int) -> np.ndarray:
        table = prior_table("ab2", num_steps)
        table[:, [B_0, B_1]] += table[:, [B_1]] * [0.5, -0.5]
        return table

    assert measured_orders([spoilt(n) for n in (128, 256, 512, 1024)], flow)[-1] == pytest.approx(1.0, abs=0.08)


def test_negative_control_unipc2_without_its_corrector_loses_an_order(flow):
    """Its predictor alone is dpmpp2m; a corrector of which half is applied does not help either."""

    def half(num_steps: int) -> np.ndarray:
        return 0.5 * (prior_table("unipc2", num_steps) + prior_table("dpmpp2m", num_steps))

    assert measured_orders([half(n) for n in (256, 512, 1024)], flow)[-1] == pytest.approx(2.0, abs=0.1)


def variance_error(sampler: str, num_steps: int, std: float) -> float:
    """Relative error of Var z_0 for N(0, std^2) latents: exact, no draws."""
    start, end = (float(alpha(level) ** 2 * std**2 + sigma(level) ** 2) for level in (LOW, HIGH))
    return abs(final_variance(prior_table(sampler, num_steps), std, start) / end - 1.0)


@pytest.mark.parametrize(
    ("sampler", "order"),
    [("ddim", 1), ("ancestral", 1), ("dpmpp2m", 2), ("sa2", 2), ("sa2:0.2", 2), ("sa2:0.6", 2), ("ab2", 2)],
)
@pytest.mark.parametrize("std", [0.3, 0.5, 2.0])
def test_the_variance_of_gaussian_latents_converges_with_the_weak_order(sampler, order, std):
    errors = [variance_error(sampler, n, std) for n in (512, 1024)]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.05)
    assert errors[1] < (0.01 if order == 1 else 1e-4)


def test_negative_control_a_step_with_a_little_less_noise_has_another_variance():
    table = prior_table("sa2", 1024)
    table[:, S] *= 0.99
    expected = float(alpha(HIGH) ** 2 * 0.25 + sigma(HIGH) ** 2)
    start = float(alpha(LOW) ** 2 * 0.25 + sigma(LOW) ** 2)
    assert abs(final_variance(table, 0.5, start) / expected - 1.0) > 0.005


@pytest.mark.parametrize(("sampler", "num_steps"), [("ancestral", 300), ("sa2:0.6", 100)])
def test_samples_of_a_mixture_have_its_moments(sampler, num_steps):
    rng, num = np.random.default_rng(0), 40_000
    table = prior_table(sampler, num_steps)
    state = walk(table, rng.normal(size=num), mixture_mean, lambda k: rng.normal(size=num))
    mean, square = CENTRES.mean(), (CENTRES**2).mean() + 0.35**2
    assert state.mean() == pytest.approx(float(alpha(HIGH)) * mean, abs=0.02)
    expected = float(alpha(HIGH) ** 2) * square + float(sigma(HIGH) ** 2)
    assert (state**2).mean() == pytest.approx(expected, rel=0.02)


def left_noise(table: np.ndarray) -> float:
    """Standard deviation of z_0 - alpha_0 z_pred for latents that are one of three points, over 5,000 starts."""
    rng, num = np.random.default_rng(1), 5_000

    def points(z: np.ndarray, logsnr: float) -> np.ndarray:
        return mixture_mean(z, logsnr, width=0.0)

    z_0 = walk(table, rng.normal(size=num), points, (lambda k: rng.normal(size=num)) if needs_noise(table) else None)
    return float((z_0 - alpha(HIGH) * points(z_0, HIGH)).std())


STEPS = {"ddim": 400, "ancestral": 400, "heun": 100}


@pytest.mark.parametrize("sampler", [*ORDERS, "ancestral", "sa2", "sa2:0.6"])
def test_z_0_leaves_the_prior_with_its_noise(sampler):
    """The decoder is trained on alpha_0 z + sigma_0 eps: z_0 - alpha_0 z_pred has the standard deviation sigma_0."""
    assert left_noise(prior_table(sampler, STEPS.get(sampler, 200))) == pytest.approx(float(sigma(HIGH)), rel=0.03)


@pytest.mark.parametrize("sampler", ["dpmpp2m", "sa2"])
def test_negative_control_a_prior_that_ends_clean_leaves_none(sampler):
    table = sampler_table(sampler, "uniform", 200, logsnr_min=LOW, logsnr_max=HIGH, ends_clean=True)
    assert left_noise(table) < 0.05 * float(sigma(HIGH))


def test_negative_control_ancestral_without_its_noise_leaves_too_little():
    table = prior_table("ancestral", 400)
    table[:, S] = 0.0
    assert left_noise(table) < 0.1 * float(sigma(HIGH))
    assert np.all(table[:, A] > 0.0)
