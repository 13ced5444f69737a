"""Kernel distance (KID): maximum mean discrepancy of two sets of features under a polynomial kernel."""

from collections.abc import Iterator

import numpy as np

_CHUNK = 1024  # rows of a kernel matrix in memory


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased MMD^2 of features `n d` and `m d` with k(x, y) = (x.y / d + 1)^3 (Binkowski et al. 2018).

    sum_{i != j} k(a_i, a_j) / n(n-1)  +  the same of b  -  2 sum_ij k(a_i, b_j) / nm

    Over all pairs, not over random subsets: zero in the mean where both are of one distribution, at any count.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    return _within(a) + _within(b) - 2.0 * _between(a, b) / (len(a) * len(b))


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T / a.shape[1] + 1.0) ** 3


def _rows(a: np.ndarray) -> Iterator[np.ndarray]:
    return (a[first : first + _CHUNK] for first in range(0, len(a), _CHUNK))


def _between(a: np.ndarray, b: np.ndarray) -> float:
    return sum(float(_kernel(rows, b).sum()) for rows in _rows(a))


def _within(a: np.ndarray) -> float:
    with_itself = ((np.square(a).sum(axis=1) / a.shape[1] + 1.0) ** 3).sum()
    return float((_between(a, a) - with_itself) / (len(a) * (len(a) - 1)))
