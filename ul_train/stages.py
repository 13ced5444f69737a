"""The two stages of training: which networks learn, and the loss of one batch."""

import copy
import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from ul_train import objective
from ul_train import objective as ul
from ul_train.config import Config, StageConfig
from ul_train.data.imageset import ImageSet
from ul_train.model import joint_networks, make_base
from ul_train.torch_backend import Moments

_PROPORTIONAL = 3.0  # e-folds of loss_factor for bits that are one e-fold off
_INTEGRAL = 20.0  # the same, gathered in a whole run
_SMOOTHING = 0.02  # of a run: time constant of the average of the bits
_MOST_OFF = 0.7  # e-folds of bits that are answered; more is answered as this
_MOST = 200.0  # of loss_factor
LEAST = {"diffusion": 1.05, "mse": 0.01}  # at 1 and below a diffusion decoder leaves the latent empty
MISSED = 0.1  # a rate further than this from its target has missed it


@dataclass
class RateControl:
    """Proportional and integral control in logarithms: with off = log(bits / target), from step `start` on

        log loss_factor = log_factor - 3 off,   d log_factor = -20 off d(step / num_steps)

    Bits follow loss_factor a fifth of a run late, and by one to three times its relative change. Before `start` (the
    ramp of the prior's gradient) they are far above where they settle, so nothing is steered, only averaged.
    """

    target: float  # bits a pixel
    num_steps: int
    start: int  # step
    loss_factor: float
    least: float = LEAST["diffusion"]  # that loss_factor may become
    log_factor: float = field(init=False)  # the integral; starts at the log of the first loss_factor
    log_bits: float = math.nan  # average of log bits a pixel so far

    def __post_init__(self) -> None:
        self.log_factor = math.log(self.loss_factor)

    def follow(self, bits_per_pixel: float, step: int) -> None:
        """Take in the bits of a batch, one step after another; what is not finite and positive is passed over."""
        if not (math.isfinite(bits_per_pixel) and bits_per_pixel > 0.0):
            return
        seen = math.log(bits_per_pixel)
        share = min(1.0, 1.0 / (_SMOOTHING * self.num_steps))
        self.log_bits = seen if math.isnan(self.log_bits) else self.log_bits + share * (seen - self.log_bits)
        if step >= self.start:
            off = max(-_MOST_OFF, min(_MOST_OFF, self.log_bits - math.log(self.target)))
            self.log_factor = self._bounded(self.log_factor - _INTEGRAL / self.num_steps * off)
            self.loss_factor = math.exp(self._bounded(self.log_factor - _PROPORTIONAL * off))

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps: all that has changed."""
        factors = {"loss_factor": self.loss_factor, "log_factor": self.log_factor}
        return factors if math.isnan(self.log_bits) else factors | {"log_bits": self.log_bits}

    def restore(self, state: dict[str, float]) -> None:
        """The inverse of `state`; an empty one leaves all as it is."""
        for name, value in state.items():
            setattr(self, name, value)

    def _bounded(self, log_factor: float) -> float:
        return max(math.log(self.least), min(math.log(_MOST), log_factor))


def missed(bits_per_pixel: float, target: float | None) -> str | None:
    """What to say of a rate that missed its target; None if it did not, or had none."""
    if target is None or abs(bits_per_pixel / target - 1.0) <= MISSED:
        return None
    return (
        f"the latent costs {bits_per_pixel:.3f} bits/pixel, the target was {target:g}: train longer, or give another "
        "target; the log has loss_factor, which may have come to its end"
    )


@dataclass
class Batch:
    """One optimiser step's images and random numbers, on the device."""

    x: Tensor  # b c h w in [-1, 1]
    label: Tensor  # b
    draws: ul.Draws
    eps_clean: Tensor | None = None  # b cz h w: noise of an encoder with a learned variance

    def part(self, index: int, count: int) -> "Batch":
        """Micro-batch `index` of `count`."""
        size = len(self.x) // count
        at = slice(index * size, (index + 1) * size)
        draws = ul.Draws(**{name: value[at] for name, value in vars(self.draws).items()})
        return Batch(self.x[at], self.label[at], draws, None if self.eps_clean is None else self.eps_clean[at])


