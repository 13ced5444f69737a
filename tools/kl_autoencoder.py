#!/usr/bin/env python
"""What a user would do instead of Unified Latents: a KL autoencoder, then latent diffusion on its latents.

    python tools/kl_autoencoder.py --beside runs/tables/ul_seed-0 --data fashion-mnist/ --out runs/kl \
        --results tools/results/tables/fashion

Rombach et al. 2022 (arXiv 2112.10752) with diffusers' own AutoencoderKL: absolute error, KL weight 1e-6, latents scaled
to unit variance, a decoder of one pass. Same images, latent shape, base network and steps of the base as the run
`--beside`; the autoencoder is given as many training FLOPs as that run's stages before the base. Without the perceptual
and adversarial losses of that paper, as Unified Latents is here. Both become bundles, and ul-eval measures both.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from tool_tables import EvalOptions, evaluated, write_results
from torch import Tensor, nn

from ul_runtime.cli.command import run_command
from ul_runtime.cli.options import with_options
from ul_runtime.diffusion import alpha, sigma
from ul_runtime.errors import StoppedError
from ul_train.stage import Batch, Stage, to_model
from ul_train.stages import Base, Joint, own_stages
from ul_train.torch_backend import choose_device, choose_precision, fix_threads

if TYPE_CHECKING:
    from ul_train.config import Config
    from ul_train.data.imageset import Splits

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
PACKAGES = ("unified-latents", "diffusers", "numpy", "onnxruntime", "torch")
KL_WEIGHT = 1e-6
LATENT_LOGSNR = 10.0  # where the base ends: latents are next to clean
SCALE_IMAGES = 2048


class AutoencoderStage(Joint):
    """Training of the autoencoder, in the place of stage joint and by the trainer of all stages."""

    channels_last = False

    def __init__(
        self, config: "Config", autoencoder: nn.Module, steps: int, device: torch.device, precision: str
    ) -> None:
        self.networks = lambda *_: {"autoencoder": autoencoder}  # type: ignore[method-assign]
        super().__init__(config, device, precision)
        self.rate_control = None
        self.settings = self.settings.model_copy(update={"steps": steps})  # the optimiser's are those of stage joint

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """|x - x_decoded| + KL_WEIGHT KL(q(z | x) || N(0, I)), summed over values, a mean over images."""
        posterior = self.compute["autoencoder"].encode(batch.x).latent_dist
        noise = batch.draws.eps_z
        decoded = self.compute["autoencoder"].decode(posterior.mean + posterior.std * noise).sample
        error = (batch.x - decoded.float()).abs().flatten(1).sum(1)
        kl = posterior.kl().float()
        loss = (error + KL_WEIGHT * kl).mean() / batch.x[0].numel()
        return loss, {"absolute_error": error.mean() / batch.x[0].numel(), "kl_nats": kl.mean()}


class Encode(nn.Module):
    """Image -> scaled mean of the latent."""

    def __init__(self, autoencoder: nn.Module, scale: float) -> None:
        super().__init__()
        self.autoencoder, self.scale = autoencoder, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.autoencoder.encode(x).latent_dist.mean * self.scale


class Decode(nn.Module):
    """The decoder in the interface of a diffusion decoder: v of the one image that z_0 decodes to, whatever x_t is."""

    def __init__(self, autoencoder: nn.Module, scale: float) -> None:
        super().__init__()
        self.autoencoder, self.scale = autoencoder, scale

    def forward(self, x_t: Tensor, logsnr: Tensor, z_0: Tensor) -> Tensor:
        level = logsnr[:, None, None, None]
        return (alpha(level) * x_t - self.autoencoder.decode(z_0 / self.scale).sample.float()) / sigma(level)


def make_autoencoder(config: "Config", channels: tuple[int, ...], blocks: int) -> nn.Module:
    """diffusers' AutoencoderKL of the run's image and latent shapes."""
    from diffusers import AutoencoderKL

    stages = len(channels)
    torch.manual_seed(config.seed)
    return AutoencoderKL(
        in_channels=config.image.channels,
        out_channels=config.image.channels,
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        block_out_channels=channels,
        layers_per_block=blocks,
        latent_channels=config.latent_channels,
        norm_num_groups=16,
        sample_size=config.image.size,
    )


def flops_per_image(config: "Config", channels: tuple[int, ...], blocks: int) -> int:
    """Of one training step of the autoencoder, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        autoencoder, x = make_autoencoder(config, channels, blocks), torch.empty(1, *config.image_shape)
        autoencoder.decode(autoencoder.encode(x).latent_dist.mean).sample.sum().backward()
    return counter.get_total_flops()


