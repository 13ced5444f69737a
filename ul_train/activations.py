"""The largest magnitudes inside the networks while they learn: whether float16 will hold them after the export."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ul_train.networks import ResidualBlock, TransformerBlock

LARGEST_FLOAT16 = 65504.0
LEAST_HEADROOM_BITS = 2.0  # less than this is warned of; ul-export pins at one bit
GROWING_BELOW_BITS = 6.0  # growth is warned of only where it has come this near
_LAYERS = (nn.Linear, nn.Conv2d)
_BLOCKS = (TransformerBlock, ResidualBlock)
# What ul-export keeps in float32 in any case. Modules that work on a vector an image, not on its tokens or pixels: next
# to no time, and all that follows is scaled. And the last layer: its rounding is added to what the graph gives.
CONDITIONING = {"logsnr_embedding", "modulation", "carry"}
RESULT = "out"


@contextmanager
def watched(networks: Mapping[str, nn.Module]) -> Iterator[dict[str, float]]:
    """Within: the largest magnitude that each block's layers, or a layer outside of blocks, have given so far."""
    largest: dict[str, float] = {}
    handles = []
    for name, network in networks.items():
        blocks = [path for path, module in network.named_modules() if isinstance(module, _BLOCKS)]
        for path, module in network.named_modules():
            inside = any(path.startswith(f"{each}.") for each in blocks)
            if isinstance(module, (*_LAYERS, *_BLOCKS)) and (inside or not _in_float32(path)):
                block = next((each for each in blocks if path == each or path.startswith(f"{each}.")), path)
                handles.append(module.register_forward_hook(_keeper(largest, f"{name}.{block}")))
    try:
        yield largest
    finally:
        for handle in handles:
            handle.remove()


def _in_float32(path: str) -> bool:
    return not {*CONDITIONING, RESULT}.isdisjoint(path.split("."))


def _keeper(largest: dict[str, float], key: str) -> Any:
    def keep(_: nn.Module, __: Any, result: Tensor) -> None:
        with torch.no_grad():
            largest[key] = max(largest.get(key, 0.0), float(result.abs().max()))

    return keep


def warnings(
    now: Mapping[str, float], step: int, before: Mapping[str, float], step_before: int, last_step: int
) -> Iterator[tuple[str, str]]:
    """(block, what to say of it) of those near the end of float16, or so before `last_step` if they grow on.

    `before`: the magnitudes at `step_before`; growth is taken as exponential.
    """
    for block, largest in now.items():
        if not math.isfinite(largest) or largest <= 0.0:
            continue  # the step's own check says so
        headroom = math.log2(LARGEST_FLOAT16 / largest)
        where = f"{block} gives magnitudes up to {largest:.3g}"
        if headroom < LEAST_HEADROOM_BITS:
            yield (
                block,
                f"{where}; float16 ends at 65504: ul-export --fp16 will keep it in float32, --bf16 has the range",
            )
        elif block in before and before[block] < largest and headroom < GROWING_BELOW_BITS:
            rate = math.log2(largest / before[block]) / (step - step_before)
            reached = step + headroom / rate
            if reached <= last_step:
                yield (
                    block,
                    f"{where} and grew {largest / before[block]:.2g} times since step {step_before}: at that rate it "
                    f"passes float16's 65504 at step {reached:.0f}; a lower learning rate or weight_decay slows it",
                )
