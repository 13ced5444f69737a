"""How real images are divided for ul-eval."""

from typing import Any

import numpy as np
import pytest

from ul_export.evaluation.comparison import Comparison
from ul_export.options import EvalOptions
from ul_train.data.imageset import ImageSet, Splits

COUNT = 101


def comparison(labels: np.ndarray) -> Comparison:
    """Over real images with these labels; nothing is measured."""
    pixels = np.zeros((len(labels), 1, 16, 16), np.uint8)
    images = ImageSet(pixels, labels, ("a", "b", "c"), "0" * 64)
    anything: Any = None
    return Comparison(
        anything, Splits(images, images, anything), "heldout", (), EvalOptions(data="", images=COUNT, seeds=2), {}
    )


@pytest.mark.parametrize("shares", [(0.34, 0.33, 0.33), (0.9, 0.07, 0.03), (1.0, 0.0, 0.0)])
def test_halves_hold_as_many_images_of_every_class_and_no_image_twice(shares):
    labels = np.random.default_rng(0).choice(3, 500, p=shares)
    for seed in range(20):
        given = comparison(labels)
        first, second = given.halves(seed)
        assert len(first) == len(second) == COUNT
        assert sorted([*first, *second]) == list(range(2 * COUNT))
        counts = [np.bincount(labels[given.real_ids[half]], minlength=3) for half in (first, second)]
        assert np.abs(counts[0] - counts[1]).max() <= 1


def test_halves_without_classes_are_random_and_other_for_another_seed():
    given = comparison(np.full(500, -1))
    first, second = given.halves(0)
    assert np.array_equal(first, given.halves(0)[0])
    assert not np.array_equal(first, given.halves(1)[0])
    assert not np.array_equal(first, np.sort(first))
    assert sorted([*first, *second]) == list(range(2 * COUNT))


def test_a_beginning_of_a_half_is_of_all_classes():
    labels = np.repeat([0, 1, 2], 100)
    given = comparison(labels)
    assert set(labels[given.real_ids[given.halves(0)[0][:30]]]) == {0, 1, 2}
