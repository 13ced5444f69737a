"""What a stage of training is: networks that learn, their averages, the random numbers of a step, rate control."""

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from ul_runtime.pipeline import Pipeline
from ul_runtime.progress import Tick, silent
from ul_train import objective as ul
from ul_train.config import Config
from ul_train.data.imageset import ImageSet
from ul_train.heldout import HeldoutFigures, measure, reconstruction_sheet
from ul_train.log import RunLog


@dataclass
class Batch:
    """One optimiser step's images and random numbers, on the device."""

    x: Tensor  # b c h w in [-1, 1]
    label: Tensor  # b
    draws: ul.Draws
    eps_clean: Tensor | None = None  # b cz h w: noise of an encoder with a learned variance

    def part(self, index: int, count: int) -> Self:
        """Micro-batch `index` of `count`: of every tensor, those of subclasses too."""
        size = len(self.x) // count
        at = slice(index * size, (index + 1) * size)
        draws = ul.Draws(**{name: value[at] for name, value in vars(self.draws).items()})
        tensors = {name: value[at] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, draws=draws, **tensors)


def to_model(images: Tensor) -> Tensor:
    """uint8 b c h w -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


class Stage(ABC):
    """Networks that learn (`modules`), their averages (`ema`), and networks that stay as they are (`frozen`).

    A further stage is a subclass in stages.STAGES, and a section in config.StagesConfig.
    """

    name: ClassVar[str]  # of its section in the recipe, its checkpoints, its figures
    number: ClassVar[int]  # in the seeds of its random numbers; no two stages share one, and it never changes
    needs: ClassVar[str | None] = None  # the stage that comes first; it and those between are then `frozen`, averaged
    goes_on: ClassVar[bool] = False  # its networks begin as the frozen ones of their places; so do all after --init
    places: ClassVar[dict[str, str]]  # of a network that learns, in sampling: encoder, prior or decoder
    conditional: ClassVar[bool] = False  # a network sees the labels
    betas: ClassVar[tuple[float, float]] = (0.9, 0.99)  # of AdamW
    channels_last: ClassVar[bool] = False  # on a CPU, where convolutions are a tenth faster in this layout

    def __init__(
        self,
        config: Config,
        device: torch.device,
        precision: str,
        num_classes: int = 0,
        frozen: dict[str, nn.Module] | None = None,
        encoder_checkpoint: str | None = None,
    ) -> None:
        """`precision`: bf16 or fp32; `encoder_checkpoint`: state hash of the one that the frozen encoder is of."""
        torch.manual_seed(config.seed + self.number)
        self.config, self.device, self.precision = config, device, precision
        self.num_classes = num_classes if self.conditional else 0
        self.frozen, self.encoder_checkpoint = frozen or {}, encoder_checkpoint
        self.settings = config.of_stage(self.name)
        self.objective = config.make_objective()
        self.rate_control = self.make_rate_control()
        self.modules = self.networks(config, num_classes)
        if self.goes_on or config.init:
            self.begin()
        for module in self.modules.values():
            if self.channels_last and device.type == "cpu":
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            module.to(device).train()
        self.ema = {name: copy.deepcopy(module).eval().requires_grad_(False) for name, module in self.modules.items()}
        self.compute = dict(self.modules)  # what the loss calls: the modules, compiled on request

    def begin(self) -> None:
        """Give the networks the weights of the frozen ones of their places."""
        for name, place in self.places.items():
            self.modules[name].load_state_dict(self.frozen[place].state_dict())

    @staticmethod
    @abstractmethod
    def networks(config: Config, num_classes: int) -> dict[str, nn.Module]:
        """The networks that learn, freshly initialised."""

    @abstractmethod
    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """(scalar to minimise, figures for the log) of a micro-batch."""

    @abstractmethod
    def preview(self, pipeline: Pipeline, heldout: ImageSet, step: int, log: RunLog, tick: Tick = silent) -> bytes:
        """A contact sheet as PNG by the `sampled` networks; held-out figures go to the log."""

    def reconstructions(
        self, pipeline: Pipeline, heldout: ImageSet, step: int, log: RunLog, tick: Tick
    ) -> tuple[bytes, HeldoutFigures]:
        """A sheet of held-out images beside their reconstructions, and the figures, which are logged."""
        figures = measure(pipeline, heldout, self.config.run.eval_images, mean_of=1, bits_samples=4, tick=tick)
        sheet = reconstruction_sheet(pipeline, heldout, f"step {step}: {figures.in_short}", tick)
        log.evaluation(self.name, step, figures.as_dict())
        return sheet, figures

    def make_rate_control(self) -> "RateControl | None":
        """What steers loss_factor, if anything does."""
        return None

    @property
    def sampled(self) -> dict[str, nn.Module]:
        """The networks `encoder`, `prior`, `decoder` that held-out figures and previews are made by."""
        return self.frozen | {self.places[name]: module for name, module in self.ema.items()}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All that is trained, by name."""
        return {f"{n}.{k}": p for n, module in self.modules.items() for k, p in module.named_parameters()}

    def generator(self, step: int) -> torch.Generator:
        """Of all random numbers of a step: a function of (seed, stage, step)."""
        return ul.step_generator(self.config.seed, self.number, step)

    def batch(self, images: Any, ids: np.ndarray, step: int) -> Batch:
        """The images (an ImageSet) of a step and everything random about it; students may learn from something else."""
        pixels, labels = images.batch(ids)
        x, label = to_model(torch.from_numpy(pixels)), torch.from_numpy(labels)
        generator = self.generator(step)
        draws = ul.draw_joint(len(x), self.config.latent_shape, self.config.image_shape, generator)
        if self.config.image.flip:
            x = ul.flip_some(x, generator)
        if self.num_classes:
            hidden = torch.rand(len(x), generator=generator) < self.settings.label_dropout
            label = torch.where(hidden, self.num_classes, label)
        draws = ul.Draws(**{name: value.to(self.device) for name, value in vars(draws).items()})
        batch = Batch(x.to(self.device), label.to(self.device), draws)
        if self.config.objective.learned_variance:
            batch.eps_clean = torch.randn(draws.eps_z.shape, generator=generator).to(self.device)
        return batch

    @torch.no_grad()
    def frozen_latent(self, batch: Batch) -> Tensor:
        """z_clean of a batch in float32 by the frozen encoder."""
        return self.encode(self.frozen["encoder"], batch)[0]

    def encode(self, encoder: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(z_clean in float32, nats `b` that a learned variance costs: ablation D) of a batch."""
        if batch.eps_clean is None:
            return encoder(batch.x).float(), torch.zeros(len(batch.x), device=self.device)
        mean, log_variance = encoder.moments(batch.x)  # type: ignore[operator]
        return ul.drawn_latent(mean.float(), log_variance.float(), batch.eps_clean, self.objective.schedule_z)


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


def ema_decay_at(step: int, decay: float) -> float:
    """min(decay, (1 + step) / (10 + step)): early weights are forgotten fast; step counts from 0."""
    return min(decay, (1.0 + step) / (10.0 + step))


@torch.no_grad()
def update_ema(average: nn.Module, module: nn.Module, decay: float) -> None:
    """average <- decay average + (1 - decay) module, in float32; both have the same parameters."""
    targets: list[torch.Tensor] = list(average.parameters())
    sources: list[torch.Tensor] = list(module.parameters())
    torch._foreach_lerp_(targets, sources, 1.0 - decay)
