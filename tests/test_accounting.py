"""The accounts of recipes against closed forms, against real networks, and against torch's own autocast."""

import json
import math
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ul_train import checkpoint as ckpt
from ul_train import objective as ul
from ul_train.account import Figures, Reading, account, account_table, presets_table, read, si
from ul_train.config import load_config, preset_names
from ul_train.model import make_base, make_decoder, make_encoder, make_prior
from ul_train.networks import TransformerBlock
from ul_train.stage import Batch
from ul_train.stages import Joint

BF16 = "run.precision=bf16"
JOINT = ("encoder", "prior", "decoder")


@cache
def tiny(*overrides: str, num_classes: int = 10) -> Figures:
    return account(load_config("tiny", list(overrides)), num_classes)


def block_reading(n: int, d: int, *, backward: bool, bf16: bool = False, num: int = 2, dropout: float = 0.0) -> Reading:
    """A transformer block of width d on `num` x n tokens; head_dim 64."""
    with torch.device("meta"):
        block = TransformerBlock(d, 64, dropout)
        h, modulation = torch.empty(num, n, d, requires_grad=True), torch.empty(num, 6, d)
    return read(lambda: block(h, modulation).sum(), block.parameters(), bf16=bf16, backward=backward)


def kept_bytes(call: Callable[[], Tensor], parameters: Any) -> int:
    """Bytes that autograd really keeps, each storage once, without parameters."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = call()
    assert result.requires_grad  # the graph, alive: no storage was freed and its address used again
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    return sum(size for address, size in kept.items() if address not in own)


class RealValues(TorchDispatchMode):
    """Counts the values that operators make anywhere but on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and value.device.type != "meta":
                self.count += value.numel()
        return result


@cache
def observed(preset: str) -> tuple[Figures, float, int]:
    """(account, processor seconds, values made on a real device) of a preset with ten classes."""
    config, start = load_config(preset, []), time.process_time()
    with RealValues() as real:
        figures = account(config, 10)
    return figures, time.process_time() - start, real.count


# FLOPs


@pytest.mark.parametrize(("n", "d"), [(64, 256), (1024, 128)])
def test_a_block_costs_24_n_d2_for_its_matrices_and_4_n2_d_for_attention(n: int, d: int) -> None:
    assert block_reading(n, d, backward=False).flops == 2 * (24 * n * d**2 + 4 * n**2 * d)


def test_the_backward_pass_costs_twice_the_matrices_and_two_and_a_half_times_the_attention() -> None:
    n, d = 256, 128
    assert block_reading(n, d, backward=True).flops == 2 * (3 * 24 * n * d**2 + 3.5 * 4 * n**2 * d)


def test_the_paper_prior_costs_its_closed_form() -> None:
    n, d, c = 32 * 32, 1024, 32
    blocks = 8 * (24 * n * d**2 + 4 * n**2 * d)
    # of logsnr; modulation of the blocks, of the output, and the carry
    conditioning = 2 * (64 * d + d * d) + 2 * d * 6 * d + 2 * d * 2 * d + 2 * d * c
    with torch.device("meta"):
        prior = make_prior(load_config("imagenet-512", []))
        z, logsnr = torch.empty(1, c, 32, 32), torch.empty(1)
    assert read(lambda: prior(z, logsnr), (), bf16=False, backward=False).flops == blocks + conditioning + 4 * n * c * d


def test_the_encoder_costs_its_convolutions() -> None:
    convolution = 2 * 9 * 16 * 16
    full, half = 8 * 8, 4 * 4  # tiny: 16 px, patch 2, stages of 16 channels at 8 and 4 px, one block each
    expected = full * (2 * 9 * 4 * 16 + 2 * convolution) + half * (3 * convolution + 2 * 16 * 2)
    assert tiny()["networks"]["encoder"]["forward_flops"] == expected


def test_flops_on_meta_are_those_of_real_networks() -> None:
    config = load_config("tiny", [])
    x, z, logsnr = torch.randn(1, 1, 16, 16), torch.randn(1, 2, 4, 4), torch.zeros(1)
    calls: dict[str, Callable[[], Tensor]] = {
        "encoder": lambda: make_encoder(config)(x),
        "prior": lambda: make_prior(config)(z, logsnr),
        "decoder": lambda: make_decoder(config)(x, logsnr, z),
        "base": lambda: make_base(config, 10)(z, logsnr, torch.zeros(1, dtype=torch.int64)),
    }
    counted = {}
    for name, call in calls.items():
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the CPU's own goes uncounted
            call()
        counted[name] = counter.get_total_flops()
    assert {name: size["forward_flops"] for name, size in tiny()["networks"].items()} == counted


