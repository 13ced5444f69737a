"""The Gaussian rate-distortion function against closed forms, its properties, and a bisection of the water level."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ul_train.heldout import gaussian_psnr_db, image_covariance_eigenvalues, psnr_db, reverse_water_filling

spectra = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=40).map(np.array)
rates = st.floats(0.0, 200.0)


def bisected(variances: np.ndarray, bits: float) -> float:
    """The same by its definition: the water level whose rate is `bits`, found by halving in log2."""
    low, high = -600.0, float(np.log2(variances.max()))
    for _ in range(200):
        middle = 0.5 * (low + high)
        rate = np.maximum(0.0, 0.5 * (np.log2(variances) - middle)).sum()
        low, high = (middle, high) if rate > bits else (low, middle)
    return float(np.minimum(np.exp2(high), variances).sum())


@pytest.mark.parametrize("bits", [0.0, 0.5, 3.0, 40.0])
def test_equal_variances_share_the_bits(bits: float) -> None:
    assert reverse_water_filling(np.full(8, 2.5), bits) == pytest.approx(8 * 2.5 * 2 ** (-2 * bits / 8))


def test_the_smaller_of_two_variances_stays_under_water_until_the_larger_has_come_down_to_it() -> None:
    variances = np.array([1.0, 16.0])
    assert reverse_water_filling(variances, 1.0) == pytest.approx(16.0 / 4 + 1.0)
    assert reverse_water_filling(variances, 2.0) == pytest.approx(1.0 + 1.0)
    assert reverse_water_filling(variances, 3.0) == pytest.approx(2 * 0.5)


@given(variances=spectra)
def test_without_bits_the_error_is_the_whole_variance(variances: np.ndarray) -> None:
    assert reverse_water_filling(variances, 0.0) == pytest.approx(variances.sum())
    assert reverse_water_filling(np.append(variances, 0.0), 0.0) == pytest.approx(variances.sum())


@given(variances=spectra, bits=rates)
def test_it_equals_a_bisection_of_the_water_level(variances: np.ndarray, bits: float) -> None:
    assert reverse_water_filling(variances, bits) == pytest.approx(bisected(variances, bits), rel=1e-9)


def test_the_comparison_sees_a_forgotten_half() -> None:
    variances = np.array([1.0, 4.0, 9.0])
    assert reverse_water_filling(variances, 2.0) != pytest.approx(bisected(variances, 1.0), rel=1e-2)


@given(variances=spectra, bits=st.tuples(rates, rates), share=st.floats(0.0, 1.0))
def test_the_error_falls_and_is_convex_in_the_rate(
    variances: np.ndarray, bits: tuple[float, float], share: float
) -> None:
    low, high = sorted(bits)
    middle = share * low + (1 - share) * high
    at_low, at_middle, at_high = (reverse_water_filling(variances, each) for each in (low, middle, high))
    slack = 1e-9 * variances.sum()
    assert at_high <= at_middle + slack
    assert at_middle <= at_low + slack
    assert at_middle <= share * at_low + (1 - share) * at_high + slack


@given(variances=spectra, bits=rates, seed=st.integers(0, 9))
def test_order_and_scale_of_the_spectrum_do_not_matter(variances: np.ndarray, bits: float, seed: int) -> None:
    error = reverse_water_filling(variances, bits)
    shuffled = np.random.default_rng(seed).permutation(variances)
    assert reverse_water_filling(shuffled, bits) == pytest.approx(error)
    assert reverse_water_filling(9.0 * variances, bits) == pytest.approx(9.0 * error)


def test_a_negative_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="0 or more"):
        reverse_water_filling(np.ones(2), -1.0)


@pytest.mark.parametrize("chunk", [1, 7, 50, 4096])
def test_the_covariance_does_not_depend_on_the_chunk(chunk: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (50, 2, 3, 3), dtype=np.uint8)
    x = images.reshape(50, -1) / 127.5 - 1.0
    expected = np.linalg.eigvalsh(np.cov(x.T, bias=True))
    assert image_covariance_eigenvalues(images, chunk) == pytest.approx(expected)


def test_equal_images_have_no_variance_and_no_error() -> None:
    eigenvalues = image_covariance_eigenvalues(np.full((20, 1, 2, 2), 77, np.uint8))
    assert eigenvalues == pytest.approx(np.zeros(4), abs=1e-12)
    assert gaussian_psnr_db(np.zeros(4), 10.0) == float("inf")


def test_psnr_is_that_of_values_in_0_to_255() -> None:
    random = np.random.default_rng(0)
    a, b = (random.integers(0, 256, 1000).astype(float) for _ in range(2))
    usual = 10 * np.log10(255**2 / np.square(a - b).mean())
    assert psnr_db(float(np.square((a - b) / 127.5).mean())) == pytest.approx(usual)
    assert psnr_db(0.04) == pytest.approx(20.0)
    assert psnr_db(0.0) == float("inf")


def test_the_psnr_bound_is_that_of_the_mean_error_a_value() -> None:
    variances = np.array([4.0, 1.0, 0.25, 0.25])
    assert gaussian_psnr_db(variances, 1.0) == pytest.approx(psnr_db((1.0 + 1.0 + 0.5) / 4))
