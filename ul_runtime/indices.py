"""Indices and seeds of images: indices are 0 to 2^63 - 1 (int64), seeds 0 to 2^64 - 1."""

import operator
from collections.abc import Sequence

import numpy as np

from ul_runtime.errors import UsageError

SEEDS = 2**64
INDICES = 2**63


def as_indices(images: int | Sequence[int] | np.ndarray) -> np.ndarray:
    """A count (0, 1, ...) or a list of indices as int64; UsageError for what is not whole or out of range."""
    if isinstance(images, (int, np.integer)):
        if images < 1:
            raise UsageError(f"the number of images is {images}; expected 1 or more")
        return np.arange(images, dtype=np.int64)
    try:
        numbers = [operator.index(index) for index in images]
    except TypeError as error:
        raise UsageError(f"image indices: {error}; a flat list of whole numbers is expected") from error
    for number in numbers:
        if not 0 <= number < INDICES:
            raise UsageError(f"image index {number} is out of range; expected 0 to 2^63 - 1")
    return np.array(numbers, np.int64)


def check_seed(seed: int) -> None:
    """UsageError for a seed that is not 0 to 2^64 - 1."""
    if not 0 <= seed < SEEDS:
        raise UsageError(f"the seed is {seed}; expected 0 to {SEEDS - 1}")