def test_training_costs_about_three_forward_passes_of_what_learns_and_one_of_what_does_not() -> None:
    for preset in ("fashion-32", "color-64"):
        figures = observed(preset)[0]
        forward = {name: size["forward_flops"] for name, size in figures["networks"].items()}
        assert figures["joint"]["flops_per_image"] == pytest.approx(3 * sum(forward[name] for name in JOINT), rel=0.05)
        assert figures["base"]["flops_per_image"] == pytest.approx(3 * forward["base"] + forward["encoder"], rel=0.05)


def test_sampling_calls_the_base_twice_inside_the_guidance_interval_only() -> None:
    everywhere = "sampling.guidance_interval=[-100, 100]"
    assert tiny(everywhere)["sampling"]["guided_calls"] == 4
    assert tiny(everywhere, "sampling.guidance=1")["sampling"]["guided_calls"] == 0
    assert tiny(everywhere, num_classes=0)["sampling"]["guided_calls"] == 0
    figures = tiny("sampling.grid=uniform", "sampling.steps=15", "sampling.guidance_interval=[-3, 1.5]")
    assert figures["sampling"]["guided_calls"] == 5  # nodes -10, -9, ... 4; -3, -2, -1, 0, 1 are inside
    base, decoder = (figures["networks"][name]["forward_flops"] for name in ("base", "decoder"))
    assert figures["sampling"]["flops_per_image"] == (15 + 5) * base + 2 * decoder


def test_heun_calls_the_networks_twice_a_step_but_once_in_a_last_step_that_ends_clean() -> None:
    heun = "sampling.sampler=heun", "sampling.decoder_sampler=heun", "sampling.guidance=1"
    figures = tiny(*heun, "sampling.steps=15", "sampling.decoder_steps=4")
    assert (figures["sampling"]["prior_calls"], figures["sampling"]["decoder_calls"]) == (30, 7)
    base, decoder = (figures["networks"][name]["forward_flops"] for name in ("base", "decoder"))
    assert figures["sampling"]["flops_per_image"] == 30 * base + 7 * decoder


# Memory and disk


def test_parameters_are_those_of_real_networks() -> None:
    config = load_config("tiny", [])
    real = (make_encoder(config), make_prior(config), make_decoder(config), make_base(config, 10))
    counts = [sum(parameter.numel() for parameter in network.parameters()) for network in real]
    figures = tiny()
    assert [size["parameters"] for size in figures["networks"].values()] == counts
    assert figures["parameters"] == sum(counts)


def test_a_weight_takes_4_bytes_itself_4_as_gradient_8_in_adamw_and_4_in_the_average() -> None:
    figures = tiny()
    for stage, names in ((figures["joint"], JOINT), (figures["base"], ("base",))):
        count = sum(figures["networks"][name]["parameters"] for name in names)
        parts = (stage["weight_bytes"], stage["gradient_bytes"], stage["optimizer_bytes"], stage["ema_bytes"])
        assert parts == (4 * count, 4 * count, 8 * count, 4 * count)
        in_all = sum(parts) + stage["frozen_bytes"] + stage["weight_copy_bytes"] + stage["activation_bytes"]
        assert stage["memory_bytes"] == in_all
    assert (figures["joint"]["frozen_bytes"], figures["base"]["frozen_bytes"]) == (0, figures["joint"]["weight_bytes"])


def test_kept_bytes_on_meta_are_those_that_a_real_encoder_keeps() -> None:
    config = load_config("tiny", [])
    encoder, x = make_encoder(config), torch.randn(3, 1, 16, 16)
    real = kept_bytes(lambda: encoder(x).sum(), encoder.parameters())
    with torch.device("meta"):
        other, y = make_encoder(config), torch.empty(3, 1, 16, 16)
    reading = read(lambda: other(y).sum(), other.parameters(), bf16=False, backward=True)
    assert reading.activation_bytes == real > 0
    assert reading.weight_copy_bytes == 0


def test_bfloat16_on_meta_keeps_what_autocast_keeps() -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))

    real, x = network(), torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        expected = kept_bytes(lambda: real(x).sum(), real.parameters())
    with torch.device("meta"):
        other, y = network(), torch.empty(5, 64)
    reading = read(lambda: other(y).sum(), other.parameters(), bf16=True, backward=True)
    assert reading.weight_copy_bytes == 2 * 64 * 256  # the first layer's weight serves no gradient: x needs none
    assert reading.activation_bytes + reading.weight_copy_bytes == expected


