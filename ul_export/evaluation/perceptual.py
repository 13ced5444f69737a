"""Shift-tolerant perceptual distance: LPIPS on an AlexNet without aliasing (Ghildyal, Liu 2022, arXiv 2207.13686)."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d, max_pool2d, normalize, pad, relu

from ul_export.evaluation.features import resized
from ul_export.evaluation.packaged_weights import packaged_weights

PACKAGE = "stlpips_pytorch"
_FILE = "weights/vST0.0/alex_shift_tolerant.pth"
_SHA256 = "b356b382f96010f77d085ee8343ecd9fd322d0a56e8de2b2d0549fafcad8b9ee"
SMALLEST_PX = 64  # the size it was trained on: smaller images are enlarged to it


def open_perceptual() -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Distance `b` of x `b c h w` to x `b c h w`, both in [-1, 1], grey or RGB. UsageError, BadInputError."""
    weights = packaged_weights(PACKAGE, _FILE, _SHA256, "perceptual")

    @torch.inference_mode()
    def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        layers = zip(_trunk(_prepared(a), weights), _trunk(_prepared(b), weights), strict=True)
        total = torch.zeros(len(a))
        for k, (of_a, of_b) in enumerate(layers):
            apart = (normalize(of_a, dim=1) - normalize(of_b, dim=1)) ** 2
            total += conv2d(apart, weights[f"lin{k}.model.1.weight"]).mean(dim=(1, 2, 3))
        return total.numpy()

    return distance


def _prepared(x: np.ndarray) -> Tensor:
    """RGB of at least SMALLEST_PX."""
    size = max(SMALLEST_PX, x.shape[2])
    picture = torch.from_numpy(x) if size == x.shape[2] else resized(x, size, size)
    return picture.expand(-1, 3, -1, -1)


def _trunk(x: Tensor, weights: dict[str, Tensor]) -> list[Tensor]:
    """The five activations. Each step down in size is a blur of [1 2 1] at stride 2 over mirrored borders."""

    def convolved(h: Tensor, name: str, padding: int) -> Tensor:
        return conv2d(h, weights[f"net.{name}.weight"], weights[f"net.{name}.bias"], padding=padding)

    def blurred(h: Tensor, name: str) -> Tensor:
        return conv2d(pad(h, (2, 2, 2, 2), "reflect"), weights[f"net.{name}.filt"], stride=2, groups=h.shape[1])

    x = (x - weights["scaling_layer.shift"]) / weights["scaling_layer.scale"]
    first = relu(blurred(convolved(x, "slice1.0", 2), "slice1.1"))
    second = relu(convolved(blurred(max_pool2d(first, 3, 1), "slice2.4"), "slice2.5", 2))
    third = relu(convolved(blurred(max_pool2d(second, 3, 1), "slice3.8"), "slice3.9", 1))
    fourth = relu(convolved(third, "slice4.11", 1))
    return [first, second, third, fourth, relu(convolved(fourth, "slice5.13", 1))]
