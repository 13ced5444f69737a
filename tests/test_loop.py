"""The loop that serves every sampler, and batches whose images stand at different rows of different tables."""

import numpy as np
import pytest
from given_steps import run_steps

from ul_runtime import noise
from ul_runtime.diffusion import alpha, sigma
from ul_runtime.errors import StoppedError
from ul_runtime.images.convert import to_uint8
from ul_runtime.loop import NO_NOISE, NoiseKeys, side_by_side, to_pixels
from ul_runtime.samplers import ALPHA, B_0, B_1, B_2, LOGSNR, SAMPLERS, SIGMA, A, S, sampler_table

START = np.random.default_rng(0).normal(size=(3, 2, 4, 4)).astype(np.float32)


def exact_step(state, history, noise, row):
    """The step graph for N(0, 1) data, whose denoiser is alpha z."""
    c = row[..., None, None, None]
    pred = c[:, ALPHA] * state
    return c[:, 3] * state + c[:, 4] * pred + c[:, 5] * history[:, 0] + c[:, 6] * history[:, 1] + c[:, S] * noise, pred


def no_noise(k):
    raise AssertionError(f"noise was asked for in step {k}")


def table(sampler, num_steps, ends_clean=False):
    return sampler_table(sampler, "cosine", num_steps, logsnr_min=-10.0, logsnr_max=5.0, ends_clean=ends_clean)


def test_ddim_on_unit_gaussian_data_multiplies_by_the_closed_form():
    rows = table("ddim", 16)
    nodes = np.append(rows[:, LOGSNR], 5.0)
    factor = np.prod(alpha(nodes[1:]) * alpha(nodes[:-1]) + sigma(nodes[1:]) * sigma(nodes[:-1]))
    assert np.allclose(run_steps(exact_step, rows, START, no_noise), factor * START, rtol=1e-5)


def test_history_holds_the_two_predictions_before_newest_first():
    seen = []

    def step(state, history, noise, row):
        seen.append(history[0, :, 0, 0, 0].tolist())
        return state, np.full_like(state, len(seen))

    run_steps(step, table("ddim", 4), START, no_noise)
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

    run_steps(step, table("ddim", 2), START, no_noise)


def test_a_tick_can_end_the_loop_before_any_step():
    ticks = []

    def tick(amount):
        ticks.append(amount)
        if len(ticks) == 5:
            raise StoppedError("stopped")

    with pytest.raises(StoppedError):
        run_steps(exact_step, table("ddim", 8), START, no_noise, tick)
    assert ticks == [0, 3, 0, 3, 0], "asked before each step, told of its images after it"


def test_the_table_gives_sigma_to_the_step():
    assert np.allclose(table("ddim", 4)[:, ALPHA] ** 2 + table("ddim", 4)[:, SIGMA] ** 2, 1.0)


def test_an_image_with_a_shorter_table_waits_at_its_first_noise_level():
    long, short = table("ancestral", 5), table("sa2", 3)
    rows, streams = side_by_side([long, short], lambda k: 100 + k)
    assert np.array_equal(rows[:, 0], long.astype(np.float32))
    assert np.array_equal(rows[2:, 1], short.astype(np.float32))
    for row in rows[:2, 1]:
        assert np.array_equal(row[: SIGMA + 1], short[0, : SIGMA + 1].astype(np.float32))
        assert row[A:].tolist() == [1, 0, 0, 0, 0]
    assert streams[:, 0].tolist() == [100, 101, 102, 103, 104]
    assert streams[:, 1].tolist() == [NO_NOISE, NO_NOISE, 100, 101, 102]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_image_looks_back_beyond_its_own_first_row(sampler):
    """So that what the network said while it waited is of no effect."""
    for num_steps in (1, 2, 7):
        rows = table(sampler, num_steps)
        assert not rows[0, [B_1, B_2]].any()
        assert not rows[1:2, B_2].any()
        assert rows[0, B_0] != 0.0


def test_each_image_draws_by_its_own_seed_index_and_stream():
    seeds, indices = np.array([3, 3, 2**64 - 1, 3], np.uint64), np.array([0, 7, 7, 5])
    streams = np.array([4, 9, 4, NO_NOISE])
    drawn = NoiseKeys(seeds, indices, (2, 3)).draw(streams)
    for i in range(3):
        expected = noise.normals(int(seeds[i]), indices[i : i + 1], int(streams[i]), (2, 3))[0]
        assert drawn[i].tobytes() == expected.tobytes()
    assert len({image.tobytes() for image in drawn}) == 4
    assert not drawn[3].any()


def test_pixels_and_their_sum_tell_what_is_finite():
    x = np.random.default_rng(0).normal(0, 1, (5, 3, 4, 4)).astype(np.float32)
    images, total = to_pixels(x)
    assert images.tobytes() == to_uint8(x).tobytes()
    assert np.isfinite(total).all()
    for value in (np.nan, np.inf, -np.inf):
        broken = x.copy()
        broken[2, 1, 3, 2] = value
        assert np.isfinite(to_pixels(broken)[1]).tolist() == [True, True, False, True, True]
