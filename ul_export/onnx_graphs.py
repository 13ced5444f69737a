"""Step graphs as ONNX: torch's exporter, then weights moved into one safetensors file a network.

A graph file holds no weights: its initializers point into the safetensors file (ONNX external data, tensor names equal
initializer names), so standard tools can open the directory and graphs can share weights.
"""

import json
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import ModelProto, TensorProto, numpy_helper
from safetensors.numpy import save
from torch import nn

from ul_export.half_weights import exact_in_half, store_half
from ul_export.module_paths import name_nodes
from ul_export.weight_names import name_weights
from ul_runtime.bundle import parse_weights
from ul_runtime.errors import BadInputError, ULError
from ul_runtime.manifest import BundleInfo, GraphName, ImageFormat, LatentFormat, interface
from ul_train.networks.layers import SelfAttention
from ul_train.step import DecoderStep, PriorStep

OPSETS = (18, 20, 22, 23)  # those that the tests prove
_ATTENTION = 23  # from here on it is one operator, which ONNX Runtime runs on cards without writing scores down
_INLINE_BYTES = 256  # smaller initializers (shapes, scalars) stay in the graph


@dataclass(frozen=True)
class StepGraph:
    """One graph to export: a torch module, and example inputs by name with a batch (and branches) of two or more."""

    name: GraphName
    module: nn.Module
    inputs: dict[str, torch.Tensor]


def step_graphs(networks: dict[str, nn.Module], image: ImageFormat, latent: LatentFormat) -> list[StepGraph]:
    """The three graphs of a bundle over `encoder`, `prior` and `decoder`, in evaluation mode."""
    modules: dict[GraphName, nn.Module] = {
        "encoder": networks["encoder"],
        "prior_step": PriorStep(networks["prior"]),
        "decoder_step": DecoderStep(networks["decoder"]),
    }
    dims = {"b": 3, "g": 2}
    graphs = []
    for name, module in modules.items():
        shapes = {
            key: [dims[d] if isinstance(d, str) else d for d in shape]
            for key, shape in interface(name, image, latent)[0].items()
        }
        inputs = {
            key: torch.zeros(shape, dtype=torch.int64) if key == "label" else torch.zeros(shape)
            for key, shape in shapes.items()
        }
        graphs.append(StepGraph(name, module.eval(), inputs))
    return graphs


def export_onnx(graph: StepGraph, outputs: list[str], opset: int) -> ModelProto:
    """The graph with its weights inside, batch and branches dynamic (Dim names b, g). ULError if torch cannot."""
    dynamic = {
        name: {0: torch.export.Dim("b", min=1)}
        | ({1: torch.export.Dim("g", min=1)} if name in ("label", "weight") else {})
        for name in graph.inputs
    }
    for module in graph.module.modules():
        if isinstance(module, SelfAttention):
            module.one_operator = opset >= _ATTENTION
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the exporter warns of its own internals
            program = torch.onnx.export(
                graph.module,
                kwargs=graph.inputs,
                input_names=list(graph.inputs),
                output_names=outputs,
                dynamic_shapes=dynamic,
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ULError(f"{graph.name}: torch cannot export this graph at opset {opset}: {one_line(error)}") from error
    finally:
        log.setLevel(level)
    assert program is not None
    model = program.model_proto
    name_nodes(model)
    name_weights(model, graph.module)
    return strip_metadata(model)


def strip_metadata(model: ModelProto) -> ModelProto:
    """Remove what torch notes down for itself: its own names, types, and stack traces with paths of this machine."""
    graph = model.graph
    del graph.value_info[:]  # a quarter of a graph's bytes; everyone infers it
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    return model


def split_weights(model: ModelProto, weights_file: str) -> tuple[bytes, bytes]:
    """(graph without weights, safetensors bytes): every large initializer becomes external data in `weights_file`."""
    large = [t for t in model.graph.initializer if len(t.raw_data) > _INLINE_BYTES]
    arrays = {tensor.name: np.ascontiguousarray(numpy_helper.to_array(tensor)) for tensor in large}
    weights = save(arrays)
    header_bytes = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + header_bytes])
    for tensor in large:
        begin, end = header[tensor.name]["data_offsets"]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        del tensor.external_data[:]
        for key, value in (("location", weights_file), ("offset", 8 + header_bytes + begin), ("length", end - begin)):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)
    return model.SerializeToString(deterministic=True), weights


def join_weights(graph: bytes, weights: bytes, weights_file: str) -> ModelProto:
    """What `split_weights` took apart; never serialised whole, so that it may be larger than protobuf's 2 GiB."""
    model, arrays = onnx.load_model_from_string(graph), parse_weights(weights, weights_file)
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            tensor.ClearField("data_location")
            del tensor.external_data[:]
            tensor.raw_data = arrays[tensor.name].tobytes()
    return model


def check_graph(path: Path) -> None:
    """onnx.checker with shape inference over a graph file beside its weights; BadInputError says what it found."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BadInputError(
            f"{path.name}: onnx.checker refuses the graph: {one_line(error)}; no bundle was written"
        ) from error


def one_line(error: Exception) -> str:
    """The start of an error's text, for a message."""
    return " ".join(str(error).split())[:300]


def export_graphs(
    networks: dict[str, nn.Module], info: BundleInfo, opset: int, half_weights: bool = False
) -> dict[str, bytes]:
    """All graph and weight files of a bundle by name; `half_weights`: float16 for those that it holds exactly."""
    files: dict[str, bytes] = {}
    for graph in step_graphs(networks, info.image, info.latent):
        entry = info.graphs[graph.name]
        model = export_onnx(graph, [tensor.name for tensor in entry.outputs], opset)
        if half_weights:
            model = store_half(model, exact_in_half(model))
        files[entry.file], files[entry.weights] = split_weights(model, entry.weights)
    return files
