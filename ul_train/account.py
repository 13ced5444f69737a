"""What a recipe costs before it runs: parameters, FLOPs, memory, disk and the latent's bits. No weight is allocated.

Networks live on the meta device and go through the real losses, where torch counts their FLOPs (`metering.py`).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

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
from ul_train.config import Config, StageConfig
from ul_train.model import make_base, make_decoder, make_encoder, make_prior

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
JOINT, BASE = ("encoder", "prior", "decoder"), ("base",)  # the networks that each stage trains
Networks = dict[str, nn.Module]
PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")


@dataclass(frozen=True)
class NetworkAccount:
    """One network."""

    parameters: int
    forward_flops: int  # one image, one call


@dataclass(frozen=True)
class StageAccount:
    """One stage of training; bytes are those of one device. FLOPs of the optimiser itself are left out."""

    batch_size: int
    micro_batch: int  # images whose activations are held at once
    flops_per_image: int  # forward and backward through the stage's loss
    flops_per_step: int  # one optimiser step
    flops_of_stage: int
    weight_bytes: int  # of the networks that learn
    frozen_bytes: int  # of networks kept for latents and previews
    gradient_bytes: int
    optimizer_bytes: int  # AdamW: two float32 a parameter
    ema_bytes: int
    weight_copy_bytes: int  # bfloat16 copies that autocast keeps for the backward pass
    activation_bytes: int  # kept for the backward pass of a micro-batch, with a GPU's fused attention
    memory_bytes: int  # sum of the above; kernels' workspace and the allocator's reserve come on top
    checkpoint_bytes: int  # on disk, one checkpoint


@dataclass(frozen=True)
class SamplingAccount:
    """Making one image with the recipe's default sampler."""

    prior_calls: int
    guided_calls: int  # of these, inside the guidance interval: with and without the label, twice the work
    decoder_calls: int
    flops_per_image: int


@dataclass(frozen=True)
class LatentAccount:
    """The latent's capacity: the bits of a Gaussian latent of unit variance at the prior's least noise."""

    num_values: int
    bits_per_value: float
    bits_per_image: float
    bits_per_pixel: float
    equal_logsnr: float | None  # of the image: where a nat costs the same in latent and decoder
    meaning: str


@dataclass(frozen=True)
class Account:
    """All figures of a recipe."""

    name: str
    image_shape: tuple[int, int, int]
    latent_shape: tuple[int, int, int]
    num_classes: int
    precision: str  # bf16 or fp32: what activations are counted in
    networks: dict[str, NetworkAccount]
    parameters: int
    joint: StageAccount
    base: StageAccount
    sampling: SamplingAccount
    latent: LatentAccount
    prepared_bytes_per_million: int  # disk for 1,000,000 prepared images, uint8


def account(config: Config, num_classes: int) -> Account:
    """The account of a recipe for data of `num_classes` classes (0: none), the same on every machine."""
    bf16 = config.run.precision != "fp32"
    with torch.device("meta"):
        networks: Networks = {
            "encoder": make_encoder(config),
            "prior": make_prior(config),
            "decoder": make_decoder(config),
            "base": make_base(config, num_classes),
        }
        sizes = {name: NetworkAccount(_count(net), _forward(name, net, config)) for name, net in networks.items()}
        joint = _stage(config, networks, JOINT, config.joint, bf16)
        base = _stage(config, networks, BASE, config.base_stage, bf16)
    return Account(
        name=config.name,
        image_shape=config.image_shape,
        latent_shape=config.latent_shape,
        num_classes=num_classes,
        precision="bf16" if bf16 else "fp32",
        networks=sizes,
        parameters=sum(size.parameters for size in sizes.values()),
        joint=joint,
        base=base,
        sampling=_sampling(config, sizes, num_classes),
        latent=_latent(config),
        prepared_bytes_per_million=math.prod(config.image_shape) * 1_000_000,
    )


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _forward(name: str, network: nn.Module, config: Config) -> int:
    """FLOPs of one call for one image."""
    x, z, logsnr = torch.empty(1, *config.image_shape), torch.empty(1, *config.latent_shape), torch.empty(1)
    inputs = {"encoder": (x,), "decoder": (x, logsnr, z)}.get(name, (z, logsnr, torch.zeros(1, dtype=torch.int64)))
    return read(lambda: network(*inputs), (), bf16=False, backward=False).flops


def _draws(config: Config, num: int) -> ul.Draws:
    latent, image = (num, *config.latent_shape), (num, *config.image_shape)
    return ul.Draws(torch.empty(num), torch.empty(latent), torch.empty(latent), torch.empty(num), torch.empty(image))


def _loss(config: Config, networks: Networks, trained: tuple[str, ...], num: int) -> Tensor:
    """The scalar that a stage minimises, for `num` images."""
    x, draws, objective = torch.empty(num, *config.image_shape), _draws(config, num), config.make_objective()
    if trained == JOINT:
        encoder, prior, decoder = (networks[name] for name in JOINT)
        nats_prior, nats_decoder = ul.joint_nats(prior, decoder, x, encoder(x), draws, objective)
        return ul.total_loss(nats_prior, nats_decoder, math.prod(config.image_shape))
    with torch.no_grad():
        z_clean = networks["encoder"](x).float()
    label = torch.zeros(num, dtype=torch.int64)
    return ul.base_nats(networks["base"], z_clean, label, draws.eps_prior, draws.t_z, objective).mean()


