"""Time grids: num_steps + 1 nodes in logsnr, from the noisiest level to the cleanest."""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from ul_runtime.noise_process import Schedule, sigmoid
from ul_runtime.spelling import Ranges, parse_spelling

Grid: TypeAlias = Callable[[int, float, float], np.ndarray]  # (num_steps, logsnr_min, logsnr_max) -> nodes


def uniform_grid(num_steps: int, logsnr_min: float, logsnr_max: float) -> np.ndarray:
    """Evenly spaced in logsnr."""
    return np.linspace(logsnr_min, logsnr_max, num_steps + 1)


def cosine_grid(num_steps: int, logsnr_min: float, logsnr_max: float) -> np.ndarray:
    """Evenly spaced in the time of the truncated cosine schedule."""
    return np.asarray(Schedule("cosine", logsnr_min, logsnr_max).logsnr(np.linspace(1.0, 0.0, num_steps + 1)))


def karras_grid(num_steps: int, logsnr_min: float, logsnr_max: float) -> np.ndarray:
    """Karras et al. 2022, eq. 5: evenly spaced in (sigma / alpha)^(1/7)."""
    noisiest, cleanest = (np.exp(-end / 14.0) for end in (logsnr_min, logsnr_max))
    return -14.0 * np.log(np.linspace(noisiest, cleanest, num_steps + 1))


def flow_grid(num_steps: int, logsnr_min: float, logsnr_max: float) -> np.ndarray:
    """Evenly spaced in the time of rectified flow (Liu et al. 2022), sigma / alpha = t / (1 - t)."""
    t = np.linspace(sigmoid(-0.5 * logsnr_min), sigmoid(-0.5 * logsnr_max), num_steps + 1)
    return 2.0 * (np.log1p(-t) - np.log(t))


def mix_grid(
    num_steps: int,
    logsnr_min: float,
    logsnr_max: float,
    rho: float = 0.5,
    centre: float = -0.5,
    width: float = 1.5,
) -> np.ndarray:
    """Quantiles of a uniform distribution in logsnr mixed with a logistic one (its share: rho).

    (0.9, -1, 1.5) is near the grid of "Align your steps" (Sabour et al. 2024) for Stable Diffusion 1.5.
    """
    nodes = np.linspace(logsnr_min, logsnr_max, 20001)
    sign = 1.0 if 2.0 * centre > logsnr_min + logsnr_max else -1.0  # of the side where the sigmoid is far from 1
    mass = sigmoid(sign * (nodes - centre) / width)
    logistic = (mass - mass[0]) / (mass[-1] - mass[0])
    share = (1.0 - rho) * (nodes - logsnr_min) / (logsnr_max - logsnr_min) + rho * logistic
    return np.interp(np.linspace(0.0, 1.0, num_steps + 1), share, nodes)


GRIDS: dict[str, Callable[..., np.ndarray]] = {
    "uniform": uniform_grid,
    "cosine": cosine_grid,
    "karras": karras_grid,
    "flow": flow_grid,
    "mix": mix_grid,
}
GRID_NUMBERS: Ranges = {"mix": {"rho": (0.0, 0.99), "centre": (-20.0, 20.0), "width": (0.25, 20.0)}}


def parse_grid(text: str, where: str = "grid") -> Grid:
    """The grid called `text`, such as `karras` or `mix:0.9,-1,1.5`; UsageError."""
    return parse_spelling(where, text, GRIDS, GRID_NUMBERS)
