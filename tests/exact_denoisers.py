"""Exact denoisers in place of networks, and integrals over data, noise and time in place of random draws.

For Gaussian and two-point data E[x | z_t] has a closed form, so every figure of the objective has one too.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ul_runtime.diffusion import Array, Schedule, alpha, sigma
from ul_runtime.samplers import B_0, B_1, B_2, LOGSNR, A, S
from ul_train.objective import low_discrepancy_times, prior_nats


def v_target(x: Array, eps: Array, logsnr: Array) -> Array:
    """v = alpha eps - sigma x."""
    return alpha(logsnr) * eps - sigma(logsnr) * x


def eps_from_v(z_t: Array, v: Array, logsnr: Array) -> Array:
    """eps = sigma z_t + alpha v."""
    return sigma(logsnr) * z_t + alpha(logsnr) * v


def v_from_x(z_t: Array, x: Array, logsnr: Array) -> Array:
    """v = (alpha z_t - x) / sigma."""
    return (alpha(logsnr) * z_t - x) / sigma(logsnr)


def discrete_term(z_clean: np.ndarray, pred: np.ndarray, logsnr_s: np.ndarray, logsnr_t: np.ndarray) -> np.ndarray:
    """1/2 (exp(logsnr_t) - exp(logsnr_s)) |z_clean - pred|^2 in nats, `b`: what one step from s to t costs."""
    return 0.5 * (np.exp(logsnr_t) - np.exp(logsnr_s)) * ((z_clean - pred) ** 2).sum(axis=1)


def needs_noise(table: np.ndarray) -> bool:
    """Whether any row draws fresh noise."""
    return bool(np.any(table[:, S] != 0.0))


LATENT_SCHEDULE = Schedule("linear", -10.0, 5.0)


def gaussian_mean(z_t, logsnr, std: float, mean: float = 0.0):
    """E[x | z_t] for x ~ N(mean, std^2), numpy or torch."""
    a, s = alpha(logsnr), sigma(logsnr)
    return mean + a * std**2 / (a**2 * std**2 + s**2) * (z_t - a * mean)


CENTRES = np.array([-1.0, 0.3, 1.2])


def mixture_mean(z: np.ndarray, logsnr: float, width: float = 0.35) -> np.ndarray:
    """E[x | z] for an even mixture of three Gaussians at CENTRES, not linear in z; width 0: three points."""
    a, s = float(alpha(logsnr)), float(sigma(logsnr))
    variance = a**2 * width**2 + s**2
    log_share = -((z[..., None] - a * CENTRES) ** 2) / (2 * variance)
    share = np.exp(log_share - log_share.max(axis=-1, keepdims=True))
    means = CENTRES + a * width**2 / variance * (z[..., None] - a * CENTRES)
    return (share * means).sum(axis=-1) / share.sum(axis=-1)


def gaussian_v(std: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The v-prediction network that knows its latents are N(0, std^2)."""

    def predict(z_t: Tensor, logsnr: Tensor) -> Tensor:
        level = logsnr.reshape(-1, *[1] * (z_t.ndim - 1))
        return v_from_x(z_t, gaussian_mean(z_t, level, std), level)

    return predict


def two_point_v(z_t: Tensor, logsnr: Tensor) -> Tensor:
    """The v-prediction network that knows its latents are +1 or -1: E[x | z_t] = tanh(alpha z_t / sigma^2)."""
    level = logsnr.reshape(-1, *[1] * (z_t.ndim - 1))
    return v_from_x(z_t, torch.tanh(alpha(level) * z_t / sigma(level) ** 2), level)


@dataclass(frozen=True)
class Nodes:
    """A discrete distribution whose means equal the integrals over another one."""

    values: Tensor
    weights: Tensor


def two_node_gaussian(std: float) -> Nodes:
    """+-std: Gauss-Hermite with two nodes, exact up to degree 3, so for squared errors of linear maps."""
    return Nodes(torch.tensor([-std, std], dtype=torch.float64), torch.full((2,), 0.5, dtype=torch.float64))


def fine_gaussian() -> Nodes:
    """Trapezoidal rule over N(0, 1): its error falls faster than any power of the spacing."""
    values = torch.linspace(-9.0, 9.0, 361, dtype=torch.float64)
    weights = torch.exp(-0.5 * values**2)
    return Nodes(values, weights / weights.sum())


def one_point(value: float) -> Nodes:
    return Nodes(torch.tensor([value], dtype=torch.float64), torch.ones(1, dtype=torch.float64))


def expected_nats(
    predict_v: Callable[[Tensor, Tensor], Tensor],
    data: Nodes,
    noise: Nodes,
    *,
    schedule: Schedule = LATENT_SCHEDULE,
    num_times: int = 4096,
    nats: Callable[..., Tensor] = prior_nats,
) -> float:
    """E over t, x and eps of `nats` for one-dimensional latents, by the midpoint rule in t."""
    t = low_discrepancy_times(torch.tensor(0.5, dtype=torch.float64), torch.arange(num_times))
    grid = torch.cartesian_prod(t, data.values, noise.values)
    weight = torch.cartesian_prod(torch.full_like(t, 1.0 / num_times), data.weights, noise.weights).prod(dim=1)
    z_clean, eps = grid[:, 1].reshape(-1, 1, 1, 1), grid[:, 2].reshape(-1, 1, 1, 1)
    return float((weight * nats(predict_v, z_clean, eps, grid[:, 0], schedule)).sum())


def gaussian_rate(std: float, **options) -> float:
    """Nats a dimension of N(0, std^2) latents under the exact prior, through what training calls."""
    return expected_nats(gaussian_v(std), two_node_gaussian(std), two_node_gaussian(1.0), **options)


def walk(table: np.ndarray, z: np.ndarray, denoise: Callable, noise: Callable[[int], np.ndarray] | None = None):
    """The state after all rows of a sampler's table, in float64; `denoise(z, logsnr)` predicts the clean value."""
    pred_1 = pred_2 = np.zeros_like(z)
    for k, (logsnr, _, _, a, b_0, b_1, b_2, s) in enumerate(table):
        pred = denoise(z, logsnr)
        z = a * z + b_0 * pred + b_1 * pred_1 + b_2 * pred_2 + (s * noise(k) if noise else 0.0)
        pred_1, pred_2 = pred, pred_1
    return z


def final_variance(table: np.ndarray, std: float, start: float) -> float:
    """Variance after all rows for N(0, std^2) data, from variance `start`: the covariance of (z, pred_1, pred_2)."""
    covariance = np.zeros((3, 3))
    covariance[0, 0] = start
    for row, gain in zip(table, gaussian_mean(1.0, table[:, LOGSNR], std), strict=True):
        step = np.array([[row[A] + row[B_0] * gain, row[B_1], row[B_2]], [gain, 0.0, 0.0], [0.0, 1.0, 0.0]])
        covariance = step @ covariance @ step.T
        covariance[0, 0] += row[S] ** 2
    return float(covariance[0, 0])
