"""What a recipe costs before it runs: parameters, FLOPs, memory, disk and the latent's bits. No weight is allocated.

Networks live on the meta device and go through the real losses of the stages, where torch counts their FLOPs.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ul_runtime.diffusion import NATS_PER_BIT
from ul_runtime.samplers import LOGSNR, sampler_table
from ul_train import objective as ul
from ul_train.config import Config, load_config, preset_names
from ul_train.stage import Batch, Stage
from ul_train.stages import STAGES, fresh_stages

LOW_PRECISION = (F.linear, F.conv2d, F.scaled_dot_product_attention)  # what autocast runs in bfloat16
NORMS = (F.layer_norm, F.group_norm, F.rms_norm)  # what autocast runs in float32


@dataclass(frozen=True)
class Reading:
    """What one call cost."""

    flops: int  # 2 a multiply-add of matrix products, convolutions and attention; all else is left out
    activation_bytes: int  # tensors kept for the backward pass, each storage once, without parameters
    weight_copy_bytes: int  # bfloat16 copies of parameters kept for the backward pass


class GpuKernels(TorchFunctionMode):
    """Makes meta tensors follow what torch does on a GPU: autocast's data types, and fused kernels.

    Meta has no autocast (of torch 2.13) and takes attention, RMS norm and dropout apart into pieces that no GPU stores.
    """

    def __init__(self, bf16: bool) -> None:
        super().__init__()
        self.bf16 = bf16
        self.copies: dict[Tensor, Tensor] = {}  # bfloat16 of each parameter, made once as autocast does

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if self.bf16 and func in LOW_PRECISION + NORMS:
            cast = self._low if func in LOW_PRECISION else _float32
            args, given = tuple(map(cast, args)), {name: cast(value) for name, value in given.items()}
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args, **given)[0]
        if func is F.rms_norm:  # keeps what the fused RMS norm keeps, and a mean
            return F.layer_norm(*args, **given)
        if func is F.dropout and given["training"] and given["p"] > 0.0:
            return torch.native_dropout(args[0], given["p"], True)[0]  # keeps one byte a value
        return func(*args, **given)

    def _low(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(torch.bfloat16)
        if value not in self.copies:
            self.copies[value] = value.to(torch.bfloat16)
        return self.copies[value]


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value


def read(call: Callable[[], Tensor], parameters: Iterable[Tensor], *, bf16: bool, backward: bool) -> Reading:
    """Run `call`, and the backward pass of the scalar it returns, on meta tensors; `parameters` are no activations."""
    kept: dict[int, int] = {}  # storage -> bytes; the graph keeps all of them alive until `backward`

    def keep(tensor: Tensor) -> Tensor:
        kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    kernels = GpuKernels(bf16)
    with FlopCounterMode(display=False) as counter, kernels, torch.set_grad_enabled(backward):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = call()
        copies = sum(kept.pop(_storage(copy), 0) for copy in kernels.copies.values())
        for parameter in parameters:
            kept.pop(_storage(parameter), None)
        if backward:
            result.backward()
    return Reading(counter.get_total_flops(), sum(kept.values()), copies)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


FLOAT32 = 4  # bytes: weights, gradients, optimiser state and averages at either precision
PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")
Figures: TypeAlias = dict[str, Any]
_META = torch.device("meta")


def account(config: Config, num_classes: int) -> Figures:
    """The account of a recipe for data of `num_classes` classes (0: none), the same on every machine. As JSON."""
    stages = stages_on_meta(config, num_classes)
    sizes = _sizes(stages)
    return {
        "name": config.name,
        "image_shape": config.image_shape,
        "latent_shape": config.latent_shape,
        "num_classes": num_classes,
        "precision": stages[0].precision,  # what activations are counted in
        "networks": sizes,
        "parameters": sum(size["parameters"] for size in sizes.values()),
        **{stage.name: training(stage) for stage in stages},
        "sampling": _sampling(stages, sizes, num_classes),
        "latent": _latent(config),
        "prepared_bytes_per_million": math.prod(config.image_shape) * 1_000_000,  # disk for 1,000,000 images, uint8
    }


def stages_on_meta(config: Config, num_classes: int) -> list[Stage]:
    """The stages of a recipe, whose networks take no memory."""
    with _META:
        return fresh_stages(config, _META, "fp32" if config.run.precision == "fp32" else "bf16", num_classes)


def _sizes(stages: Sequence[Stage]) -> dict[str, Figures]:
    """Parameters of each network that learns, and FLOPs of one call for one image."""
    config, sizes = stages[0].config, {}
    with _META:
        x, z, logsnr = torch.empty(1, *config.image_shape), torch.empty(1, *config.latent_shape), torch.empty(1)
        label = torch.zeros(1, dtype=torch.int64)
    for stage in stages:
        inputs = {"encoder": (x,), "prior": (z, logsnr, label), "decoder": (x, logsnr, z)}
        if not stage.conditional:
            inputs["prior"] = (z, logsnr)
        for name, network in stage.modules.items():
            call = partial(network, *inputs[stage.places[name]])
            flops = read(call, (), bf16=False, backward=False).flops
            sizes[name] = {"parameters": _count({name: network}), "forward_flops": flops}
    return sizes


def _count(networks: Mapping[str, nn.Module]) -> int:
    return sum(parameter.numel() for network in networks.values() for parameter in network.parameters())


def _checkpoint_bytes(stage: Stage) -> int:
    """Of one: weights, their averages, and AdamW's two numbers a parameter."""
    return 4 * FLOAT32 * _count(stage.modules)


