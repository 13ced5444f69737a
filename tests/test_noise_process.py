"""The noise process: ends, conversions, schedules, and the same numbers in numpy and torch."""

import math

import numpy as np
import pytest
import torch
from exact_denoisers import eps_from_v, v_from_x, v_target
from hypothesis import given
from hypothesis import strategies as st

from ul_runtime import diffusion as process
from ul_runtime.diffusion import Schedule, alpha, resolution_shift, sigma, sigmoid

LEVELS = np.linspace(-30.0, 30.0, 61)
FAR = np.array([-1500.0, -700.0, -40.0, 0.0, 40.0, 700.0, 1500.0])
SCHEDULES = [
    Schedule("linear", -10.0, 5.0),
    Schedule("linear", -10.0, 5.0, shift=-1.5),
    Schedule("cosine", -10.0, 10.0),
    Schedule("cosine", -10.0, 10.0, shift=2 * math.log(64 / 32)),
    Schedule("cosine", -15.0, 4.0),
]
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    return rng.normal(size=LEVELS.shape), rng.normal(size=LEVELS.shape)


def test_variance_is_preserved_at_every_level():
    assert np.allclose(alpha(LEVELS) ** 2 + sigma(LEVELS) ** 2, 1.0, rtol=0, atol=4e-16)


def test_log_of_signal_over_noise_is_the_logsnr_far_into_both_tails():
    levels = np.linspace(-700.0, 700.0, 57)
    assert np.allclose(2 * (np.log(alpha(levels)) - np.log(sigma(levels))), levels, rtol=1e-14, atol=1e-13)


def test_alpha_and_sigma_are_finite_and_monotone_up_to_logsnr_1500():
    for values in (alpha(FAR), sigma(-FAR)):
        assert np.isfinite(values).all()
        assert (np.diff(values) >= 0).all()
    assert (alpha(-1500.0), alpha(1500.0)) == (0.0, 1.0)


def test_gradients_are_finite_up_to_logsnr_1500():
    logsnr = torch.from_numpy(FAR).requires_grad_()
    (alpha(logsnr) + sigma(logsnr) + sigmoid(logsnr)).sum().backward()
    assert torch.isfinite(logsnr.grad).all()


def test_at_logsnr_5_alpha_and_sigma_are_the_papers():
    assert float(alpha(5.0)) == pytest.approx(0.99665, abs=5e-6)
    assert float(sigma(5.0)) == pytest.approx(0.08181, abs=5e-6)


def test_numpy_and_torch_give_the_same_numbers():
    t = np.linspace(0.0, 1.0, 33)
    functions = [alpha, sigma, sigmoid] + [f for s in SCHEDULES for f in (s.logsnr, s.slope, s.time)]
    for function in functions:
        assert np.allclose(function(t), function(torch.from_numpy(t)).numpy(), rtol=1e-13, atol=1e-14)


def test_float32_tensors_stay_float32():
    t = torch.linspace(0, 1, 5)
    for schedule in SCHEDULES:
        assert {schedule.logsnr(t).dtype, schedule.slope(t).dtype, alpha(schedule.logsnr(t)).dtype} == {torch.float32}


def test_diffuse_has_signal_scale_alpha_and_noise_scale_sigma(pair):
    x, eps = pair
    assert np.allclose(process.diffuse(x, eps, LEVELS), alpha(LEVELS) * x + sigma(LEVELS) * eps)
    z_t = process.diffuse(0.0 * x, np.ones_like(x), LEVELS)
    assert np.allclose(z_t**2, sigmoid(-LEVELS), rtol=1e-14)


def test_negative_control_noise_scaled_by_sigma_squared_is_seen(pair):
    x, eps = pair
    misprint = alpha(LEVELS) * x + sigma(LEVELS) ** 2 * eps
    assert not np.allclose(process.diffuse(x, eps, LEVELS), misprint, atol=1e-2)


def test_x_and_eps_come_back_from_v_at_both_ends(pair):
    x, eps = pair
    z_t, v = process.diffuse(x, eps, LEVELS), v_target(x, eps, LEVELS)
    assert np.allclose(process.x_from_v(z_t, v, LEVELS), x, rtol=0, atol=3e-15)
    assert np.allclose(eps_from_v(z_t, v, LEVELS), eps, rtol=0, atol=3e-15)


def test_v_comes_back_from_x_as_exactly_as_float64_divided_by_sigma(pair):
    x, eps = pair
    z_t, v = process.diffuse(x, eps, LEVELS), v_target(x, eps, LEVELS)
    allowed = 1e-15 / sigma(LEVELS) + 1e-15
    assert (np.abs(v_from_x(z_t, x, LEVELS) - v) < allowed).all()