def train(stage: Stage, splits: "Splits", run: Path) -> nn.Module:
    """The averaged network of a stage, trained from where its checkpoints stand."""
    from ul_runtime.signals import check_stopped, stop_on_signal
    from ul_train import checkpoint as ckpt
    from ul_train.log import RunLog
    from ul_train.trainer import Trainer

    with stop_on_signal():
        trainer = Trainer(stage, splits.train, run, RunLog(run, stage.config.run.log_every))
        if found := ckpt.list_checkpoints(run / "checkpoints", stage.name):
            trainer.restore(found[-1])
        if trainer.step < stage.settings.steps:
            try:
                trainer.train(tick=check_stopped)
            except StoppedError:
                raise StoppedError(f"{run}: stopped at step {trainer.step}, saved; run it again") from None
    (network,) = stage.ema.values()
    return network


@torch.no_grad()
def unit_scale(autoencoder: nn.Module, splits: "Splits") -> float:
    """1 / standard deviation of the latents of the first training images."""
    import numpy as np

    x = to_model(torch.from_numpy(splits.train.batch(np.arange(min(SCALE_IMAGES, len(splits.train))))[0]))
    return 1.0 / autoencoder.encode(x).latent_dist.mean.std().item()


def write(
    bundle: Path, config: "Config", classes: tuple[str, ...], networks: dict[str, nn.Module], threads: int | None
) -> None:
    """The bundle of these networks, once checked against torch as any other."""
    from ul_export.export import Candidate
    from ul_export.onnx_graphs import export_graphs
    from ul_runtime.bundle import write_bundle
    from ul_train.run import Run

    opset = 20
    info = Run.in_memory(config, classes, "kl-autoencoder").manifest(opset, step=config.stages.base.steps)
    files = export_graphs(networks, info, opset)
    comparison = Candidate(bundle, info, files, networks, threads).compare()
    comparison.check(config.name)
    verified = info.model_copy(update={"parity": {"backend": "ort-cpu", **comparison.figures}})
    write_bundle(bundle, verified, files, overwrite=True)