def checkpoint_bytes(config: Config, num_classes: int) -> dict[str, int]:
    """Bytes on disk of one checkpoint of each stage and student."""
    stages = stages_on_meta(config, num_classes)
    networks = dict(stages[0].frozen)
    networks |= {place: stage.modules[name] for stage in stages for name, place in stage.places.items()}
    sizes = {stage.name: _checkpoint_bytes(stage) for stage in stages}
    for name, student in config.students.items():
        count = _count({name: networks[name.partition("-")[0]]})
        sizes[name] = (2 if student.method == "moments" else 1) * 4 * FLOAT32 * count
    return sizes


def training(stage: Stage) -> Figures:
    """What one stage on meta costs; bytes are those of one device. FLOPs of the optimiser itself are left out."""
    config, settings = stage.config, stage.settings
    micro_batch = settings.batch_size // settings.accumulate
    networks = [*stage.modules.values(), *stage.frozen.values()]
    parameters = [parameter for network in networks for parameter in network.parameters()]
    with _META:
        batch = _batch(config, micro_batch)
        ramped = config.objective.prior_ramp_steps
        bf16 = stage.precision == "bf16"
        reading = read(lambda: stage.loss(batch, ramped)[0], parameters, bf16=bf16, backward=True)
    weights = FLOAT32 * _count(stage.modules)
    held = {
        "weight_bytes": weights,  # of the networks that learn
        "frozen_bytes": FLOAT32 * _count(stage.frozen),  # of networks kept for latents and previews
        "gradient_bytes": weights,
        "optimizer_bytes": 2 * weights,  # AdamW: two float32 a parameter
        "ema_bytes": weights,
        "weight_copy_bytes": reading.weight_copy_bytes,  # bfloat16, kept by autocast for the backward pass
        "activation_bytes": reading.activation_bytes,  # kept for the backward pass, with a GPU's fused attention
    }
    return {
        "batch_size": settings.batch_size,
        "micro_batch": micro_batch,  # images whose activations are held at once
        "flops_per_image": reading.flops // micro_batch,  # forward and backward through the stage's loss
        "flops_per_step": reading.flops * settings.accumulate,  # one optimiser step
        "flops_of_stage": reading.flops * settings.accumulate * settings.steps,
        **held,
        "memory_bytes": sum(held.values()),  # kernels' workspace and the allocator's reserve come on top
        "checkpoint_bytes": _checkpoint_bytes(stage),  # on disk, one checkpoint
    }


def _batch(config: Config, num: int) -> Batch:
    latent, image = torch.empty(num, *config.latent_shape), torch.empty(num, *config.image_shape)
    times = torch.empty(num)
    draws = ul.Draws(times, latent, torch.empty_like(latent), torch.empty_like(times), torch.empty_like(image))
    eps_clean = torch.empty_like(latent) if config.objective.learned_variance else None
    return Batch(image, torch.zeros(num, dtype=torch.int64), draws, eps_clean)


def _sampling(stages: Sequence[Stage], sizes: Mapping[str, Figures], num_classes: int) -> Figures:
    """Making one image with the recipe's default sampler and the networks of the last stage."""
    config = stages[0].config
    sampling, (low, high) = config.sampling, config.sampling.guidance_interval
    objective = config.make_objective()
    (z_min, z_max), (x_min, x_max) = objective.schedule_z.ends, objective.schedule_x.ends
    prior = sampling.sampler, sampling.grid, sampling.steps
    decoder = sampling.decoder_sampler, sampling.decoder_grid, sampling.decoder_steps
    table = sampler_table(*prior, logsnr_min=z_min, logsnr_max=z_max, ends_clean=False)
    decoder_calls = len(sampler_table(*decoder, logsnr_min=x_min, logsnr_max=x_max, ends_clean=True))
    inside = int(((table[:, LOGSNR] >= low) & (table[:, LOGSNR] <= high)).sum())
    guided = inside if num_classes and sampling.guidance != 1.0 else 0
    flops = {place: sizes[name]["forward_flops"] for stage in stages for name, place in stage.places.items()}
    return {
        "prior_calls": len(table),
        "guided_calls": guided,  # of these, with and without the label: twice the work
        "decoder_calls": decoder_calls,
        "flops_per_image": (len(table) + guided) * flops["prior"] + decoder_calls * flops["decoder"],
    }