def _stage(
    config: Config, networks: Networks, trained: tuple[str, ...], settings: StageConfig, bf16: bool
) -> StageAccount:
    micro_batch = settings.batch_size // settings.accumulate
    parameters = [parameter for network in networks.values() for parameter in network.parameters()]
    reading = read(lambda: _loss(config, networks, trained, micro_batch), parameters, bf16=bf16, backward=True)
    weights = FLOAT32 * sum(_count(networks[name]) for name in trained)
    frozen = 0 if trained == JOINT else FLOAT32 * sum(_count(networks[name]) for name in JOINT)
    optimizer = 2 * weights
    held = weights + frozen + weights + optimizer + weights + reading.weight_copy_bytes + reading.activation_bytes
    return StageAccount(
        batch_size=settings.batch_size,
        micro_batch=micro_batch,
        flops_per_image=reading.flops // micro_batch,
        flops_per_step=reading.flops * settings.accumulate,
        flops_of_stage=reading.flops * settings.accumulate * settings.steps,
        weight_bytes=weights,
        frozen_bytes=frozen,
        gradient_bytes=weights,
        optimizer_bytes=optimizer,
        ema_bytes=weights,
        weight_copy_bytes=reading.weight_copy_bytes,
        activation_bytes=reading.activation_bytes,
        memory_bytes=held,
        checkpoint_bytes=weights + weights + optimizer,
    )


def _sampling(config: Config, sizes: dict[str, NetworkAccount], num_classes: int) -> SamplingAccount:
    sampling, (low, high) = config.sampling, config.sampling.guidance_interval
    objective = config.make_objective()
    (z_min, z_max), (x_min, x_max) = objective.schedule_z.ends, objective.schedule_x.ends
    prior = sampling.sampler, sampling.grid, sampling.steps
    decoder = sampling.decoder_sampler, sampling.decoder_grid, sampling.decoder_steps
    table = sampler_table(*prior, logsnr_min=z_min, logsnr_max=z_max, ends_clean=False)
    decoder_calls = len(sampler_table(*decoder, logsnr_min=x_min, logsnr_max=x_max, ends_clean=True))
    inside = int(((table[:, LOGSNR] >= low) & (table[:, LOGSNR] <= high)).sum())
    guided = inside if num_classes and sampling.guidance != 1.0 else 0
    flops = (len(table) + guided) * sizes["base"].forward_flops + decoder_calls * sizes["decoder"].forward_flops
    return SamplingAccount(len(table), guided, decoder_calls, flops)


def _latent(config: Config) -> LatentAccount:
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
    return LatentAccount(
        num_values=num_values,
        bits_per_value=bits,
        bits_per_image=bits * num_values,
        bits_per_pixel=bits * num_values / config.image.size**2,
        equal_logsnr=equal,
        meaning=meaning,
    )


def account_table(figures: Account) -> Group:
    """The account for a terminal."""
    return Group(_network_table(figures), _stage_table(figures), _facts_table(figures))


def si(value: float, unit: str) -> str:
    """Three digits with a decimal prefix: 45.6 MB."""
    power = 0
    while value >= 999.5 and power < len(PREFIXES) - 1:
        value, power = value / 1000.0, power + 1
    return f"{value:.3g} {PREFIXES[power]}{unit}"


def _network_table(figures: Account) -> Table:
    table = Table("network", title=f"{figures.name}: networks", title_justify="left")
    table.add_column("parameters", justify="right")
    table.add_column("forward, one image", justify="right")
    for name, network in figures.networks.items():
        table.add_row(name, f"{network.parameters:,}", si(network.forward_flops, "FLOP"))
    table.add_row("all", f"{figures.parameters:,}", "")
    return table


def _stage_table(figures: Account) -> Table:
    table = Table("training", title="training", title_justify="left")
    table.add_column("joint", justify="right")
    table.add_column("base", justify="right")
    stages = (figures.joint, figures.base)
    table.add_row("images a step, at once", *(f"{s.batch_size}, {s.micro_batch}" for s in stages))
    rows = (
        ("an image", "flops_per_image", "FLOP"),
        ("a step", "flops_per_step", "FLOP"),
        ("the stage", "flops_of_stage", "FLOP"),
        ("weights", "weight_bytes", "B"),
        ("frozen networks", "frozen_bytes", "B"),
        ("gradients", "gradient_bytes", "B"),
        ("AdamW", "optimizer_bytes", "B"),
        ("averaged weights (EMA)", "ema_bytes", "B"),
        ("bfloat16 weights", "weight_copy_bytes", "B"),
        (f"activations, {figures.precision}, GPU kernels", "activation_bytes", "B"),
        ("memory in all, at least", "memory_bytes", "B"),
        ("a checkpoint on disk", "checkpoint_bytes", "B"),
    )
    for title, name, unit in rows:
        table.add_row(title, *(si(getattr(stage, name), unit) for stage in stages))
    return table


def _facts_table(figures: Account) -> Table:
    sampling, latent = figures.sampling, figures.latent
    shape = " x ".join(map(str, figures.latent_shape))
    table = Table(title="sampling, latent, disk", title_justify="left", show_header=False)
    calls = f"{sampling.prior_calls} calls of the base, {sampling.guided_calls} of them guided"
    table.add_row(
        "an image", f"{calls}, {sampling.decoder_calls} of the decoder: {si(sampling.flops_per_image, 'FLOP')}"
    )
    table.add_row("latent, c x h x w", f"{shape} = {latent.num_values:,} values")
    per_pixel = f"{latent.bits_per_value:.2f} bits a value, {latent.bits_per_pixel:.3f} a pixel"
    table.add_row("unit Gaussian latent", f"{per_pixel}, {latent.bits_per_image:,.0f} an image")
    equal = "none" if latent.equal_logsnr is None else f"{latent.equal_logsnr:.2f}"
    table.add_row("equal cost at logsnr", f"{equal}: {latent.meaning}")
    table.add_row("1 million prepared images", si(figures.prepared_bytes_per_million, "B"))
    return table
