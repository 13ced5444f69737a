"""Statistics: distances between sets of features and between images, nearest neighbours, and means over seeds."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import linalg
from scipy.ndimage import correlate1d
from scipy.stats import rankdata

_KERNEL_ROWS = 1024  # rows of a kernel matrix in memory
PRECISION_NEIGHBOURS = 3  # k of Kynkaanniemi et al. 2019
COVERAGE_NEIGHBOURS = 5  # k of Naeem et al. 2020
_CHUNK = 512  # rows of a matrix of distances in memory
_WINDOW_PX, _WINDOW_STD_PX = 11, 1.5
SMALLEST_PX = _WINDOW_PX  # image that SSIM is defined for
_RANGE = 2.0  # of values in [-1, 1]
_SEED = 0
_FEWEST_DIRECTIONS = 1024


def figures(
    count: int, model: Sequence[Mapping[str, float]], real: Sequence[Mapping[str, float]]
) -> dict[str, dict[str, Any]]:
    """Figures by name from one mapping a seed; `count` images on either side."""
    return {name: figure(count, [each[name] for each in model], [each[name] for each in real]) for name in model[0]}


def figure(count: int, model: Sequence[float], real: Sequence[float]) -> dict[str, Any]:
    """Means and sample standard deviations over the seeds, of the model and of real images; None: not known."""
    result: dict[str, Any] = {"count": count}
    for mean, spread, values in (("value", "spread", model), ("real", "real_spread", real)):
        known = bool(np.isfinite(values).all())
        result[mean] = float(np.mean(values)) if known else None
        result[spread] = float(np.std(values, ddof=1)) if known and len(values) > 1 else None
    return result


def distances(features: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """All distances of features `n d` to those of as many real images."""
    precision, recall = precision_recall(features, real)
    density, coverage = density_coverage(features, real)
    return {
        "frechet_distance": frechet_distance(features, real),
        "kernel_distance": kernel_distance(features, real),
        "sliced_distance": sliced_distance(features, real),
        "precision": precision,
        "recall": recall,
        "density": density,
        "coverage": coverage,
    }


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased MMD^2 of features `n d` and `m d` with k(x, y) = (x.y / d + 1)^3 (Binkowski et al. 2018).

    sum_{i != j} k(a_i, a_j) / n(n-1)  +  the same of b  -  2 sum_ij k(a_i, b_j) / nm

    Over all pairs, not over random subsets: zero in the mean where both are of one distribution, at any count.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    d = a.shape[1]

    def between(x: np.ndarray, y: np.ndarray) -> float:
        rows = (x[first : first + _KERNEL_ROWS] for first in range(0, len(x), _KERNEL_ROWS))
        return sum(float(((part @ y.T / d + 1.0) ** 3).sum()) for part in rows)

    def within(x: np.ndarray) -> float:
        with_itself = ((np.square(x).sum(axis=1) / d + 1.0) ** 3).sum()
        return float((between(x, x) - with_itself) / (len(x) * (len(x) - 1)))

    return within(a) + within(b) - 2.0 * between(a, b) / (len(a) * len(b))


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Of Gaussians fitted to features `n d` and `m d` (Heusel et al. 2017)."""
    return gaussian_distance(*_moments(a), *_moments(b))


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean `d` and unbiased covariance `d d` of features `n d`, in float64."""
    rows = features.astype(np.float64)
    mean = rows.mean(axis=0)
    rows -= mean
    return mean, rows.T @ rows / (len(rows) - 1)


def gaussian_distance(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)): squared Wasserstein-2 of two Gaussians.

    tr (C_a C_b)^(1/2) is the sum of the roots of the eigenvalues of R C_b R with R = C_a^(1/2): real, and stable where
    there are fewer features than dimensions.
    """
    values, vectors = linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    cross = np.sqrt(np.maximum(linalg.eigvalsh(root @ cov_b @ root), 0.0)).sum()
    apart = mean_a - mean_b
    return float(apart @ apart + np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross)


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


