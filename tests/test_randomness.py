"""The random numbers of a step: strata of the times, and nothing but (seed, stage, step) behind them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ul_train.objective import draw_joint, draw_times, flip_some, low_discrepancy_times, step_generator


def numbers(seed: int, stage: int, step: int) -> list[float]:
    return torch.rand(4, generator=step_generator(seed, stage, step)).tolist()


@given(num=st.integers(1, 200), seed=st.integers(0, 2**63 - 1))
def test_one_time_falls_into_each_stratum_of_the_batch(num, seed):
    t = draw_times(num, step_generator(seed, 0, 0))
    strata = torch.sort((t.double() * num + 1e-6).floor().long()).values
    assert torch.equal(strata, torch.arange(num))
    assert float(t.min()) >= 0.0
    assert float(t.max()) <= 1.0


def test_times_are_the_strata_moved_by_one_offset():
    order = torch.tensor([2, 0, 3, 1])
    assert low_discrepancy_times(torch.tensor(0.5), order).tolist() == [0.625, 0.125, 0.875, 0.375]


def test_times_are_uniform_over_many_steps():
    t = torch.cat([draw_times(8, step_generator(0, 0, step)) for step in range(500)])
    assert torch.histc(t, bins=8, min=0, max=1).tolist() == [500.0] * 8
    assert t.mean().item() == pytest.approx(0.5, abs=0.005)


def test_times_come_in_random_order():
    t = draw_times(64, step_generator(0, 0, 0))
    assert not torch.equal(t, t.sort().values)


def test_a_step_has_the_same_numbers_every_time():
    assert numbers(7, 1, 3) == numbers(7, 1, 3)


def test_seed_stage_and_step_each_change_the_numbers():
    drawn = [numbers(seed, stage, step) for seed in (0, 1, 2**40) for stage in range(3) for step in (0, 1, 70_000)]
    assert len({tuple(values) for values in drawn}) == len(drawn) == 27


def test_the_global_generator_neither_matters_nor_moves():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = draw_joint(4, (2, 2, 2), (1, 4, 4), step_generator(0, 0, 5))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    second = draw_joint(4, (2, 2, 2), (1, 4, 4), step_generator(0, 0, 5))
    assert all(torch.equal(value, vars(second)[name]) for name, value in vars(first).items())


def test_the_draws_of_a_batch_have_the_shapes_of_latent_and_image_and_are_independent():
    draws = draw_joint(512, (2, 2, 2), (2, 2, 2), step_generator(0, 0, 0))
    assert draws.t_z.shape == draws.t_x.shape == (512,)
    noises, times = [draws.eps_prior, draws.eps_z, draws.eps_x], [draws.t_z, draws.t_x]
    values = [noise.flatten() for noise in noises] + [t.repeat_interleave(8) for t in times]
    assert (torch.corrcoef(torch.stack(values)) - torch.eye(5)).abs().max() < 0.1
    assert all(value.dtype == torch.float32 for value in vars(draws).values())


def test_half_of_the_images_are_mirrored_whole():
    x = torch.arange(2000 * 6).reshape(2000, 1, 2, 3).float()
    flipped = flip_some(x, step_generator(0, 0, 0))
    same, mirrored = (flipped == x).all((1, 2, 3)), (flipped == x.flip(3)).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.05)
