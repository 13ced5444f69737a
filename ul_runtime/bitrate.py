"""The bits in a latent, in nats (arXiv 2602.17270, section 3): numpy arrays or torch tensors in, the same kind out.

    R = E_t [ 1/2 (-dlogsnr/dt) exp(logsnr) |z_clean - pred|^2 ] + KL(q(z_1 | x) || N(0, I))

summed over all values of a latent, with weight 1. It bounds the information in z_0 from above.
"""

import math

from array_api_compat import array_namespace

from ul_runtime.noise_process import Array, alpha, sigma

NATS_PER_BIT = math.log(2.0)


def _sum_values(values: Array) -> Array:
    """Sum over every axis but the first: b ... -> b."""
    xp = array_namespace(values)
    return xp.sum(xp.reshape(values, (values.shape[0], -1)), axis=1)


def diffusion_term(z_clean: Array, pred: Array, logsnr: Array, slope: Array) -> Array:
    """1/2 (-dlogsnr/dt) exp(logsnr) |z_clean - pred|^2 in nats, `b`; `logsnr` and `slope` = dlogsnr/dt are `b`."""
    xp = array_namespace(z_clean)
    return -0.5 * slope * xp.exp(logsnr) * _sum_values((z_clean - pred) ** 2)


def discrete_term(z_clean: Array, pred: Array, logsnr_s: Array, logsnr_t: Array) -> Array:
    """1/2 (exp(logsnr_t) - exp(logsnr_s)) |z_clean - pred|^2 in nats, `b`: what one step costs.

    The step goes from s (noisier) to t (cleaner), `pred` is made at s; `logsnr_s` and `logsnr_t` are `b`.
    """
    xp = array_namespace(z_clean)
    return 0.5 * (xp.exp(logsnr_t) - xp.exp(logsnr_s)) * _sum_values((z_clean - pred) ** 2)


def kl_terminal(z_clean: Array, logsnr_min: float) -> Array:
    """KL(N(alpha_1 z_clean, sigma_1^2) || N(0, I)) in nats, `b`, for z_clean `b ...`."""
    alpha_1, sigma_1 = float(alpha(logsnr_min)), float(sigma(logsnr_min))
    constant = sigma_1**2 - 1.0 - 2.0 * math.log(sigma_1)  # in float64: its parts nearly cancel
    return _sum_values(0.5 * ((alpha_1 * z_clean) ** 2 + constant))