def nearest(queries: np.ndarray, chunks: Iterable[np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Index int64 and distance float64, both `n k`, of the k nearest of each query `n d`, nearest first.

    The features `m d` that are searched come in chunks, one after the other.
    """
    index, distance = np.full((len(queries), k), -1), np.full((len(queries), k), np.inf)
    first = 0
    for features in chunks:
        new = np.broadcast_to(np.arange(first, first + len(features)), (len(queries), len(features)))
        index = np.concatenate([index, new], axis=1)
        distance = np.concatenate([distance, np.sqrt(squared_distances(queries, features))], axis=1)
        order = np.argsort(distance, axis=1, kind="stable")[:, :k]
        index, distance = np.take_along_axis(index, order, axis=1), np.take_along_axis(distance, order, axis=1)
        first += len(features)
    return index, distance


def share_nearer(a: np.ndarray, b: np.ndarray) -> float:
    """P(a_i < b_j) + P(a_i = b_j) / 2 over all pairs of `n` and `m` values (Mann-Whitney U / nm).

    With distances to the nearest training image, of samples and of held-out images: 0.5 where samples are as far from
    the training images as unseen ones are, 1 for copies (Meehan, Chaudhuri, Dasgupta 2020).
    """
    ranks = rankdata(np.concatenate([b, a]))
    return float((ranks[: len(b)].sum() - len(b) * (len(b) + 1) / 2) / (len(a) * len(b)))


def squared_error(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean squared difference of each image, `b`, of x `b c h w` in [-1, 1]."""
    return np.square(a.astype(np.float64) - b).mean(axis=(1, 2, 3))


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity of each image, `b`, of x `b c h w` in [-1, 1], SMALLEST_PX or larger (Wang et al. 2004).

    (2 m_a m_b + C_1)(2 s_ab + C_2) / ((m_a^2 + m_b^2 + C_1)(s_a^2 + s_b^2 + C_2)), averaged over channels and over the
    places of an 11 px Gaussian window of standard deviation 1.5 px that lie within the image.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    c_1, c_2 = (0.01 * _RANGE) ** 2, (0.03 * _RANGE) ** 2
    mean_a, mean_b = _windowed(a), _windowed(b)
    var_a, var_b = _windowed(a * a) - mean_a**2, _windowed(b * b) - mean_b**2
    covariance = _windowed(a * b) - mean_a * mean_b
    above = (2.0 * mean_a * mean_b + c_1) * (2.0 * covariance + c_2)
    below = (mean_a**2 + mean_b**2 + c_1) * (var_a + var_b + c_2)
    return (above / below).mean(axis=(1, 2, 3))


def _windowed(values: np.ndarray) -> np.ndarray:
    """Weighted mean within the window around each place, where the window lies within `b c h w`."""
    half = _WINDOW_PX // 2
    weights = np.exp(-0.5 * (np.arange(-half, half + 1) / _WINDOW_STD_PX) ** 2)
    for axis in (2, 3):
        values = correlate1d(values, weights / weights.sum(), axis=axis)
    return values[:, :, half:-half, half:-half]


def sliced_distance(a: np.ndarray, b: np.ndarray) -> float:
    """d mean_u W_2^2(u.a, u.b) of features `n d` each, u of unit length (MIND, Berthet et al. 2026, arXiv 2605.06797).

    In one dimension W_2^2 is the mean square of the differences in order. The factor d (ours) makes it the squared
    distance where one set is the other, shifted: the scale of a Frechet distance. The directions are random orthonormal
    bases, of a fixed seed, so that every basis gives shifts and scalings exactly. ValueError: other counts.
    """
    if a.shape != b.shape:
        raise ValueError(f"features of shape {list(a.shape)} and {list(b.shape)}; expected as many of each")
    bases, total = _bases(a.shape[1]), 0.0
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
