"""Frechet distance, kernel distance and sliced distance: closed forms, definitions, and torchmetrics as the oracle."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ortho_group
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from ul_export.evaluation.statistics import frechet_distance, gaussian_distance, kernel_distance, sliced_distance


def drawn(count: int, dimensions: int, seed: int = 0, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    """Correlated Gaussian features."""
    mixing = np.random.default_rng(99).normal(size=(dimensions, dimensions))
    noise = np.random.default_rng(seed).normal(size=(count, dimensions))
    return (shift + scale * noise @ mixing).astype(np.float32)


def test_the_frechet_distance_of_gaussians_with_common_axes_is_that_of_their_means_and_deviations():
    axes = ortho_group.rvs(5, random_state=0)
    std_a, std_b = np.array([0.2, 0.5, 1.0, 2.0, 3.0]), np.array([1.0, 0.5, 3.0, 0.1, 2.0])
    mean_a, mean_b = np.arange(5.0), np.ones(5)
    found = gaussian_distance(mean_a, axes * std_a**2 @ axes.T, mean_b, axes * std_b**2 @ axes.T)
    assert found == pytest.approx(((mean_a - mean_b) ** 2).sum() + ((std_a - std_b) ** 2).sum(), abs=1e-9)


def test_the_frechet_distance_of_features_is_that_of_numpys_mean_and_covariance():
    a, b = drawn(500, 5).astype(np.float64), drawn(400, 5, seed=1, shift=0.3).astype(np.float64)
    moments = [of for each in (a, b) for of in (each.mean(axis=0), np.cov(each, rowvar=False))]
    assert frechet_distance(a, b) == pytest.approx(gaussian_distance(*moments), rel=1e-9)
    assert frechet_distance(a[:-1], b) != pytest.approx(gaussian_distance(*moments), rel=1e-9)  # the control


def test_the_frechet_distance_of_features_to_themselves_is_zero_also_if_they_are_few():
    for count in (3, 100):
        features = drawn(count, 20)
        scale = np.trace(np.cov(features, rowvar=False))
        assert frechet_distance(features, features) == pytest.approx(0.0, abs=1e-4 * scale)


@given(seed=st.integers(0, 100))
def test_the_frechet_distance_is_symmetric_and_not_negative(seed):
    a, b = drawn(30, 6, seed), drawn(40, 6, seed + 1, shift=0.1)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, b) > 0.0


class Given(torch.nn.Module):
    """An extractor for torchmetrics that returns its input."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def torchmetrics_frechet(a: np.ndarray, b: np.ndarray) -> float:
    metric = FrechetInceptionDistance(feature=Given(a.shape[1])).set_dtype(torch.float64)
    metric.update(torch.from_numpy(a).double(), real=True)
    metric.update(torch.from_numpy(b).double(), real=False)
    return float(metric.compute())


def torchmetrics_kernel(a: np.ndarray, b: np.ndarray) -> float:
    metric = KernelInceptionDistance(feature=Given(a.shape[1]), subsets=1, subset_size=len(a)).set_dtype(torch.float64)
    metric.update(torch.from_numpy(a).double(), real=True)
    metric.update(torch.from_numpy(b).double(), real=False)
    return float(metric.compute()[0])


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_torchmetrics_finds_the_same_frechet_distance(shift):
    a, b = drawn(300, 12), drawn(200, 12, seed=1, shift=shift)
    found = frechet_distance(a, b)
    assert found == pytest.approx(torchmetrics_frechet(a, b), rel=1e-6)
    assert found != pytest.approx(torchmetrics_frechet(a, b * 1.01), rel=1e-6)  # the control


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_torchmetrics_finds_the_same_kernel_distance_of_all_pairs(shift):
    a, b = drawn(150, 12), drawn(150, 12, seed=1, shift=shift)
    assert kernel_distance(a, b) == pytest.approx(torchmetrics_kernel(a, b), rel=1e-6)
    assert kernel_distance(a, b) != pytest.approx(torchmetrics_kernel(a, b * 1.01), rel=1e-6)  # the control