def _latent(config: Config) -> Figures:
    """The latent's capacity: the bits of a Gaussian latent of unit variance at the prior's least noise."""
    o, num_values = config.objective, math.prod(config.latent_shape)
    bits = 0.5 * float(np.logaddexp(0.0, o.latent_logsnr)) / NATS_PER_BIT  # 1/2 log2(1 + e^logsnr_0)
    equal = o.bias + math.log(o.loss_factor - 1.0) if o.loss_factor > 1.0 else None
    if equal is None:
        meaning = (
            f"loss_factor is {o.loss_factor:g}: no nat ever costs more in the decoder than in the latent, so training "
            "empties the latent (posterior collapse); give more than 1, mostly 1.3 to 1.7"
        )
    else:
        meaning = (
            f"what an image shows at logsnr below {equal:.2f} (coarse) is cheaper in the latent, "
            "what it shows above (fine) in the decoder"
        )
    return {
        "num_values": num_values,
        "bits_per_value": bits,
        "bits_per_image": bits * num_values,
        "bits_per_pixel": bits * num_values / config.image.size**2,
        "equal_logsnr": equal,  # of the image: where a nat costs the same in latent and decoder
        "meaning": meaning,
    }


def account_table(figures: Figures) -> Group:
    """The account for a terminal."""
    return Group(_network_table(figures), _stage_table(figures), _other_table(figures))


def presets_table() -> Table:
    """The recipes that come with the package, and what one image by each costs."""
    table = Table("preset", "image, c x h x w", "latent")
    for title in ("parameters", "FLOPs an image"):
        table.add_column(title, justify="right")
    for name in preset_names():
        config = load_config(name, [])
        num_classes = 10 if config.image.labels else 0
        stages = stages_on_meta(config, num_classes)
        sizes = _sizes(stages)
        flops = _sampling(stages, sizes, num_classes)["flops_per_image"]
        shapes = (" x ".join(map(str, shape)) for shape in (config.image_shape, config.latent_shape))
        table.add_row(name, *shapes, f"{sum(size['parameters'] for size in sizes.values()):,}", si(flops, "FLOP"))
    return table


def si(value: float, unit: str) -> str:
    """Three digits with a decimal prefix: 45.6 MB."""
    power = 0
    while value >= 999.5 and power < len(PREFIXES) - 1:
        value, power = value / 1000.0, power + 1
    return f"{value:.3g} {PREFIXES[power]}{unit}"


def _network_table(figures: Figures) -> Table:
    table = Table("network", title=f"{figures['name']}: networks", title_justify="left")
    table.add_column("parameters", justify="right")
    table.add_column("forward, one image", justify="right")
    for name, network in figures["networks"].items():
        table.add_row(name, f"{network['parameters']:,}", si(network["forward_flops"], "FLOP"))
    table.add_row("all", f"{figures['parameters']:,}", "")
    return table


_STAGE_ROWS = (
    ("an image", "flops_per_image", "FLOP"),
    ("a step", "flops_per_step", "FLOP"),
    ("the stage", "flops_of_stage", "FLOP"),
    ("weights", "weight_bytes", "B"),
    ("frozen networks", "frozen_bytes", "B"),
    ("gradients", "gradient_bytes", "B"),
    ("AdamW", "optimizer_bytes", "B"),
    ("averaged weights (EMA)", "ema_bytes", "B"),
    ("bfloat16 weights", "weight_copy_bytes", "B"),
    ("activations, {precision}, GPU kernels", "activation_bytes", "B"),
    ("memory in all, at least", "memory_bytes", "B"),
    ("a checkpoint on disk", "checkpoint_bytes", "B"),
)


def _stage_table(figures: Figures) -> Table:
    table = Table("training", title="training", title_justify="left")
    stages = {stage.name: figures[stage.name] for stage in STAGES if stage.name in figures}
    for name in stages:
        table.add_column(name, justify="right")
    table.add_row("images a step, at once", *(f"{s['batch_size']}, {s['micro_batch']}" for s in stages.values()))
    for title, name, unit in _STAGE_ROWS:
        table.add_row(title.format(**figures), *(si(stage[name], unit) for stage in stages.values()))
    return table


def _other_table(figures: Figures) -> Table:
    sampling, latent = figures["sampling"], figures["latent"]
    table = Table(title="sampling, latent, disk", title_justify="left", show_header=False)
    calls = "{prior_calls} calls of the base, {guided_calls} of them guided, {decoder_calls} of the decoder"
    table.add_row("an image", f"{calls.format(**sampling)}: {si(sampling['flops_per_image'], 'FLOP')}")
    shape = " x ".join(map(str, figures["latent_shape"]))
    table.add_row("latent, c x h x w", f"{shape} = {latent['num_values']:,} values")
    bits = "{bits_per_value:.2f} bits a value, {bits_per_pixel:.3f} a pixel, {bits_per_image:,.0f} an image"
    table.add_row("unit Gaussian latent", bits.format(**latent))
    equal = "none" if latent["equal_logsnr"] is None else f"{latent['equal_logsnr']:.2f}"
    table.add_row("equal cost at logsnr", f"{equal}: {latent['meaning']}")
    table.add_row("1 million prepared images", si(figures["prepared_bytes_per_million"], "B"))
    return table
