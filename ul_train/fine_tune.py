"""A run that begins with the networks of a bundle: what fits, and its weights in torch."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from ul_runtime.bundle import Bundle
from ul_runtime.errors import BadInputError, UsageError
from ul_runtime.files.onnx_file import read_model
from ul_runtime.loading import open_bundle
from ul_runtime.manifest import NETWORK_GRAPHS, BundleInfo, GraphName
from ul_train.config import Config
from ul_train.model import sampled_networks
from ul_train.options import TrainOptions
from ul_train.run import Run

_SAME = ("image", "latent", "classes", "logsnr_z", "logsnr_x")  # of bundles whose graphs are the same
_DTYPES = {1: "<f4", 10: "<f2"}  # ONNX's TensorProto.DataType -> numpy
_NETWORK_OF: dict[GraphName, str] = {"encoder": "encoder", "prior_step": "prior", "decoder_step": "decoder"}
# ul-export's names of a parameter: module.network.PARAMETER, transposed, once more in another shape, in float16
_NAME = re.compile(r"(?:network\.)?(?P<parameter>.+?)(?P<transposed>\.T)?(?:~\d+)?(?P<half>\.half)?")


def begins_with(config: Config, options: TrainOptions) -> Config:
    """The recipe of a run that begins with the bundle of --init: with its hash. UsageError, BadInputError."""
    if options.init is not None:
        return config.model_copy(update={"init": open_bundle(options.init, graphs=()).hash})
    if config.init is not None and not options.resume:
        raise UsageError(f"the recipe begins with the bundle of hash {config.init[:12]}...; give it with --init")
    return config


def check_same(described: BundleInfo, bundle: Bundle, where: str, advice: str) -> None:
    """BadInputError unless what is described has the formats and networks of the bundle, by their recipes."""
    manifest = bundle.manifest
    pairs: dict[str, Any] = {part: (getattr(described, part), getattr(manifest, part)) for part in _SAME}
    if described.students or manifest.students:
        pairs["students"] = tuple(", ".join(sorted(each.students)) or "none" for each in (described, manifest))
    for part in ("encoder", "decoder", "base"):
        pairs[part] = _without_dropout(described.recipe.get(part)), _without_dropout(manifest.recipe.get(part))
    for part, (ours, its) in pairs.items():
        if ours != its:
            raise BadInputError(f"{where}: its {part} is {ours}, that of {bundle.path} {its}; {advice}")


def _without_dropout(part: Any) -> Any:
    """A network of a recipe without what only training knows."""
    return {name: value for name, value in part.items() if name != "dropout"} if isinstance(part, dict) else part


def networks_of(bundle: str, config: Config, class_names: tuple[str, ...]) -> dict[str, nn.Module]:
    """`encoder`, `prior` and `decoder` with the weights of a bundle. BadInputError: they do not fit, or are in int8."""
    opened = open_bundle(bundle, expect=config.init)
    described = Run.in_memory(config, class_names).manifest()
    check_same(described, opened, f"recipe {config.name}", "give the recipe and the images of the bundle")
    networks = sampled_networks(config, len(class_names))
    for graph in NETWORK_GRAPHS:
        if opened.manifest.graphs[graph].precision not in ("fp32", "fp16"):
            precision = opened.manifest.graphs[graph].precision
            raise BadInputError(f"{opened.path}: its weights are in {precision}; give a bundle in fp32 or fp16")
        arrays = opened.initializers(graph) | small_weights(opened.graph(graph))
        put_weights(networks[_NETWORK_OF[graph]], arrays, f"{opened.path}: {graph}")
    return networks


def small_weights(graph: bytes) -> dict[str, np.ndarray]:
    """The initializers inside ONNX bytes that `Bundle.open` has checked."""
    tensors = read_model(graph)["graph"].get("initializer", [])
    return {
        tensor["name"]: np.frombuffer(tensor["raw_data"], _DTYPES[tensor["data_type"]]).reshape(tensor.get("dims", []))
        for tensor in tensors
        if "raw_data" in tensor and tensor["data_type"] in _DTYPES
    }


def put_weights(network: nn.Module, given: Mapping[str, np.ndarray], where: str) -> None:
    """Put initializers that ul-export has named back into the parameters. BadInputError: one is missing."""
    found: dict[str, np.ndarray] = {}
    for name, array in given.items():
        if (match := _NAME.fullmatch(name)) is not None:
            found[match["parameter"]] = array.T if match["transposed"] else array
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name not in found or found[name].size != parameter.numel():
                raise BadInputError(f"{where}: has no weight {name} of this shape; export the bundle again")
            values = np.array(found[name], np.float32).reshape(tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(values))
