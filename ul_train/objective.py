"""The objective of Unified Latents (arXiv 2602.17270, section 3), per example and in nats, summed over dimensions.

    z_0       = alpha_0 z_clean + sigma_0 eps_z                      logsnr_z(0) = 5
    L_prior   = 1/2 (-dlogsnr_z/dt) e^logsnr |z_clean - z_pred|^2 + KL(q(z_1 | x) || N(0, I))           weight 1
    L_decoder = 1/2 (-dlogsnr_x/dt) e^logsnr w(logsnr) |x - x_pred|^2,    w = loss_factor sigmoid(bias - logsnr)

Both terms are sums: means per element would over-weight the prior by (image values) / (latent values).
Networks predict v and get logsnr; any callable with their signature serves, an exact denoiser in the tests.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from ul_runtime.diffusion import NATS_PER_BIT, Schedule, diffuse, diffusion_term, kl_terminal, sigmoid, x_from_v


@dataclass(frozen=True)
class Objective:
    """The numbers of the objective; `bias` values are logsnr."""

    schedule_z: Schedule
    schedule_x: Schedule
    loss_factor: float
    bias: float
    base_bias: float
    normal_weight: float | None = None  # None: the latent costs the prior's loss
    reconstruction: Literal["diffusion", "mse"] = "diffusion"


@dataclass(frozen=True)
class Draws:
    """The random numbers of one batch: times `b` in [0, 1), noises in the shapes of z and x, float32."""

    t_z: Tensor
    eps_prior: Tensor
    eps_z: Tensor
    t_x: Tensor
    eps_x: Tensor


def low_discrepancy_times(offset: Tensor, order: Tensor) -> Tensor:
    """One time a stratum: (order + offset) / b, for one uniform offset and a permutation `b` (Kingma et al. 2021)."""
    return (order + offset) / order.shape[0]


def decoder_weight(logsnr: Tensor, loss_factor: float, bias: float) -> Tensor:
    """w(logsnr) = loss_factor sigmoid(bias - logsnr): what a nat at this noise level costs relative to the ELBO."""
    return loss_factor * sigmoid(bias - logsnr)


def denoising_nats(
    predict_v: Callable[[Tensor, Tensor], Tensor], x: Tensor, eps: Tensor, t: Tensor, schedule: Schedule
) -> Tensor:
    """1/2 (-dlogsnr/dt) e^logsnr |x - x_pred|^2 at time t: nats `b`. `predict_v(x_t, logsnr)` is called once."""
    logsnr = schedule.logsnr(t)
    level = logsnr.reshape(-1, *[1] * (x.ndim - 1))
    x_t = diffuse(x, eps, level)
    x_pred = x_from_v(x_t, predict_v(x_t, logsnr).float(), level)
    return diffusion_term(x, x_pred, logsnr, schedule.slope(t))


def prior_nats(
    prior: Callable[[Tensor, Tensor], Tensor], z_clean: Tensor, eps: Tensor, t: Tensor, schedule: Schedule
) -> Tensor:
    """L_prior, `b`: the one-sample estimate of the latent's bits, in nats; the ELBO weight 1, terminal KL included."""
    return denoising_nats(prior, z_clean, eps, t, schedule) + kl_terminal(z_clean, schedule.ends[0])


def decoder_nats(
    decoder: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    z_0: Tensor,
    eps: Tensor,
    t: Tensor,
    objective: Objective,
) -> Tensor:
    """L_decoder, `b`: the weighted denoising loss of the image given z_0; or the squared error, see `mse_nats`."""
    if objective.reconstruction == "mse":
        return mse_nats(decoder, x, z_0, eps, objective)
    nats = denoising_nats(lambda x_t, logsnr: decoder(x_t, logsnr, z_0), x, eps, t, objective.schedule_x)
    return nats * decoder_weight(objective.schedule_x.logsnr(t), objective.loss_factor, objective.bias)


def mse_nats(
    decoder: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, z_0: Tensor, eps: Tensor, objective: Objective
) -> Tensor:
    """loss_factor/2 e^bias |x - x_pred|^2, `b`, x_pred in one step from pure noise `eps`, as a one-step sampler does.

    A Gaussian decoder of precision e^bias: that noise level at which the diffusion decoder's weight is down to a half.
    """
    noisiest = torch.full(x.shape[:1], objective.schedule_x.ends[0], device=x.device)
    v_pred = decoder(eps, noisiest, z_0).float()
    x_pred = x_from_v(eps, v_pred, noisiest.reshape(-1, *[1] * (x.ndim - 1)))
    return 0.5 * objective.loss_factor * math.exp(objective.bias) * (x - x_pred).square().flatten(1).sum(1)


