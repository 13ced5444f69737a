"""The loop that serves every sampler."""

import numpy as np
import pytest

from ul_runtime.diffusion import alpha, sigma
from ul_runtime.errors import StoppedError
from ul_runtime.loop import run_steps
from ul_runtime.samplers import ALPHA, LOGSNR, SIGMA, A, S, sampler_table

START = np.random.default_rng(0).normal(size=(3, 2, 4, 4)).astype(np.float32)


def exact_step(state, history, noise, row):
    """The step graph for N(0, 1) data, whose denoiser is alpha z."""
    c = row[..., None, None, None]
    pred = c[:, ALPHA] * state
    return c[:, 3] * state + c[:, 4] * pred + c[:, 5] * history[:, 0] + c[:, 6] * history[:, 1] + c[:, S] * noise, pred


def silence(k):
    raise AssertionError(f"noise was asked for in step {k}")


def table(sampler, num_steps, ends_clean=False):
    return sampler_table(sampler, "cosine", num_steps, logsnr_min=-10.0, logsnr_max=5.0, ends_clean=ends_clean)


def test_ddim_on_unit_gaussian_data_multiplies_by_the_closed_form():
    rows = table("ddim", 16)
    nodes = np.append(rows[:, LOGSNR], 5.0)
    factor = np.prod(alpha(nodes[1:]) * alpha(nodes[:-1]) + sigma(nodes[1:]) * sigma(nodes[:-1]))
    assert np.allclose(run_steps(exact_step, rows, START, silence), factor * START, rtol=1e-5)


def test_history_holds_the_two_predictions_before_newest_first():
    seen = []

    def step(state, history, noise, row):
        seen.append(history[0, :, 0, 0, 0].tolist())
        return state, np.full_like(state, len(seen))

    run_steps(step, table("ddim", 4), START, silence)
    assert seen == [[0, 0], [1, 0], [2, 1], [3, 2]]


def test_noise_is_asked_for_only_where_the_row_draws_some():
    rows, asked = table("ancestral", 4, ends_clean=True), []

    def noise(k):
        asked.append(k)
        return np.zeros_like(START)

    run_steps(exact_step, rows, START, noise)
    assert asked == [0, 1, 2]


def test_rows_cross_the_boundary_in_float32_one_for_each_image():
    def step(state, history, noise, row):
        assert row.dtype == history.dtype == noise.dtype == np.float32
        assert row.shape == (3, 8)
        assert (row == row[0]).all()
        return state, state

    run_steps(step, table("ddim", 2), START, silence)


def test_stop_ends_the_loop_before_the_next_step():
    steps = []

    def step(state, history, noise, row):
        steps.append(row[0, A])
        return state, state

    with pytest.raises(StoppedError, match="before step 3 of 8"):
        run_steps(step, table("ddim", 8), START, silence, stop=lambda: len(steps) == 2)


def test_the_table_gives_sigma_to_the_step():
    assert np.allclose(table("ddim", 4)[:, ALPHA] ** 2 + table("ddim", 4)[:, SIGMA] ** 2, 1.0)
