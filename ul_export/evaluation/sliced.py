"""Sliced Wasserstein distance of two sets of features: the Monge distance MIND."""

from functools import lru_cache

import numpy as np

_SEED = 0
_FEWEST_DIRECTIONS = 1024


def sliced_distance(a: np.ndarray, b: np.ndarray) -> float:
    """d mean_u W_2^2(u.a, u.b) of features `n d` each, u of unit length (MIND, Berthet et al. 2026, arXiv 2605.06797).

    In one dimension W_2^2 is the mean square of the differences in order. The factor d (ours) makes it the squared
    distance where one set is the other, shifted: the scale of a Frechet distance. The directions are random orthonormal
    bases, of a fixed seed, so that every basis gives shifts and scalings exactly. ValueError: other counts.
    """
    if a.shape != b.shape:
        raise ValueError(f"features of shape {list(a.shape)} and {list(b.shape)}; expected as many of each")
    bases = _bases(a.shape[1])
    total = 0.0
    for basis in bases:
        basis = basis.astype(a.dtype)
        apart = np.sort(basis @ a.T, axis=1) - np.sort(basis @ b.T, axis=1)  # a direction in each row
        total += float(np.square(apart, dtype=np.float64).mean(axis=1).sum())
    return total / len(bases)


@lru_cache(maxsize=2)
def _bases(d: int) -> tuple[np.ndarray, ...]:
    """Orthonormal bases of `d` directions, enough of them."""
    draw = np.random.default_rng(_SEED)
    return tuple(np.linalg.qr(draw.standard_normal((d, d)))[0] for _ in range(-(-_FEWEST_DIRECTIONS // d)))