def test_attention_keeps_no_matrix_of_n_by_n() -> None:
    short, long = (block_reading(n, 128, backward=True, bf16=True).activation_bytes for n in (64, 1024))
    assert long == pytest.approx(16 * short, rel=0.01)


def test_dropout_keeps_a_byte_a_value() -> None:
    n, d = 64, 128
    with_dropout, without = (block_reading(n, d, backward=True, bf16=True, dropout=p) for p in (0.1, 0.0))
    masks = 2 * n * (d + 4 * d + d)  # after attention, inside the MLP, after the MLP
    assert with_dropout.activation_bytes - without.activation_bytes == masks


@pytest.mark.gpu
def test_the_account_keeps_within_five_percent_of_what_cuda_keeps() -> None:
    config = load_config("color-64", ["stages.joint.batch_size=32", BF16])
    x, z, t = torch.rand(32, 3, 64, 64), torch.randn(32, 16, 8, 8), torch.rand(32)
    draws = ul.Draws(*(value.cuda() for value in (t, z, z.clone(), t.clone(), torch.randn_like(x))))
    stage = Joint(config, torch.device("cuda"), "bf16")
    batch = Batch(x.cuda(), torch.zeros(32, dtype=torch.long).cuda(), draws)

    def loss() -> Tensor:
        return stage.loss(batch, config.objective.prior_ramp_steps)[0]

    with torch.autocast("cuda", torch.bfloat16):
        real = kept_bytes(loss, stage.parameters.values())
    joint = account(config, 10)["joint"]
    assert joint["activation_bytes"] + joint["weight_copy_bytes"] == pytest.approx(real, rel=0.05)


def test_bfloat16_keeps_less_and_copies_weights() -> None:
    low, full = tiny(BF16)["joint"], tiny("run.precision=fp32")["joint"]
    assert low["activation_bytes"] < full["activation_bytes"]
    assert 0 < low["weight_copy_bytes"] <= low["weight_bytes"] / 2
    assert full["weight_copy_bytes"] == 0
    assert low["flops_per_image"] == full["flops_per_image"]


def test_a_checkpoint_on_disk_has_the_size_of_the_account(tmp_path: Path) -> None:
    stage = Joint(load_config("tiny", []), torch.device("cpu"), "fp32")
    optimizer = torch.optim.AdamW(stage.parameters.values())
    for parameter in stage.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = ckpt.State(stage="joint", step=1, seed=0, config_sha256="0", data_fingerprint="0")
    tensors = ckpt.optimizer_tensors(optimizer, list(stage.parameters))
    path = ckpt.save_checkpoint(tmp_path, state, ckpt.tensors_of(stage.modules), ckpt.tensors_of(stage.ema), tensors)
    written = sum(file.stat().st_size for file in path.iterdir())
    headers = 60_000  # names and shapes of some 500 tensors
    assert tiny()["joint"]["checkpoint_bytes"] <= written <= tiny()["joint"]["checkpoint_bytes"] + headers


def test_a_million_prepared_images_take_a_byte_a_value() -> None:
    assert observed("color-64")[0]["prepared_bytes_per_million"] == 3 * 64 * 64 * 10**6


# What changes what


def test_twice_the_batch_is_twice_the_step_and_the_activations() -> None:
    one, two = tiny(), tiny("stages.joint.batch_size=16", "stages.base.batch_size=16")
    for small, large in ((one["joint"], two["joint"]), (one["base"], two["base"])):
        assert large["flops_per_image"] == small["flops_per_image"]
        assert large["flops_per_step"] == 2 * small["flops_per_step"]
        assert large["activation_bytes"] == pytest.approx(2 * small["activation_bytes"], rel=0.001)
        assert large["weight_bytes"] == small["weight_bytes"]


def test_micro_batches_save_activations_and_cost_nothing() -> None:
    whole, parts = tiny()["joint"], tiny("stages.joint.accumulate=4")["joint"]
    assert parts["micro_batch"] == 2
    assert parts["activation_bytes"] == pytest.approx(whole["activation_bytes"] / 4, rel=0.001)
    assert parts["flops_per_step"] == whole["flops_per_step"]


def test_twice_the_width_is_four_times_the_blocks() -> None:
    def prior(width: int) -> tuple[int, int]:
        size = tiny(f"prior.widths=[{width}]", "prior.blocks=[8]")["networks"]["prior"]
        return size["parameters"], size["forward_flops"]

    for narrow, wide in zip(prior(128), prior(256), strict=True):
        assert 3.7 < wide / narrow < 4.1


