"""How close reconstructions are to their originals, image by image."""

import numpy as np
from scipy.ndimage import correlate1d

_WINDOW_PX, _WINDOW_STD_PX = 11, 1.5
SMALLEST_PX = _WINDOW_PX  # image that SSIM is defined for
_RANGE = 2.0  # of values in [-1, 1]


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