def base_nats(
    base: Callable[[Tensor, Tensor, Tensor], Tensor],
    z_clean: Tensor,
    label: Tensor,
    eps: Tensor,
    t: Tensor,
    objective: Objective,
) -> Tensor:
    """Stage 2, `b`: the prior's denoising loss with sigmoid weighting, on frozen latents."""
    nats = denoising_nats(lambda z_t, logsnr: base(z_t, logsnr, label), z_clean, eps, t, objective.schedule_z)
    return nats * sigmoid(objective.base_bias - objective.schedule_z.logsnr(t))


def drawn_latent(mean: Tensor, log_variance: Tensor, eps: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """(z_clean = mean + s eps, nats `b`) of an encoder with a learned variance s^2 (ablation D of the paper).

    Nats sum 1/2 (-logsnr_z(0) - log s^2), which add to L_prior: z_clean given z_0 costs the entropy of N(., e^-logsnr)
    more than z_0 does, and the entropy of the encoder's own noise less.
    """
    _, logsnr_0 = schedule.ends
    nats = 0.5 * (-logsnr_0 - log_variance).flatten(1).sum(1)
    return mean + (0.5 * log_variance).exp() * eps, nats


def noisy_latent(z_clean: Tensor, eps: Tensor, schedule: Schedule) -> Tensor:
    """z_0 = alpha_0 z_clean + sigma_0 eps, at exactly the prior's least noise level."""
    return diffuse(z_clean, eps, torch.full_like(z_clean, schedule.ends[1]))


def normal_nats(z_clean: Tensor, schedule: Schedule) -> Tensor:
    """KL(q(z_0 | x) || N(0, I)), `b`: what a latent costs whose prior is no network (a VAE with this fixed noise)."""
    _, logsnr_0 = schedule.ends
    return kl_terminal(z_clean, logsnr_0)


def seen_by_prior(z_clean: Tensor, objective: Objective) -> Tensor:
    """What L_prior is of: z_clean, no stop-gradient; with a `normal_weight` (ablation) the prior only measures it."""
    return z_clean if objective.normal_weight is None else z_clean.detach()


def latent_cost(nats_prior: Tensor, z_clean: Tensor, objective: Objective) -> Tensor:
    """What training pays for the latent, `b`: L_prior; with a `normal_weight` (ablation) that of a normal prior too."""
    if objective.normal_weight is None:
        return nats_prior
    return nats_prior + objective.normal_weight * normal_nats(z_clean, objective.schedule_z)


def ramp_gradient(z: Tensor, share: float) -> Tensor:
    """z itself, with `share` of its gradient: ramped to 1 at the start of training, for the prior's cost of the latent.

    So the decoder can learn to use z_0 before the prior's cost empties it.
    """
    return z if share >= 1.0 else z.detach() + share * (z - z.detach())


Nats = TypeVar("Nats", Tensor, float)


def bits(nats: Nats, per: int = 1) -> Nats:
    """Nats to bits, per image (`per` = 1), per pixel (`per` = H W) or per latent value (`per` = h w c)."""
    return nats / (NATS_PER_BIT * per)


def step_generator(seed: int, stage: int, step: int) -> torch.Generator:
    """A CPU generator for one step of the stage with this number."""
    words = np.random.SeedSequence((seed, stage, step)).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 31 ^ int(words[1]))


def draw_times(num: int, generator: torch.Generator) -> torch.Tensor:
    """Low-discrepancy times `num` in random order."""
    return low_discrepancy_times(torch.rand((), generator=generator), torch.randperm(num, generator=generator))


def draw_joint(num: int, latent_shape: Sequence[int], image_shape: Sequence[int], generator: torch.Generator) -> Draws:
    """Everything random in one batch of stage 1 but the flips."""
    return Draws(
        t_z=draw_times(num, generator),
        eps_prior=torch.randn((num, *latent_shape), generator=generator),
        eps_z=torch.randn((num, *latent_shape), generator=generator),
        t_x=draw_times(num, generator),
        eps_x=torch.randn((num, *image_shape), generator=generator),
    )


def flip_some(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirror each image `b c h w` with chance one half."""
    flipped = torch.rand(len(x), generator=generator) < 0.5
    return torch.where(flipped[:, None, None, None], x.flip(3), x)