def to_model(images: Tensor) -> Tensor:
    """uint8 b c h w -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


@dataclass
class Stage:
    """Networks that learn (`modules`), their averages (`ema`), and networks that stay as they are (`frozen`)."""

    name: str
    config: Config
    settings: StageConfig
    num_classes: int
    device: torch.device
    precision: str  # bf16 or fp32
    modules: dict[str, nn.Module]
    frozen: dict[str, nn.Module] = field(default_factory=dict)
    rate_control: RateControl | None = None

    def __post_init__(self) -> None:
        self.objective = self.config.make_objective()
        for module in self.modules.values():
            module.to(self.device).train()
        self.ema = {name: copy.deepcopy(module).eval().requires_grad_(False) for name, module in self.modules.items()}
        self.compute = dict(self.modules)  # what the loss calls: the modules, compiled on request

    @property
    def loss_factor(self) -> float:
        """Of this step."""
        return self.rate_control.loss_factor if self.rate_control else self.objective.loss_factor

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All that is trained, by name."""
        return {f"{n}.{k}": p for n, module in self.modules.items() for k, p in module.named_parameters()}

    def batch(self, images: ImageSet, ids: np.ndarray, step: int) -> Batch:
        """The images of a step and everything random about it: a function of (seed, stage, step)."""
        pixels, labels = images.batch(ids)
        x, label = to_model(torch.from_numpy(pixels)), torch.from_numpy(labels)
        generator = objective.step_generator(self.config.seed, self.name, step)
        draws = objective.draw_joint(len(x), self.config.latent_shape, self.config.image_shape, generator)
        if self.config.image.flip:
            x = objective.flip_some(x, generator)
        if self.num_classes:
            hidden = torch.rand(len(x), generator=generator) < self.settings.label_dropout
            label = torch.where(hidden, self.num_classes, label)
        draws = ul.Draws(**{name: value.to(self.device) for name, value in vars(draws).items()})
        batch = Batch(x.to(self.device), label.to(self.device), draws)
        if self.config.objective.learned_variance:
            batch.eps_clean = torch.randn(draws.eps_z.shape, generator=generator).to(self.device)
        return batch

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, float]]:
        """(scalar to minimise, figures for the log) of a micro-batch."""
        return self._joint_loss(batch, step) if self.name == "joint" else self._base_loss(batch)

    def _joint_loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, float]]:
        ramp = self.config.objective.prior_ramp_steps
        share = min(1.0, step / ramp) if ramp else 1.0
        z_clean, nats_variance = self._encode(self.compute["encoder"], batch)
        nats_prior, nats_decoder = ul.joint_nats(
            self.compute["prior"],
            self.compute["decoder"],
            batch.x,
            z_clean,
            batch.draws,
            replace(self.objective, loss_factor=self.loss_factor),
            prior_share=share,
        )
        nats_prior = nats_prior + ul.ramp_gradient(nats_variance, share)
        cost = nats_prior
        if (weight := self.objective.normal_weight) is not None:
            cost = cost + weight * ul.normal_nats(ul.ramp_gradient(z_clean, share), self.objective.schedule_z)
        return ul.total_loss(cost, nats_decoder, batch.x[0].numel()), {
            "prior_nats": nats_prior.mean().item(),
            "decoder_nats": nats_decoder.mean().item(),
            "bits_per_pixel": float(ul.bits(nats_prior.mean().item(), self.config.image.size**2)),
            "latent_std": z_clean.std().item(),
        }

    def _encode(self, encoder: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(z_clean, nats `b` that a learned variance costs) of a batch."""
        if batch.eps_clean is None:
            return encoder(batch.x).float(), torch.zeros(len(batch.x), device=self.device)
        mean, log_variance = Moments(encoder)(batch.x)
        return ul.drawn_latent(mean.float(), log_variance.float(), batch.eps_clean, self.objective.schedule_z)

    def _base_loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            z_clean, _ = self._encode(self.frozen["encoder"], batch)
        nats = ul.base_nats(
            self.compute["base"], z_clean, batch.label, batch.draws.eps_prior, batch.draws.t_z, self.objective
        )
        return nats.mean() / z_clean[0].numel(), {"base_nats": nats.mean().item()}


def joint_stage(config: Config, device: torch.device, precision: str) -> Stage:
    """Encoder, prior and decoder, freshly initialised from the seed."""
    torch.manual_seed(config.seed)
    modules = joint_networks(config)
    if device.type == "cpu":  # convolutions are a tenth faster in this layout
        for module in modules.values():
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    stage = Stage("joint", config, config.joint, 0, device, precision, modules)
    o = config.objective
    if o.target_bits_per_pixel is not None:
        steps, least = config.joint.steps, LEAST[o.reconstruction or "diffusion"]
        stage.rate_control = RateControl(o.target_bits_per_pixel, steps, o.prior_ramp_steps, o.loss_factor, least)
    return stage


def base_stage(
    config: Config, num_classes: int, device: torch.device, precision: str, joint_ema: dict[str, nn.Module]
) -> Stage:
    """The base, freshly initialised; `joint_ema` (the averaged networks of stage 1) stays frozen."""
    torch.manual_seed(config.seed + 1)
    modules: dict[str, nn.Module] = {"base": make_base(config, num_classes)}
    return Stage("base", config, config.base_stage, num_classes, device, precision, modules, joint_ema)


def ema_decay_at(step: int, decay: float) -> float:
    """min(decay, (1 + step) / (10 + step)): early weights are forgotten fast; step counts from 0."""
    return min(decay, (1.0 + step) / (10.0 + step))


@torch.no_grad()
def update_ema(average: nn.Module, module: nn.Module, decay: float) -> None:
    """average <- decay average + (1 - decay) module, in float32; both have the same parameters."""
    targets: list[torch.Tensor] = list(average.parameters())
    sources: list[torch.Tensor] = list(module.parameters())
    torch._foreach_lerp_(targets, sources, 1.0 - decay)