def test_the_kernel_distance_is_its_definition_also_over_several_chunks():
    a, b = drawn(1030, 3), drawn(7, 3, seed=1)
    k = [[(float(x.astype(float) @ y) / 3 + 1) ** 3 for y in b] for x in a[:9]]
    small = kernel_distance(a[:9], b)

    def within(rows: np.ndarray) -> float:
        n = len(rows)
        pairs = [(float(rows[i].astype(float) @ rows[j]) / 3 + 1) ** 3 for i in range(n) for j in range(n) if i != j]
        return sum(pairs) / (n * (n - 1))

    assert small == pytest.approx(within(a[:9]) + within(b) - 2 * np.mean(k), rel=1e-5)
    whole = (a.astype(float) @ a.T / 3 + 1) ** 3
    expected = (whole.sum() - np.trace(whole)) / (1030 * 1029)
    across = np.mean((a.astype(float) @ b.T / 3 + 1) ** 3)
    assert kernel_distance(a, b) - within(b) + 2 * across == pytest.approx(expected)


def test_the_kernel_distance_of_one_distribution_is_zero_in_the_mean_and_may_be_negative():
    found = [kernel_distance(drawn(40, 4, seed), drawn(40, 4, 1000 + seed)) for seed in range(200)]
    assert abs(np.mean(found)) < 4 * np.std(found) / np.sqrt(len(found))
    assert min(found) < 0.0
    apart = [kernel_distance(drawn(40, 4, seed), drawn(40, 4, 1000 + seed, shift=2.0)) for seed in range(200)]
    assert np.mean(apart) > 4 * np.std(apart) / np.sqrt(len(apart))


def independent(count: int, dimensions: int, seed: int) -> np.ndarray:
    """Standard normal features, float64."""
    return np.random.default_rng(seed).standard_normal((count, dimensions))


def test_the_sliced_distance_of_a_shift_is_its_square_and_of_a_scaling_that_of_the_features():
    a = independent(50, 6, 0)
    shift = np.array([1.0, -2.0, 0.5, 0.0, 0.0, 3.0])
    assert sliced_distance(a, a) == 0.0
    assert sliced_distance(a[::-1], a + shift) == pytest.approx(shift @ shift, rel=1e-9)
    assert sliced_distance(a, 1.5 * a) == pytest.approx(0.25 * np.square(a).sum() / len(a), rel=1e-9)


def test_the_sliced_distance_of_gaussians_is_the_mean_over_directions_of_its_closed_form():
    """W_2^2 of N(0, s^2) and N(0, t^2) is (s - t)^2; along u, s^2 = u' C u."""
    scales = np.array([1.0, 0.5, 2.0])
    a, b = independent(20_000, 3, 0), independent(20_000, 3, 1) * scales
    u = np.random.default_rng(2).standard_normal((200_000, 3))
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    expected = 3 * np.mean((1.0 - np.sqrt(np.square(u * scales).sum(axis=1))) ** 2)
    assert sliced_distance(a, b) == pytest.approx(expected, rel=0.05)
    assert sliced_distance(a, b) > 20 * sliced_distance(a, independent(20_000, 3, 2))


def test_the_sliced_distance_sees_what_moments_do_not():
    """Two points of equal mean and variance as a Gaussian: the Frechet distance is blind to them."""
    a = independent(4000, 1, 0)
    signs = np.where(np.arange(4000) % 2 == 0, 1.0, -1.0)[:, None] * a.std() + a.mean()
    assert frechet_distance(a, signs) < 1e-3
    assert sliced_distance(a, signs) > 0.3  # 2 - 2 sqrt(2 / pi) = 0.404 for infinitely many


def test_the_sliced_distance_needs_as_many_of_each():
    with pytest.raises(ValueError, match="expected as many of each"):
        sliced_distance(independent(5, 2, 0), independent(4, 2, 0))
