"""The order of training images."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ul_train.data.imageset import epoch_order, sample_ids

GOLDEN_0_0 = [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
GOLDEN_MAX_3 = [3, 2, 8, 0, 1, 6, 9, 5, 4, 7]
_SEEDS = st.integers(0, 2**64 - 1)


@settings(max_examples=60)
@given(n=st.integers(1, 50), batch=st.integers(1, 120), seed=_SEEDS, epochs=st.integers(1, 4))
def test_batches_laid_end_to_end_hold_every_image_once_an_epoch(n: int, batch: int, seed: int, epochs: int) -> None:
    num_steps = -(-n * epochs // batch)
    ids = np.concatenate([sample_ids(n, seed, step, batch) for step in range(num_steps)])
    assert len(ids) == num_steps * batch
    for epoch in range(epochs):
        assert sorted(ids[epoch * n : (epoch + 1) * n]) == list(range(n))


@settings(max_examples=30)
@given(seed=_SEEDS, step=st.integers(0, 10**6))
def test_ids_depend_on_seed_and_step_only(seed: int, step: int) -> None:
    ids = sample_ids(97, seed, step, 8)
    epoch_order.cache_clear()
    for other in (step + 40, 0):
        sample_ids(97, seed, other, 8)
    assert np.array_equal(ids, sample_ids(97, seed, step, 8))


def test_batch_size_does_not_change_the_sequence() -> None:
    small = np.concatenate([sample_ids(31, 5, step, 4) for step in range(30)])
    large = np.concatenate([sample_ids(31, 5, step, 40) for step in range(3)])
    assert np.array_equal(small, large)


def test_order_is_the_golden_one() -> None:
    """Changes only if the generator does: such a change breaks every resume. Written by this function once."""
    assert epoch_order(10, 0, 0).tolist() == GOLDEN_0_0
    assert epoch_order(10, 2**64 - 1, 3).tolist() == GOLDEN_MAX_3


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = {tuple(epoch_order(40, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_positions_are_uniform() -> None:
    where = np.array([np.argmax(epoch_order(4, seed, 0) == 0) for seed in range(4000)])
    counts = np.bincount(where, minlength=4)
    assert np.all(np.abs(counts - 1000) < 5 * np.sqrt(750))


def test_the_cached_order_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(5, 0, 0)[0] = 1


@pytest.mark.parametrize("arguments", [(0, 0, 0), (5, -1, 0), (5, 2**64, 0), (5, 0, -1)])
def test_impossible_orders_are_refused(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        epoch_order(*arguments)


@pytest.mark.parametrize(("step", "batch"), [(-1, 4), (0, 0)])
def test_impossible_batches_are_refused(step: int, batch: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        sample_ids(5, 0, step, batch)
