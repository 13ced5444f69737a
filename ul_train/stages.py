"""The two stages of training: which networks learn, and the loss of one batch."""

import copy
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from ul_train import objective as ul
from ul_train import randomness
from ul_train.config import Config, StageConfig
from ul_train.data import ImageSet
from ul_train.model import Moments, joint_networks, make_base
from ul_train.rate_control import LEAST, RateControl


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
        generator = randomness.step_generator(self.config.seed, self.name, step)
        draws = randomness.draw_joint(len(x), self.config.latent_shape, self.config.image_shape, generator)
        if self.config.image.flip:
            x = randomness.flip_some(x, generator)
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
