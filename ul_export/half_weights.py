"""Weights stored in float16 and computed with in float32: half the bundle's size, and the same speed.

The networks are rounded first and the graphs proved equal to the rounded ones; what rounding does to the pictures is
measured apart.
"""

import copy
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import nn

from ul_export.compare import image_psnr_db
from ul_export.precision.tensors import half_tensor, set_nodes, stored_name
from ul_runtime.errors import BadInputError
from ul_runtime.pipeline import Pipeline

LEAST_PSNR_DB = 35.0  # of images by rounded against those by exact weights, from the same noise
NUM_IMAGES = 16
_FLOAT = TensorProto.FLOAT


def rounded(networks: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Copies of the networks, every floating-point weight the float16 next to it. BadInputError: one is too large."""
    copies = {name: copy.deepcopy(network) for name, network in networks.items()}
    for name, network in copies.items():
        for key, value in network.state_dict().items():
            if not value.is_floating_point():
                continue
            half = value.half()
            if not torch.isfinite(half).all():
                largest = value.abs().max().item()
                raise BadInputError(
                    f"weight {name}.{key} is up to {largest:.4g}, float16 ends at 65504; export with --weights fp32"
                )
            value.copy_(half)
    return copies


def exact_in_half(model: ModelProto) -> set[str]:
    """Names of the float32 initializers that float16 holds exactly."""
    return {each.name for each in model.graph.initializer if each.data_type == _FLOAT and each.dims and _exact(each)}


def store_half(model: ModelProto, names: Collection[str], kind: int = TensorProto.FLOAT16) -> ModelProto:
    """These float32 initializers are stored in half precision, and cast where the graph begins."""
    casts = []
    for tensor in model.graph.initializer:
        if tensor.name not in names:
            continue
        name, stored = tensor.name, stored_name(tensor.name)
        tensor.CopyFrom(half_tensor(tensor, kind))
        tensor.name = stored
        casts.append(helper.make_node("Cast", [stored], [name], name=f"{stored}/Cast", to=_FLOAT))
    set_nodes(model, [*casts, *model.graph.node])
    return model


def _exact(tensor: TensorProto) -> bool:
    half = numpy_helper.to_array(half_tensor(tensor, TensorProto.FLOAT16)).astype(np.float32)  # infinity: overflow
    return np.array_equal(half, numpy_helper.to_array(tensor))


def effect_of_rounding(exact: Pipeline, by_rounded: Pipeline) -> dict[str, Any]:
    """The same pictures by both, from the same noise: largest difference of a pixel in [-1, 1], and their PSNR.

    BadInputError below LEAST_PSNR_DB.
    """
    (expected,), (given,) = (list(p.generate(NUM_IMAGES, batch_size=NUM_IMAGES)) for p in (exact, by_rounded))
    psnr = image_psnr_db(expected.x, given.x)
    if not psnr >= LEAST_PSNR_DB:
        raise BadInputError(
            f"images by weights rounded to float16 are at {psnr:.1f} dB of those by exact weights, at least "
            f"{LEAST_PSNR_DB:g} is asked for; no bundle was written: export with --weights fp32"
        )
    largest = float(np.abs(expected.x - given.x).max())
    return {"num_images": NUM_IMAGES, "image_psnr_db": min(psnr, 200.0), "largest_pixel_difference": largest}
