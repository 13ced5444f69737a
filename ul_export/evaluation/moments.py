"""Mean and covariance of features that come in parts, and the Frechet distance of two such pairs."""

from dataclasses import dataclass
from functools import reduce

import numpy as np
from scipy import linalg


@dataclass(frozen=True)
class Moments:
    """Count, mean `d` and centred scatter `d d` (sum of outer products about the mean) of features, in float64."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        """Of features `n d`, n >= 1."""
        rows = features.astype(np.float64)
        mean = rows.mean(axis=0)
        rows -= mean
        return cls(len(rows), mean, rows.T @ rows)

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both sets together, exactly, wherever they were computed (Chan, Golub, LeVeque 1979).

        M = M_a + M_b + n_a n_b / n (mean_b - mean_a)(mean_b - mean_a)^T
        """
        count = self.count + other.count
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        between = np.outer(apart, apart) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased, `d d`; of two features or more."""
        return self.scatter / (self.count - 1)


def streamed(features: np.ndarray, chunk: int = 1024) -> Moments:
    """Moments of features `n d`, with one chunk at a time in float64."""
    parts = (Moments.of(features[first : first + chunk]) for first in range(0, len(features), chunk))
    return reduce(Moments.merge, parts)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)): squared Wasserstein-2 of two Gaussians (Heusel et al. 2017).

    tr (C_a C_b)^(1/2) is the sum of the roots of the eigenvalues of R C_b R with R = C_a^(1/2): real, and stable where
    there are fewer features than dimensions.
    """
    values, vectors = linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    shared = linalg.eigvalsh(root @ b.covariance @ root)
    cross = np.sqrt(np.maximum(shared, 0.0)).sum()
    apart = a.mean - b.mean
    return float(apart @ apart + np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * cross)
