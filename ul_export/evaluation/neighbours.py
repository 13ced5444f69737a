"""What nearest neighbours tell: precision, recall, density, coverage, and whether samples are copies."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

PRECISION_NEIGHBOURS = 3  # k of Kynkaanniemi et al. 2019
COVERAGE_NEIGHBOURS = 5  # k of Naeem et al. 2020
_CHUNK = 512  # rows of a matrix of distances in memory


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a_i - b_j|^2 in float64, `n m`, of features `n d` and `m d`; 0 rather than rounding errors below it."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    centre = b.mean(axis=0)  # keeps the cancellation below small
    a, b = a - centre, b - centre
    found = np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1) - 2.0 * (a @ b.T)
    return np.maximum(found, 0.0, out=found)


def _blocks(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Rows of a, and their squared distances to all of b."""
    for first in range(0, len(a), _CHUNK):
        rows = slice(first, min(first + _CHUNK, len(a)))
        yield rows, squared_distances(a[rows], b)


def squared_radii(features: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each of `n d` to its k-th nearest among the others, `n`; n > k."""
    radii = np.empty(len(features))
    for rows, distance in _blocks(features, features):
        at = np.arange(rows.start, rows.stop)
        distance[at - rows.start, at] = np.inf
        radii[rows] = np.partition(distance, k - 1, axis=1)[:, k - 1]
    return radii


def _share_within(points: np.ndarray, centres: np.ndarray, k: int) -> float:
    """Share of points inside at least one ball about the centres that reaches to its k-th nearest other centre."""
    radii = squared_radii(centres, k)
    return float(np.mean(np.concatenate([(d <= radii).any(axis=1) for _, d in _blocks(points, centres)])))


def precision_recall(samples: np.ndarray, real: np.ndarray, k: int = PRECISION_NEIGHBOURS) -> tuple[float, float]:
    """(share of samples within the balls of the real, share of the real within those of the samples).

    Kynkaanniemi et al. 2019; features `n d` and `m d`. Precision alone says little: noise in the midst of the real
    images has a precision of 1.
    """
    return _share_within(samples, real, k), _share_within(real, samples, k)


def density_coverage(samples: np.ndarray, real: np.ndarray, k: int = COVERAGE_NEIGHBOURS) -> tuple[float, float]:
    """(balls about the real that a sample lies in, over k; share of these balls with a sample in them).

    Naeem et al. 2020. Density may exceed 1. Samples of the real distribution, as many: 1 and 1 - 2^-k on average.
    """
    radii = squared_radii(real, k)
    inside, covered = 0, np.zeros(len(real), bool)
    for _, distance in _blocks(samples, real):
        within = distance <= radii
        inside += int(within.sum())
        covered |= within.any(axis=0)
    return inside / (k * len(samples)), float(covered.mean())


@dataclass(frozen=True)
class Nearest:
    """The k nearest of each of n queries, nearest first: `index` int64 and `distance` float64, both `n k`."""

    index: np.ndarray
    distance: np.ndarray

    @classmethod
    def none(cls, queries: int, k: int) -> "Nearest":
        """Before anything was searched."""
        return cls(np.full((queries, k), -1), np.full((queries, k), np.inf))

    def among(self, queries: np.ndarray, features: np.ndarray, first: int) -> "Nearest":
        """Updated by features `m d`, which have the indices first, first + 1, ...: a search goes chunk by chunk."""
        distance = np.concatenate([self.distance, np.sqrt(squared_distances(queries, features))], axis=1)
        new = np.broadcast_to(np.arange(first, first + len(features)), (len(queries), len(features)))
        index = np.concatenate([self.index, new], axis=1)
        order = np.argsort(distance, axis=1, kind="stable")[:, : self.index.shape[1]]
        return Nearest(np.take_along_axis(index, order, axis=1), np.take_along_axis(distance, order, axis=1))


def share_nearer(a: np.ndarray, b: np.ndarray) -> float:
    """P(a_i < b_j) + P(a_i = b_j) / 2 over all pairs of `n` and `m` values (Mann-Whitney U / nm).

    With distances to the nearest training image, of samples and of held-out images: 0.5 where samples are as far from
    the training images as unseen ones are, 1 for copies (Meehan, Chaudhuri, Dasgupta 2020).
    """
    ranks = rankdata(np.concatenate([b, a]))
    return float((ranks[: len(b)].sum() - len(b) * (len(b) + 1) / 2) / (len(a) * len(b)))
