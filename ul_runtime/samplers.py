"""Samplers as coefficient tables, made on the host in float64: one row for each call of the network.

    z_t = a z_s + b_0 pred + b_1 pred_1 + b_2 pred_2 + s eps

`pred` is the clean-value prediction at s (noisier), `pred_1` and `pred_2` those of the two rows before, `eps` fresh
noise. No network graph knows which sampler runs. `logsnr` is the full one; solver papers use half: h = Delta / 2.
"""

import difflib
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias, TypeVar

import numpy as np

from ul_runtime.diffusion import Schedule, alpha, sigma, sigmoid
from ul_runtime.errors import UsageError

T = TypeVar("T")
Ranges: TypeAlias = Mapping[str, Mapping[str, tuple[float, float]]]  # name -> its numbers in order, each with its ends


def parse_spelling(where: str, text: str, known: Mapping[str, Callable[..., T]], ranges: Ranges) -> Callable[..., T]:
    """The function of `known` that `text` names, with the numbers it gives; without numbers, the function's own.

    `where` (sampler, sampling.decoder_grid, ...) begins the message of a UsageError.
    """
    name, colon, numbers = text.partition(":")
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        spellings = ", ".join(_spelling(other, ranges) for other in known)
        raise UsageError(f"{where} {text!r} is not known; expected one of {spellings}{hint}")
    if not colon:
        return known[name]
    ends = ranges.get(name)
    if ends is None:
        raise UsageError(f"{where} {text!r}: {name} takes no numbers; give {name}")
    try:
        values = [float(number) for number in numbers.split(",")]
    except ValueError:
        values = []
    if len(values) != len(ends) or any(
        not low <= value <= high for value, (low, high) in zip(values, ends.values(), strict=True)
    ):
        wanted = ", ".join(f"{number} {low:g} to {high:g}" for number, (low, high) in ends.items())
        raise UsageError(f"{where} {text!r}: expected {name}:{_names(ends)} with {wanted}")
    return partial(known[name], **dict(zip(ends, values, strict=True)))


def _spelling(name: str, ranges: Ranges) -> str:
    return f"{name}[:{_names(ranges[name])}]" if name in ranges else name


def _names(ends: Mapping[str, tuple[float, float]]) -> str:
    return ",".join(number.upper() for number in ends)


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


ROW = ("logsnr", "alpha", "sigma", "a", "b_0", "b_1", "b_2", "s")
LOGSNR, ALPHA, SIGMA, A, B_0, B_1, B_2, S = range(len(ROW))

Update: TypeAlias = tuple[float, float, float, float, float]  # a, b_0, b_1, b_2, s
# (nodes, k) -> the rows of the step from node k to k + 1: the first calls the network at node k, a second at k + 1
Sampler: TypeAlias = Callable[[np.ndarray, int], list[Update]]


def ddim(logsnr: np.ndarray, k: int) -> list[Update]:
    """Song, Meng & Ermon 2021, eq. 12, on the clean value: a = sigma_t / sigma_s, b_0 = alpha_t (1 - e^{-h})."""
    h = 0.5 * (logsnr[k + 1] - logsnr[k])
    ratio = sigma(logsnr[k + 1]) / sigma(logsnr[k])
    return [(ratio, -alpha(logsnr[k + 1]) * np.expm1(-h), 0.0, 0.0, 0.0)]


def ancestral(logsnr: np.ndarray, k: int) -> list[Update]:
    """Ho, Jain & Abbeel 2020, eq. 7: a draw of q(z_t | z_s, x = pred), in the logsnr form of Kingma et al. 2021."""
    delta = logsnr[k + 1] - logsnr[k]
    ratio = sigma(logsnr[k + 1]) / sigma(logsnr[k])
    kept = -np.expm1(-delta)
    return [(ratio * np.exp(-0.5 * delta), alpha(logsnr[k + 1]) * kept, 0.0, 0.0, sigma(logsnr[k + 1]) * np.sqrt(kept))]


def dpmpp2m(logsnr: np.ndarray, k: int) -> list[Update]:
    """DPM-Solver++(2M), midpoint form (Lu et al. 2022, algorithm 2); the first step is of order 1."""
    ((a, b_0, *_),) = ddim(logsnr, k)
    if k == 0:
        return [(a, b_0, 0.0, 0.0, 0.0)]
    ratio = (logsnr[k] - logsnr[k - 1]) / (logsnr[k + 1] - logsnr[k])
    share = b_0 / (2.0 * ratio)
    return [(a, b_0 + share, -share, 0.0, 0.0)]


def moments(y: float, count: int) -> np.ndarray:
    """Integral_0^1 y e^{-y u} u^k du for k < count: J_0 = 1 - e^{-y}, J_k = (k / y) J_{k-1} - e^{-y}.

    That cancels for small y; there, the power series y sum_m (-y)^m / (m! (k + m + 1)).
    """
    if y < 0.3:
        m = np.arange(14)
        terms = np.cumprod(np.append(1.0, -y / m[1:])) / (np.arange(count)[:, None] + m + 1)
        return y * terms.sum(axis=1)
    values = [-np.expm1(-y)]
    for k in range(1, count):
        values.append(k / y * values[-1] - np.exp(-y))
    return np.array(values)


def exact_weights(logsnr: np.ndarray, k: int, known: list[int], tau: float = 0.0) -> np.ndarray:
    """b_j = alpha_t Integral_0^h kappa e^{-kappa u} L_j(u) du for predictions at the nodes `known`; kappa = 1 + tau^2.

    L_j is the Lagrange basis on u_j = ell_t - ell_j (ell: half logsnr): the weights that are exact for 1, u, u^2.
    """
    step = logsnr[k + 1] - logsnr[k]
    u = (logsnr[k + 1] - logsnr[known]) / step
    powers = u ** np.arange(len(u))[:, None]
    return alpha(logsnr[k + 1]) * np.linalg.solve(powers, moments(0.5 * step * (1.0 + tau**2), len(u)))


