"""The stages of training: which networks learn, and what they minimise."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ul_runtime.errors import UsageError
from ul_runtime.pipeline import Pipeline
from ul_runtime.progress import Tick, silent
from ul_train import objective as ul
from ul_train.config import Config, StagesConfig
from ul_train.data.imageset import ImageSet
from ul_train.heldout import sample_sheet
from ul_train.log import RunLog
from ul_train.model import joint_networks, make_base, make_decoder, sampled_networks
from ul_train.stage import LEAST, Batch, RateControl, Stage
from ul_train.students import Student, kind_of


class Joint(Stage):
    """Stage 1: encoder, prior and decoder together, freshly initialised from the seed."""

    name, number = "joint", 0
    places = {"encoder": "encoder", "prior": "prior", "decoder": "decoder"}  # noqa: RUF012
    channels_last = True

    @staticmethod
    def networks(config: Config, num_classes: int) -> dict[str, nn.Module]:
        return joint_networks(config)

    def make_rate_control(self) -> "RateControl | None":
        o = self.config.objective
        if o.target_bits_per_pixel is None:
            return None
        least = LEAST[o.reconstruction or "diffusion"]
        return RateControl(o.target_bits_per_pixel, self.settings.steps, o.prior_ramp_steps, o.loss_factor, least)

    @property
    def loss_factor(self) -> float:
        """Of this step."""
        return self.rate_control.loss_factor if self.rate_control else self.objective.loss_factor

    def prior_share(self, step: int) -> float:
        """Of the prior's gradient that reaches the encoder: first the decoder must learn to use z_0."""
        ramp = self.config.objective.prior_ramp_steps
        return min(1.0, step / ramp) if ramp else 1.0

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean of L_prior + L_decoder over the batch, both divided by the number of image values."""
        objective = replace(self.objective, loss_factor=self.loss_factor)
        draws, share = batch.draws, self.prior_share(step)
        z_clean, nats_variance = self.encode(self.compute["encoder"], batch)
        z_ramped = ul.ramp_gradient(z_clean, share)
        z_seen = ul.seen_by_prior(z_ramped, objective)
        nats_prior = ul.prior_nats(self.compute["prior"], z_seen, draws.eps_prior, draws.t_z, objective.schedule_z)
        nats_prior = nats_prior + ul.ramp_gradient(nats_variance, share)
        z_0 = ul.noisy_latent(z_clean, draws.eps_z, objective.schedule_z)
        nats_decoder = ul.decoder_nats(self.compute["decoder"], batch.x, z_0, draws.eps_x, draws.t_x, objective)
        loss = ul.latent_cost(nats_prior, z_ramped, objective) + nats_decoder
        return loss.mean() / batch.x[0].numel(), {
            "prior_nats": nats_prior.mean(),
            "decoder_nats": nats_decoder.mean(),
            "bits_per_pixel": ul.bits(nats_prior.mean().double(), self.config.image.size**2),
            "latent_std": z_clean.detach().std(),
        }

    def preview(self, pipeline: Pipeline, heldout: ImageSet, step: int, log: RunLog, tick: Tick = silent) -> bytes:
        """Held-out images beside their reconstructions."""
        sheet, figures = self.reconstructions(pipeline, heldout, step, log, tick)
        if figures.latent_died and step > self.config.objective.prior_ramp_steps:
            log.warn(figures.collapse_warning, self.name, step)
        return sheet


class Decoder(Stage):
    """Stage 2: the decoder further, on the latents of stage 1: its loss is that of stage 1, the encoder is frozen.

    The bits stay as they are. In stage joint the decoder has seen too few images: what is sampled is then as far from
    real images as what is only reconstructed.
    """

    name, number, needs, goes_on = "decoder", 2, Joint.name, True
    places = {"decoder": "decoder"}  # noqa: RUF012
    channels_last = True

    @staticmethod
    def networks(config: Config, num_classes: int) -> dict[str, nn.Module]:
        return {"decoder": make_decoder(config)}

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean of L_decoder over the batch, divided by the number of image values."""
        draws, objective = batch.draws, self.objective
        z_0 = ul.noisy_latent(self.frozen_latent(batch), draws.eps_z, objective.schedule_z)
        nats = ul.decoder_nats(self.compute["decoder"], batch.x, z_0, draws.eps_x, draws.t_x, objective)
        return nats.mean() / batch.x[0].numel(), {"decoder_nats": nats.mean()}

    def preview(self, pipeline: Pipeline, heldout: ImageSet, step: int, log: RunLog, tick: Tick = silent) -> bytes:
        """Held-out images beside their reconstructions."""
        return self.reconstructions(pipeline, heldout, step, log, tick)[0]


class Base(Stage):
    """Stage 3: the prior that makes images, on the latents of stage 1; it sees the labels."""

    name, number, needs = "base", 1, Joint.name
    places = {"base": "prior"}  # noqa: RUF012
    conditional = True

    @staticmethod
    def networks(config: Config, num_classes: int) -> dict[str, nn.Module]:
        return {"base": make_base(config, num_classes)}

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean of the weighted denoising loss over the batch and the latent's values."""
        draws, z_clean = batch.draws, self.frozen_latent(batch)
        nats = ul.base_nats(self.compute["base"], z_clean, batch.label, draws.eps_prior, draws.t_z, self.objective)
        return nats.mean() / z_clean[0].numel(), {"base_nats": nats.mean()}

    def preview(self, pipeline: Pipeline, heldout: ImageSet, step: int, log: RunLog, tick: Tick = silent) -> bytes:
        """Samples of each class."""
        return sample_sheet(pipeline, f"samples at step {step}", tick)


STAGES: tuple[type[Stage], ...] = (Joint, Decoder, Base)  # in the order of training
if (_names := [stage.name for stage in STAGES]) != list(StagesConfig.model_fields):
    raise TypeError(f"stages {_names} are not those of StagesConfig, {list(StagesConfig.model_fields)}")


def own_stages(config: Config) -> list[type[Stage]]:
    """The stages that a recipe has, in the order of training, but for students.

    After --init without stage joint, whose networks are there.
    """
    stages = [stage for stage in STAGES if getattr(config.stages, stage.name) is not None]
    if config.init:
        stages.remove(Joint)
    return stages


def students_of(config: Config) -> list[type[Student]]:
    """The students of a recipe in the order of training: of the prior first, whose latents those of the decoder see."""
    stages: list[type[Stage]] = [Joint, *own_stages(config)]
    last = {place: stage.name for stage in stages for place in stage.places.values()}
    kinds = [kind_of(name, config.students[name].method, last) for name in config.students]
    return sorted(kinds, key=lambda kind: (kind.place == "decoder", -kind.calls))


def stages_of(config: Config, name: str = "all") -> list[type[Stage]]:
    """The stages that are trained, in their order: the one of this name, or all. UsageError."""
    stages: list[type[Stage]] = [*own_stages(config), *students_of(config)]
    found = [stage for stage in stages if name in (stage.name, "all")]
    if not found:
        *names, last = (*(stage.name for stage in stages), "all")
        raise UsageError(f"--stage {name}: expected {', '.join(names)} or {last}")
    return found


def fresh_stages(config: Config, device: torch.device, precision: str, num_classes: int) -> list[Stage]:
    """The stages of a recipe before their first step, each on the untrained networks of those before; no students."""
    stages: list[Stage] = []
    frozen = sampled_networks(config, num_classes) if config.init else {}
    for kind in own_stages(config):
        stages.append(kind(config, device, precision, num_classes, dict(frozen)))
        frozen |= stages[-1].sampled
    return stages
