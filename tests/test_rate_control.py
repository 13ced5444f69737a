"""The bitrate as a setting: the control meets its target on processes like training, and survives a resume."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ul_train.config import config_hash, config_toml, load_config
from ul_train.stage import RateControl, missed
from ul_train.stages import Joint

STEPS, RAMP = 700, 250


def trained(target: float, sensitivity: float, lag: float, noise: float = 0.0) -> tuple[float, float]:
    """(bits, loss_factor) of a run whose log bits follow log loss_factor with a lag, and fall as the prior learns."""
    control = RateControl(target, STEPS, RAMP, loss_factor=2.0)
    settled = log_bits = math.log(0.12)
    for step in range(STEPS):
        goal = settled + sensitivity * math.log(control.loss_factor / 2.0) + 2.0 * math.exp(-step / 100)
        log_bits += (goal - log_bits) / lag
        control.follow(math.exp(log_bits + noise * math.sin(7.3 * step)), step)
    return math.exp(log_bits), control.loss_factor


@given(target=st.floats(0.06, 0.3), sensitivity=st.floats(1.0, 2.5), lag=st.floats(5, 120), noise=st.floats(0.0, 0.2))
def test_the_bits_end_within_ten_percent_of_the_target(target, sensitivity, lag, noise):
    assert trained(target, sensitivity, lag, noise)[0] == pytest.approx(target, rel=0.1)


def test_without_steering_the_same_run_misses_the_target(monkeypatch):
    monkeypatch.setattr("ul_train.stage._INTEGRAL", 0.0)
    monkeypatch.setattr("ul_train.stage._PROPORTIONAL", 0.0)
    bits, loss_factor = trained(0.2, 1.5, 30)
    assert loss_factor == pytest.approx(2.0)
    assert bits == pytest.approx(0.12, rel=0.05)


def test_nothing_is_steered_before_the_start_or_by_bits_that_are_no_number():
    control = RateControl(0.1, STEPS, RAMP, loss_factor=2.0)
    for step in range(RAMP):
        control.follow(0.8, step)
    assert control.loss_factor == 2.0
    before = control.state()
    for bits in (math.nan, math.inf, 0.0, -1.0):
        control.follow(bits, RAMP)
    assert control.state() == before


def test_a_restored_control_goes_on_as_if_it_had_never_stopped():
    bits = [0.3 + 0.1 * math.sin(step) for step in range(400)]
    whole, first, second = (RateControl(0.2, STEPS, 50, loss_factor=2.0) for _ in range(3))
    for step, value in enumerate(bits):
        whole.follow(value, step)
        (first if step < 150 else second).follow(value, step)
        if step == 149:
            second.restore(first.state())
    assert second.state() == whole.state()
    fresh = RateControl(0.2, STEPS, 50, loss_factor=2.0)
    fresh.restore({})
    assert fresh.state() == RateControl(0.2, STEPS, 50, loss_factor=2.0).state()


@pytest.mark.parametrize(("bits", "expected"), [(10.0, 1.05), (1e-6, 200.0)])
def test_loss_factor_stays_where_training_works(bits, expected):
    control = RateControl(0.1, STEPS, 0, loss_factor=2.0)
    for step in range(STEPS):
        control.follow(bits, step)
    assert control.loss_factor == pytest.approx(expected)


def test_a_recipe_without_a_target_is_what_it_was_and_one_with_it_loads_back(tmp_path):
    plain = load_config("tiny", [])
    assert "target" not in config_toml(plain)
    steered = load_config("tiny", ["objective.target_bits_per_pixel=0.2"])
    assert config_hash(steered) != config_hash(plain)
    (tmp_path / "mine.toml").write_text(config_toml(steered))
    assert load_config(str(tmp_path / "mine.toml"), []) == steered


@pytest.mark.parametrize(
    ("overrides", "least"), [([], 1.05), (["objective.reconstruction=mse", "sampling.decoder_steps=1"], 0.01)]
)
def test_a_decoder_with_another_loss_is_steered_to_smaller_factors(overrides, least):
    """The bits stay too high: loss_factor goes to its end, which for a plain squared error is below 1."""
    config = load_config("tiny", [*overrides, "objective.target_bits_per_pixel=0.1"])
    control = Joint(config, torch.device("cpu"), "fp32").rate_control
    assert control is not None
    for step in range(3 * config.stages.joint.steps):
        control.follow(0.4, step)
    assert control.loss_factor == pytest.approx(least)


def test_a_missed_target_is_said():
    assert missed(0.257, None) is None
    assert missed(0.109, 0.1) is None
    assert "0.257 bits/pixel, the target was 0.131" in str(missed(0.257, 0.131))
    assert missed(0.089, 0.1) is not None
