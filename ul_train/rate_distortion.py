"""The yardstick of a bitrate: the Gaussian rate-distortion function of the same images.

No linear Gaussian codec gets below this error at this rate (reverse water-filling, Cover & Thomas 2006, 10.3.3).
"""

import numpy as np


def reverse_water_filling(eigenvalues: np.ndarray, bits: float) -> float:
    """Least squared error, summed over dimensions, of a Gaussian with these variances at `bits` in all.

    D = sum min(level, lambda), R = sum max(0, 1/2 log2(lambda / level)); the water level is found in closed form.
    """
    if bits < 0:
        raise ValueError(f"bits {bits} must be 0 or more")
    variances = np.sort(np.asarray(eigenvalues, np.float64))[::-1]
    variances = variances[variances > 0]
    if bits == 0 or not len(variances):
        return float(variances.sum())
    logs = np.cumsum(np.log2(variances))
    active = np.arange(1, len(variances) + 1)
    levels = (logs - 2.0 * bits) / active  # log2 of the level if exactly the k largest are above water
    below = np.append(np.log2(variances[1:]), -np.inf)
    count = int(np.argmax(levels >= below)) + 1
    return float(count * np.exp2(levels[count - 1]) + variances[count:].sum())


def image_covariance_eigenvalues(images: np.ndarray, chunk: int = 4096) -> np.ndarray:
    """Eigenvalues `c*h*w` of the covariance of uint8 images `n c h w`, scaled to [-1, 1]; one chunk in memory."""
    num, size = len(images), int(np.prod(images.shape[1:]))
    total, second = np.zeros(size), np.zeros((size, size))
    for first in range(0, num, chunk):
        x = images[first : first + chunk].reshape(-1, size).astype(np.float64) / 127.5 - 1.0
        total += x.sum(axis=0)
        second += x.T @ x
    mean = total / num
    return np.maximum(np.linalg.eigvalsh(second / num - np.outer(mean, mean)), 0.0)


def psnr_db(mean_squared_error: float) -> float:
    """10 log10(4 / mse) for values in [-1, 1]; infinite without error."""
    return float(10.0 * np.log10(4.0 / mean_squared_error)) if mean_squared_error > 0 else float("inf")


def gaussian_psnr_db(eigenvalues: np.ndarray, bits: float) -> float:
    """PSNR of the Gaussian rate-distortion function at `bits` an image."""
    return psnr_db(reverse_water_filling(eigenvalues, bits) / len(eigenvalues))
