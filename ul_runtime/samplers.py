"""Samplers as coefficient tables: one row a step, made on the host in float64.

    z_t = a z_s + b_0 pred + b_1 pred_1 + b_2 pred_2 + s eps

`pred` is the clean-value prediction at s (noisier), `pred_1` and `pred_2` those of the two steps before, `eps` fresh
noise. No network graph knows which sampler runs. `logsnr` is the full one; solver papers use half: h = Delta / 2.
"""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from ul_runtime.errors import UsageError
from ul_runtime.noise_process import Schedule, alpha, sigma, sigmoid

ROW = ("logsnr", "alpha", "sigma", "a", "b_0", "b_1", "b_2", "s")
LOGSNR, ALPHA, SIGMA, A, B_0, B_1, B_2, S = range(len(ROW))

Update: TypeAlias = tuple[float, float, float, float, float]  # a, b_0, b_1, b_2, s


def ddim(logsnr: np.ndarray, k: int) -> Update:
    """Song, Meng & Ermon 2021, eq. 12, on the clean value: a = sigma_t / sigma_s, b_0 = alpha_t (1 - e^{-Delta/2})."""
    delta = logsnr[k + 1] - logsnr[k]
    ratio = float(sigma(logsnr[k + 1]) / sigma(logsnr[k]))
    return ratio, float(-alpha(logsnr[k + 1]) * np.expm1(-0.5 * delta)), 0.0, 0.0, 0.0


def ancestral(logsnr: np.ndarray, k: int) -> Update:
    """Ho, Jain & Abbeel 2020, eq. 7: a draw of q(z_t | z_s, x = pred), in the logsnr form of Kingma et al. 2021."""
    delta = logsnr[k + 1] - logsnr[k]
    ratio = float(sigma(logsnr[k + 1]) / sigma(logsnr[k]))
    kept = -np.expm1(-delta)
    noise = float(sigma(logsnr[k + 1]) * np.sqrt(kept))
    return ratio * float(np.exp(-0.5 * delta)), float(alpha(logsnr[k + 1]) * kept), 0.0, 0.0, noise


def dpmpp2m(logsnr: np.ndarray, k: int) -> Update:
    """DPM-Solver++(2M), midpoint form (Lu et al. 2022, algorithm 2); the first step is of order 1."""
    a, b_0, _, _, _ = ddim(logsnr, k)
    if k == 0:
        return a, b_0, 0.0, 0.0, 0.0
    ratio = (logsnr[k] - logsnr[k - 1]) / (logsnr[k + 1] - logsnr[k])
    share = float(b_0 / (2.0 * ratio))
    return a, b_0 + share, -share, 0.0, 0.0


def uniform_grid(num_steps: int, logsnr_min: float, logsnr_max: float) -> np.ndarray:
    """num_steps + 1 nodes, evenly spaced in logsnr."""
    return np.linspace(logsnr_min, logsnr_max, num_steps + 1)


def cosine_grid(num_steps: int, logsnr_min: float, logsnr_max: float) -> np.ndarray:
    """num_steps + 1 nodes, evenly spaced in the time of the truncated cosine schedule."""
    return np.asarray(Schedule("cosine", logsnr_min, logsnr_max).logsnr(np.linspace(1.0, 0.0, num_steps + 1)))


def mix_grid(
    num_steps: int,
    logsnr_min: float,
    logsnr_max: float,
    rho: float = 0.5,
    centre: float = -0.5,
    width: float = 1.5,
) -> np.ndarray:
    """num_steps + 1 quantiles of a uniform distribution in logsnr mixed with a logistic one (its share: rho)."""
    nodes = np.linspace(logsnr_min, logsnr_max, 20001)
    low, high = (sigmoid((end - centre) / width) for end in (logsnr_min, logsnr_max))
    logistic = (sigmoid((nodes - centre) / width) - low) / (high - low)
    share = (1.0 - rho) * (nodes - logsnr_min) / (logsnr_max - logsnr_min) + rho * logistic
    return np.interp(np.linspace(0.0, 1.0, num_steps + 1), share, nodes)


SAMPLERS: dict[str, Callable[[np.ndarray, int], Update]] = {
    "ddim": ddim,
    "ancestral": ancestral,
    "dpmpp2m": dpmpp2m,
}
GRIDS: dict[str, Callable[[int, float, float], np.ndarray]] = {
    "uniform": uniform_grid,
    "cosine": cosine_grid,
    "mix": mix_grid,
}


def sampler_table(
    sampler: str, grid: str, num_steps: int, *, logsnr_min: float, logsnr_max: float, ends_clean: bool
) -> np.ndarray:
    """The table `[num_steps, 8]` (columns ROW), float64.

    It runs from `logsnr_min` to `logsnr_max`; with `ends_clean` the last step returns the prediction itself, without
    it the state keeps the noise of `logsnr_max` (the prior: the decoder is given the noisy z_0).
    Raises UsageError for an unknown sampler or grid and for fewer than one step.
    """
    for what, name, known in (("sampler", sampler, SAMPLERS), ("grid", grid, GRIDS)):
        if name not in known:
            raise UsageError(f"{what} {name!r} is not known; expected one of {', '.join(known)}")
    if num_steps < 1:
        raise UsageError(f"the number of steps is {num_steps}; expected 1 or more")
    logsnr = GRIDS[grid](num_steps, logsnr_min, logsnr_max)
    rows = [
        (logsnr[k], float(alpha(logsnr[k])), float(sigma(logsnr[k])), *SAMPLERS[sampler](logsnr, k))
        for k in range(num_steps)
    ]
    table = np.array(rows, dtype=np.float64)
    if ends_clean:
        table[-1, A:] = (0.0, 1.0, 0.0, 0.0, 0.0)
    return table


def needs_noise(table: np.ndarray) -> bool:
    """Whether any step of the table draws fresh noise."""
    return bool(np.any(table[:, S] != 0.0))
