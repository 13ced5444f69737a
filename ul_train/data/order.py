"""Which image is trained on when: a function of (seed, step) alone, whatever the workers or the restarts."""

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=2)
def epoch_order(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """Order of epoch `epoch` (0-based): a permutation, int64 n, read-only.

    Sorts raw Philox words keyed by (seed, epoch): the generator's words are fixed over numpy versions,
    its `permutation` is not. `seed` and `epoch` are 0 to 2^64 - 1, else ValueError.
    """
    if num_images < 1:
        raise ValueError(f"num_images {num_images}: at least 1 is expected")
    if not (0 <= seed < 2**64 and 0 <= epoch < 2**64):
        raise ValueError(f"seed {seed}, epoch {epoch}: 0 to 2^64 - 1 is expected")
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(num_images)
    order = np.argsort(words, kind="stable").astype(np.int64)
    order.setflags(write=False)
    return order


def sample_ids(num_images: int, seed: int, step: int, batch_size: int) -> np.ndarray:
    """Images of global training step `step` (0-based), int64 b: the epochs' orders laid end to end,
    cut into batches. A batch may span epochs; every epoch holds every image exactly once. ValueError."""
    if step < 0 or batch_size < 1:
        raise ValueError(f"step {step}, batch_size {batch_size}: step >= 0 and batch_size >= 1 are expected")
    epoch, position = divmod(step * batch_size, num_images)
    pieces = []
    while batch_size > 0:
        piece = epoch_order(num_images, seed, epoch)[position : position + batch_size]
        pieces.append(piece)
        batch_size -= len(piece)
        epoch, position = epoch + 1, 0
    return np.concatenate(pieces)