@app.command()
@with_options
def compare(
    beside: Annotated[Path, typer.Option(metavar="RUN", help="Finished run of ul-train, with RUN/bundle.")],
    data: Annotated[str, typer.Option(metavar="SOURCE", help="Its images, as for ul-train.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where checkpoints and the bundle go.")],
    results: Annotated[Path, typer.Option(metavar="DIR", help="Where kl-autoencoder.json and .md go.")],
    options: EvalOptions,
    channels: Annotated[
        str, typer.Option(metavar="A,B,...", help="Of the autoencoder, a number a stage.")
    ] = "32,64,64",
    blocks: Annotated[int, typer.Option(metavar="N", min=1, help="Residual blocks a stage.")] = 1,
    eval_seeds: Annotated[int, typer.Option(metavar="N", min=1, help="Seeds of sampling.")] = 2,
) -> None:
    """Train the autoencoder and its latent diffusion model at equal compute, and put both beside each other."""
    from ul_runtime.files import durable
    from ul_runtime.machine import cache_dir, origin
    from ul_train.account import account
    from ul_train.data.prepare import open_splits
    from ul_train.run import Run

    fix_threads(options.threads)
    run = Run.open(beside)
    classes = run.info.class_names
    given, config = account(run.config, len(classes)), latent_diffusion(run.config)
    splits = open_splits(config.image, data, None, cache_dir(options.cache))
    widths = tuple(int(width) for width in channels.split(","))
    step_flops = flops_per_image(config, widths, blocks) * config.stages.joint.batch_size
    of_base = given["base"]["flops_of_stage"]
    before = sum(given[stage.name]["flops_of_stage"] for stage in own_stages(run.config)) - of_base
    steps = round(before / step_flops)
    durable.make_directory(out)
    device = choose_device("auto")
    precision = choose_precision(config.run.precision, device)
    first_stage = AutoencoderStage(config, make_autoencoder(config, widths, blocks), steps, device, precision)
    autoencoder = train(first_stage, splits, out)
    scale = unit_scale(autoencoder, splits)
    encoder, decoder = Encode(autoencoder, scale).eval(), Decode(autoencoder, scale).eval()
    base = train(Base(config, device, precision, len(classes), {"encoder": encoder}), splits, out)
    write(out / "bundle", config, classes, {"encoder": encoder, "prior": base, "decoder": decoder}, options.threads)
    ask = options.words(eval_seeds)
    rows = {
        "Unified Latents": figures(beside / "bundle", data, ask, before, of_base),
        "KL autoencoder, latent diffusion": figures(out / "bundle", data, ask, steps * step_flops, of_base),
    }
    record = {
        "figures": rows,
        "autoencoder": {"channels": widths, "blocks": blocks, "steps": steps, "kl_weight": KL_WEIGHT, "scale": scale},
        "parameters": {
            "encoder and decoder": sum(given["networks"][name]["parameters"] for name in ("encoder", "decoder")),
            "autoencoder": sum(parameter.numel() for parameter in autoencoder.parameters()),
        },
        **origin("python tools/kl_autoencoder.py", PACKAGES),
    }
    write_results(results, ("kl-autoencoder.json", "kl-autoencoder.md"), record, markdown(record))


def latent_diffusion(config: "Config") -> "Config":
    """The run's recipe with a base that goes down to clean latents and a decoder of one step."""
    from ul_train.config import validate

    values = config.model_dump()
    values["name"] = "kl-autoencoder"
    values["objective"]["latent_logsnr"] = LATENT_LOGSNR
    values["sampling"] |= {"decoder_steps": 1, "decoder_sampler": "ddim"}
    return validate(values, "the latent diffusion model")


def figures(bundle: Path, data: str, ask: list[str], first: int, second: int) -> dict[str, Any]:
    """What ul-eval says of a bundle, and the FLOPs of training and of sampling an image."""
    import os

    from ul_export.bench.measure import work_of_an_image
    from ul_export.evaluation.report import summary
    from ul_runtime.bundle import Bundle

    return {
        **summary(evaluated(bundle, data, ask)),
        "training_flops": {"first stage": first, "base": second},
        "sampling_flops": work_of_an_image(Bundle.open(bundle), len(os.sched_getaffinity(0)), {}).image_flops,
    }


def markdown(record: dict[str, Any]) -> str:
    """Both models side by side."""
    from ul_train.sweep import markdown_table

    rows = record["figures"]
    first = next(iter(rows.values()))
    gfd = f"gFD ({first['space']}, {first['count']} images; real {first['gfd_real']:.1f})"
    shown = {
        gfd: "{gfd:.1f}" if first["gfd_spread"] is None else "{gfd:.1f} ± {gfd_spread:.1f}",
        "precision, recall": "{precision:.2f}, {recall:.2f}",
        "rFD": "{rfd:.1f}",
        "PSNR of a reconstruction, dB": "{psnr_db:.2f}",
        "bits/pixel under the base": "{bits_per_pixel:.3f}",
        "training, TFLOP: first stage + base": "{first_stage:.0f} + {base:.0f}",
        "sampling, GFLOP an image": "{sampling:.2f}",
    }
    lines = []
    for title, text in shown.items():
        cells = [title]
        for row in rows.values():
            flops = {key.replace(" ", "_"): value / 1e12 for key, value in row["training_flops"].items()}
            cells.append(text.format(**row, **flops, sampling=row["sampling_flops"] / 1e9))
        lines.append(cells)
    return "\n".join([*markdown_table(["", *rows], lines), "", f"`{record['command']}`", ""])


if __name__ == "__main__":
    run_command(app, "kl_autoencoder")