@given(x=st.floats(-4, 4), v=st.floats(-4, 4), logsnr=st.floats(-30, 30))
def test_any_clean_value_survives_the_way_through_v(x, v, logsnr):
    z_t, x, level = np.array([0.5 * x + v]), np.array([x]), np.array([logsnr])
    assert np.allclose(process.x_from_v(z_t, v_from_x(z_t, x, level), level), x, rtol=0, atol=1e-14)


def test_the_three_squared_errors_are_one_quantity_in_three_scales(pair):
    x, eps = pair
    v_pred = np.random.default_rng(1).normal(size=x.shape)
    z_t, v = process.diffuse(x, eps, LEVELS), v_target(x, eps, LEVELS)
    x_error = np.exp(LEVELS) * (x - process.x_from_v(z_t, v_pred, LEVELS)) ** 2
    eps_error = (eps - eps_from_v(z_t, v_pred, LEVELS)) ** 2
    assert np.allclose(x_error, alpha(LEVELS) ** 2 * (v - v_pred) ** 2, rtol=1e-7)
    assert np.allclose(eps_error, alpha(LEVELS) ** 2 * (v - v_pred) ** 2, rtol=1e-7)


@each_schedule
def test_the_ends_of_a_schedule_are_exact(schedule):
    low, high = schedule.ends
    assert (low, high) == (schedule.logsnr_min + schedule.shift, schedule.logsnr_max + schedule.shift)
    assert float(schedule.logsnr(1.0)) == pytest.approx(low, abs=1e-11)
    assert float(schedule.logsnr(0.0)) == pytest.approx(high, abs=1e-11)


@each_schedule
def test_the_ends_of_a_schedule_hold_in_float32(schedule):
    ends = schedule.logsnr(torch.tensor([1.0, 0.0]))
    assert ends.tolist() == pytest.approx(schedule.ends, abs=2e-3)


@each_schedule
def test_slope_is_the_derivative_of_logsnr(schedule):
    t = torch.linspace(0.001, 0.999, 57, dtype=torch.float64, requires_grad=True)
    schedule.logsnr(t).sum().backward()
    assert torch.allclose(schedule.slope(t.detach()), t.grad, rtol=1e-11)


@each_schedule
def test_logsnr_falls_everywhere(schedule):
    t = np.linspace(0.0, 1.0, 1001)
    assert (schedule.slope(t) < 0).all()
    assert (np.diff(schedule.logsnr(t)) < 0).all()


@each_schedule
def test_time_is_the_inverse_of_logsnr(schedule):
    t = np.linspace(0.0, 1.0, 101)
    assert np.allclose(schedule.time(schedule.logsnr(t)), t, rtol=0, atol=1e-12)


@each_schedule
def test_shift_adds_to_logsnr_and_leaves_the_slope(schedule):
    t = np.linspace(0.0, 1.0, 11)
    plain = Schedule(schedule.kind, schedule.logsnr_min, schedule.logsnr_max)
    assert np.allclose(schedule.logsnr(t), plain.logsnr(t) + schedule.shift, rtol=0, atol=1e-12)
    assert np.allclose(schedule.slope(t), plain.slope(t))


def test_the_untruncated_cosine_schedule_is_alpha_equal_to_cosine():
    schedule, t = Schedule("cosine", -40.0, 40.0), np.linspace(0.05, 0.95, 19)
    assert np.allclose(alpha(schedule.logsnr(t)), np.cos(0.5 * np.pi * t), atol=1e-8)


@pytest.mark.parametrize(("size", "shift"), [(64, 0.0), (32, 2 * math.log(2)), (512, -2 * math.log(8))])
def test_resolution_shift_is_zero_at_64_px_and_falls_with_size(size, shift):
    assert resolution_shift(size) == pytest.approx(shift, abs=1e-15)


def test_averaging_pixels_of_the_shifted_schedule_gives_the_unshifted_one():
    # The mean of k x k pixels divides the noise variance by k^2: logsnr rises by 2 log k, which the shift takes away.
    assert math.exp(-0.5 * resolution_shift(128)) == 128 / 64


@pytest.mark.parametrize(("low", "high"), [(5.0, 5.0), (5.0, -10.0), (math.nan, 1.0)])
def test_a_schedule_whose_ends_are_out_of_order_is_refused(low, high):
    with pytest.raises(ValueError, match="must be below"):
        Schedule("linear", low, high)