def adams_bashforth(logsnr: np.ndarray, k: int, order: int, tau: float = 0.0) -> list[Update]:
    """Exponential Adams-Bashforth (SA-Solver's predictor, Xue et al. 2023, eq. 14), of lower order in the first steps.

    a = (sigma_t / sigma_s) e^{-tau^2 h}, s = sigma_t sqrt(1 - e^{-2 tau^2 h}); tau is the amount of noise.
    """
    known = [k - j for j in range(min(order, k + 1))]
    b = np.zeros(3)
    b[: len(known)] = exact_weights(logsnr, k, known, tau)
    noise = 0.5 * tau**2 * (logsnr[k + 1] - logsnr[k])  # tau^2 h
    ratio = sigma(logsnr[k + 1]) / sigma(logsnr[k])
    return [(ratio * np.exp(-noise), b[0], b[1], b[2], sigma(logsnr[k + 1]) * np.sqrt(-np.expm1(-2.0 * noise)))]


def ab2(logsnr: np.ndarray, k: int) -> list[Update]:
    """Exponential Adams-Bashforth of order 2: DPM-Solver++(2M) with its integral taken exactly."""
    return adams_bashforth(logsnr, k, 2)


def ab3(logsnr: np.ndarray, k: int) -> list[Update]:
    """Exponential Adams-Bashforth of order 3; DPM-Solver++(3M) as published halves the last difference: order 2."""
    return adams_bashforth(logsnr, k, 3)


def sa2(logsnr: np.ndarray, k: int, tau: float = 1.0) -> list[Update]:
    """SA-Solver's predictor of order 2 (Xue et al. 2023); tau = 1 is DPM-Solver++(2M) SDE, tau = 0 is ab2."""
    return adams_bashforth(logsnr, k, 2, tau)


def unipc2(logsnr: np.ndarray, k: int) -> list[Update]:
    """UniPC-2, B_2(h) (Zhao et al. 2023, algorithms 5 and 7): predicts as dpmpp2m, then corrects without another call.

    Row k first corrects the state that row k - 1 predicted, with the prediction that was made there: the weights c on
    {t, s, s - 1} take the place of the predictor's p. Both share a, so correcting and predicting is again one row.
    """
    ((a, b_0, b_1, _, _),) = dpmpp2m(logsnr, k)
    if k == 0:
        return [(a, b_0, 0.0, 0.0, 0.0)]
    ((_, p_0, p_1, _, _),) = dpmpp2m(logsnr, k - 1)
    c = np.array([0.5 * p_0, 0.5 * p_0, 0.0]) if k == 1 else exact_weights(logsnr, k - 1, [k, k - 1, k - 2])
    correction = c - np.array([0.0, p_0, p_1])
    b = a * correction + np.array([b_0, b_1, 0.0])
    return [(a, b[0], b[1], b[2], 0.0)]


def heun(logsnr: np.ndarray, k: int) -> list[Update]:
    """Two calls a step, as a reference: DDIM to t, then the mean of the predictions at both ends (exponential Heun)."""
    ((a, b_0, *_),) = ddim(logsnr, k)
    return [(a, b_0, 0.0, 0.0, 0.0), (1.0, 0.5 * b_0, -0.5 * b_0, 0.0, 0.0)]


SAMPLERS: dict[str, Callable[..., list[Update]]] = {
    "ddim": ddim,
    "ancestral": ancestral,
    "dpmpp2m": dpmpp2m,
    "ab2": ab2,
    "ab3": ab3,
    "sa2": sa2,
    "unipc2": unipc2,
    "heun": heun,
}
SAMPLER_NUMBERS: Ranges = {"sa2": {"tau": (0.0, 10.0)}}


def parse_sampler(text: str, where: str = "sampler") -> Sampler:
    """The sampler called `text`, such as `ab3` or `sa2:0.6`; UsageError."""
    return parse_spelling(where, text, SAMPLERS, SAMPLER_NUMBERS)


def sampler_table(
    sampler: str, grid: str, num_steps: int, *, logsnr_min: float, logsnr_max: float, ends_clean: bool
) -> np.ndarray:
    """The table `[rows, 8]` (columns ROW), float64: a row for each call of the network, two a step of heun, else one.

    It runs from `logsnr_min` to `logsnr_max`; with `ends_clean` the last step is one row that returns the prediction
    itself, without it the state keeps the noise of `logsnr_max` (the prior: the decoder is given the noisy z_0).
    Raises UsageError for an unknown sampler or grid, a grid that does not rise, and fewer than one step.
    """
    rows_of_step, nodes_of_grid = parse_sampler(sampler), parse_grid(grid)
    if num_steps < 1:
        raise UsageError(f"the number of steps is {num_steps}; expected 1 or more")
    logsnr = nodes_of_grid(num_steps, logsnr_min, logsnr_max)
    if not (np.diff(logsnr) > 0.0).all():
        raise UsageError(f"grid {grid!r} does not rise in {num_steps} steps from {logsnr_min} to {logsnr_max}")
    steps = [rows_of_step(logsnr, k) for k in range(num_steps)]
    if ends_clean:
        steps[-1] = [(0.0, 1.0, 0.0, 0.0, 0.0)]
    calls = [(logsnr[k + call], update) for k, step in enumerate(steps) for call, update in enumerate(step)]
    return np.array([(level, alpha(level), sigma(level), *update) for level, update in calls], dtype=np.float64)