def test_more_steps_change_the_stage_and_nothing_else() -> None:
    one, two = tiny()["base"], tiny("stages.base.steps=40")["base"]
    assert two["flops_of_stage"] == 2 * one["flops_of_stage"]
    assert {**two, "flops_of_stage": 0} == {**one, "flops_of_stage": 0}


# Bits


def test_a_unit_gaussian_latent_costs_three_point_six_bits_a_value() -> None:
    latent = observed("imagenet-512")[0]["latent"]
    assert latent["num_values"] == 32**3
    assert latent["bits_per_value"] == pytest.approx(0.5 * math.log2(1 + math.exp(5)), rel=1e-12)
    assert round(latent["bits_per_value"], 2) == 3.61
    assert latent["bits_per_image"] == pytest.approx(latent["bits_per_value"] * 32**3)
    assert latent["bits_per_pixel"] == pytest.approx(latent["bits_per_value"] / 8)


def test_equal_cost_lies_at_bias_plus_log_of_loss_factor_less_one() -> None:
    equal = tiny("objective.loss_factor=1.5", "objective.bias=-2")["latent"]["equal_logsnr"]
    assert equal is not None
    assert equal == pytest.approx(-2 + math.log(0.5))
    weight = ul.decoder_weight(torch.tensor(equal, dtype=torch.float64), 1.5, -2.0)
    assert weight.item() == pytest.approx(1.0)  # a nat of the decoder costs a nat of the latent


@pytest.mark.parametrize("loss_factor", [1.0, 0.5])
def test_without_a_point_of_equal_cost_the_account_speaks_of_collapse(loss_factor: float) -> None:
    figures = tiny(f"objective.loss_factor={loss_factor}")
    assert figures["latent"]["equal_logsnr"] is None
    assert "posterior collapse" in figures["latent"]["meaning"]
    assert "posterior collapse" in " ".join(printed(figures).split())


# The presets


def printed(figures: Figures) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(account_table(figures))
    return capture.get()


def test_the_table_of_presets_shows_each_with_its_shapes_and_size() -> None:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(presets_table())
    lines = {line.split()[1]: line for line in capture.get().splitlines() if "x" in line}
    assert set(preset_names()) <= set(lines)
    figures = tiny()
    flops = si(figures["sampling"]["flops_per_image"], "FLOP")
    for part in ("1 x 16 x 16", "2 x 4 x 4", f"{figures['parameters']:,}", flops):
        assert part in lines["tiny"]


@pytest.mark.parametrize("preset", preset_names())
def test_a_preset_is_accounted_within_seconds_without_allocating_its_weights(preset: str) -> None:
    figures, seconds, real_values = observed(preset)
    assert seconds < 20
    assert real_values < 1000
    assert figures["name"] == preset
    assert json.loads(json.dumps(figures))["parameters"] == figures["parameters"]


def test_real_values_are_noticed() -> None:
    with RealValues() as real:
        torch.zeros(4000)
    assert real.count == 4000


def test_imagenet_512_has_the_sizes_of_the_paper() -> None:
    config = load_config("imagenet-512", [])
    assert (config.image_shape, config.latent_shape, config.downsampling) == ((3, 512, 512), (32, 32, 32), 16)
    assert (config.encoder.patch, config.encoder.channels) == (2, (128, 256, 512, 512))
    assert config.encoder.blocks == (2, 2, 2, 3)
    assert (config.prior.widths, config.prior.blocks) == ((1024,), (8,))
    assert (config.decoder.patch, config.decoder.channels) == (2, (128, 256, 512))
    assert (config.decoder.width, config.decoder.middle_blocks, config.decoder.dropout) == (1024, 8, 0.1)
    assert (config.base.widths, config.base.blocks, config.base.dropout) == ((512, 1024), (6, 16), 0.1)
    assert (config.objective.loss_factor, config.objective.latent_logsnr) == (1.5, 5.0)


def test_photo_256_fits_a_gpu_of_24_gb_with_room_for_workspace() -> None:
    figures = observed("photo-256")[0]
    assert max(figures["joint"]["memory_bytes"], figures["base"]["memory_bytes"]) < 16e9


def test_the_table_shows_sizes_cost_memory_and_bits() -> None:
    figures = observed("fashion-32")[0]
    text = printed(figures)
    for part in (
        f"{figures['parameters']:,}",
        si(figures["joint"]["flops_per_step"], "FLOP"),
        "3.61 bits a value",
        "15 of them",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (999, "999 B"), (999.6, "1 kB"), (1234, "1.23 kB"), (45.6e9, "45.6 GB")]
)
def test_si_gives_three_digits(value: float, text: str) -> None:
    assert si(value, "B") == text
