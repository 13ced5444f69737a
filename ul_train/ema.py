"""Exponential moving average of weights."""

import torch
from torch import nn


def ema_decay_at(step: int, decay: float) -> float:
    """min(decay, (1 + step) / (10 + step)): early weights are forgotten fast; step counts from 0."""
    return min(decay, (1.0 + step) / (10.0 + step))


@torch.no_grad()
def update_ema(average: nn.Module, module: nn.Module, decay: float) -> None:
    """average <- decay average + (1 - decay) module, in float32; both have the same parameters."""
    targets: list[torch.Tensor] = list(average.parameters())
    sources: list[torch.Tensor] = list(module.parameters())
    torch._foreach_lerp_(targets, sources, 1.0 - decay)
