"""The noise process of Unified Latents (arXiv 2602.17270): variance preserving, indexed by the full log SNR.

`logsnr = log(alpha^2 / sigma^2)`, `alpha^2 + sigma^2 = 1`, t in [0, 1] with 1 = noise.
Every function takes numpy arrays or torch tensors and returns the same kind, so the mathematics exists once.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from array_api_compat import array_namespace

Array = Any  # numpy.ndarray or torch.Tensor


def _array(value: Array | float) -> Array:
    return np.asarray(value, dtype=np.float64) if isinstance(value, (int, float)) else value


def _namespace(x: Array) -> Any:
    """numpy itself for its own arrays: array_api_compat would import all of numpy's submodules, 0.1 s; else theirs."""
    return np if isinstance(x, (np.ndarray, np.generic)) else array_namespace(x)


def _softplus(x: Array) -> Array:
    xp = _namespace(x)
    return xp.logaddexp(x, xp.zeros_like(x))


def sigmoid(x: Array | float) -> Array:
    """1 / (1 + e^-x), without overflow at either end."""
    x = _array(x)
    return _namespace(x).exp(-_softplus(-x))


def alpha(logsnr: Array | float) -> Array:
    """Signal scale sqrt(sigmoid(logsnr)), exact in the tails."""
    logsnr = _array(logsnr)
    return _namespace(logsnr).exp(-0.5 * _softplus(-logsnr))


def sigma(logsnr: Array | float) -> Array:
    """Noise scale sqrt(sigmoid(-logsnr)), exact in the tails."""
    return alpha(-_array(logsnr))


def diffuse(x: Array, eps: Array, logsnr: Array) -> Array:
    """z_t = alpha x + sigma eps; `logsnr` broadcasts against `x`."""
    return alpha(logsnr) * x + sigma(logsnr) * eps


def x_from_v(z_t: Array, v: Array, logsnr: Array) -> Array:
    """x = alpha z_t - sigma v."""
    return alpha(logsnr) * z_t - sigma(logsnr) * v


@dataclass(frozen=True)
class Schedule:
    """logsnr as a function of t: `logsnr_max` at t = 0 down to `logsnr_min` at t = 1, both moved by `shift`.

    linear: straight in logsnr. cosine: `-2 log tan(u)`, u straight in t, truncated to the two ends
    (Nichol & Dhariwal 2021 in the continuous form of Kingma et al. 2021; shift of Hoogeboom et al. 2023).
    """

    kind: Literal["linear", "cosine"]
    logsnr_min: float
    logsnr_max: float
    shift: float = 0.0

    def __post_init__(self) -> None:
        if not self.logsnr_min < self.logsnr_max:
            raise ValueError(f"logsnr_min {self.logsnr_min} must be below logsnr_max {self.logsnr_max}")

    @property
    def ends(self) -> tuple[float, float]:
        """(logsnr at t = 1, logsnr at t = 0), shift included."""
        return self.logsnr_min + self.shift, self.logsnr_max + self.shift

    def _angles(self) -> tuple[float, float]:
        return math.atan(math.exp(-0.5 * self.logsnr_max)), math.atan(math.exp(-0.5 * self.logsnr_min))

    def logsnr(self, t: Array | float) -> Array:
        """logsnr at t, any shape."""
        t = _array(t)
        if self.kind == "linear":
            return self.logsnr_max + (self.logsnr_min - self.logsnr_max) * t + self.shift
        low, high = self._angles()
        xp = _namespace(t)
        return -2.0 * xp.log(xp.tan(low + (high - low) * t)) + self.shift

    def slope(self, t: Array | float) -> Array:
        """dlogsnr/dt at t: negative everywhere."""
        t = _array(t)
        xp = _namespace(t)
        if self.kind == "linear":
            return xp.full_like(t, self.logsnr_min - self.logsnr_max)
        low, high = self._angles()
        return -4.0 * (high - low) / xp.sin(2.0 * (low + (high - low) * t))

    def time(self, logsnr: Array | float) -> Array:
        """The t at which the schedule has this logsnr."""
        logsnr = _array(logsnr) - self.shift
        if self.kind == "linear":
            return (logsnr - self.logsnr_max) / (self.logsnr_min - self.logsnr_max)
        low, high = self._angles()
        xp = _namespace(logsnr)
        return (xp.atan(xp.exp(-0.5 * logsnr)) - low) / (high - low)


def resolution_shift(size: int) -> float:
    """Shift of the image schedule so that a `size` px image is as noisy as a 64 px one: 2 log(64 / size)."""
    return 2.0 * math.log(64.0 / size)


NATS_PER_BIT = math.log(2.0)


def _sum_values(values: Array) -> Array:
    """Sum over every axis but the first: b ... -> b."""
    xp = array_namespace(values)
    return xp.sum(xp.reshape(values, (values.shape[0], -1)), axis=1)


def diffusion_term(z_clean: Array, pred: Array, logsnr: Array, slope: Array) -> Array:
    """1/2 (-dlogsnr/dt) exp(logsnr) |z_clean - pred|^2 in nats, `b`; `logsnr` and `slope` = dlogsnr/dt are `b`."""
    xp = array_namespace(z_clean)
    return -0.5 * slope * xp.exp(logsnr) * _sum_values((z_clean - pred) ** 2)


def kl_terminal(z_clean: Array, logsnr_min: float) -> Array:
    """KL(N(alpha_1 z_clean, sigma_1^2) || N(0, I)) in nats, `b`, for z_clean `b ...`."""
    alpha_1, sigma_1 = float(alpha(logsnr_min)), float(sigma(logsnr_min))
    constant = sigma_1**2 - 1.0 - 2.0 * math.log(sigma_1)  # in float64: its parts nearly cancel
    return _sum_values(0.5 * ((alpha_1 * z_clean) ** 2 + constant))
