"""Step graphs as ONNX: torch's exporter, then weights moved into one safetensors file a network.

A graph file holds no weights: its initializers point into the safetensors file (ONNX external data, tensor names equal
initializer names), so standard tools can open the directory and graphs can share weights.
"""

import logging
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from ul_export.onnx_model import (
    FLOAT,
    exact_in_half,
    initializers,
    module_of,
    name_nodes,
    name_of,
    split_weights,
    store_half,
)
from ul_runtime.errors import ULError, one_line
from ul_runtime.manifest import BundleInfo, GraphName, ImageFormat, LatentFormat, dtype_of, interface
from ul_train.networks import SelfAttention
from ul_train.step_graphs import DecoderStep, Pixels, PriorStep

_LOG = logging.getLogger(__name__)

_TRANSPOSED = ".T"
_AGAIN = re.compile(r"~\d+$")  # another initializer of the same parameter, in another shape
_HALF = re.compile(r"(?P<weight>.+)\.half")
_INT8 = re.compile(r"(?P<weight>.+)/axis(?P<axis>\d)\.(?P<part>int8|scale)")


def parameters(module: nn.Module) -> dict[str, np.ndarray]:
    """Float32 arrays of a module's parameters and buffers by name."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: value.detach().cpu().float().numpy() for name, value in named}


def name_weights(model: ir.Model, module: nn.Module) -> None:
    """Rename the initializers that the exporter folded: `PARAMETER.T` is transposed, any other reshaped at most."""
    given, table = parameters(module), model.graph.initializers
    taken = set(table)
    for old, tensor in initializers(model).items():
        value = table.pop(old)  # and back again, so that all keep their order
        if tensor.dtype == FLOAT and old not in given:
            users = [module_of(name_of(node)) for node in value.consumers()]
            source = _source(tensor.numpy(), given, users)
            if source is not None:  # no constant
                value.name = source if source not in taken else f"{source}~{len(taken)}"
                taken.add(name_of(value))
        table.add(value)


def _source(array: np.ndarray, given: Mapping[str, np.ndarray], users: list[str]) -> str | None:
    """The parameter with these values, of a module that takes them if there is one."""
    for near in (True, False):
        for name, value in given.items():
            if near != any(name.startswith(f"{user}.") for user in users) or value.size != array.size:
                continue
            if value.ndim == 2 and value.T.shape == array.shape and np.array_equal(value.T, array):
                return name + _TRANSPOSED
            if np.array_equal(value.reshape(array.shape), array):
                return name
    return None


OPSETS = (18, 20, 22, 23)  # those that the tests verify
_ATTENTION = 23  # from here on it is one operator, which ONNX Runtime runs on GPUs without writing scores down


@dataclass(frozen=True)
class StepGraph:
    """One graph to export: a torch module, and example inputs by name with a batch (and branches) of two or more."""

    name: GraphName
    module: nn.Module
    inputs: dict[str, torch.Tensor]


def step_graphs(networks: dict[str, nn.Module], image: ImageFormat, latent: LatentFormat) -> list[StepGraph]:
    """The graphs of a bundle over `encoder`, `prior`, `decoder` and students, in evaluation mode."""
    modules: dict[GraphName, nn.Module] = {
        "encoder": networks["encoder"],
        "prior_step": PriorStep(networks["prior"]),
        "decoder_step": DecoderStep(networks["decoder"]),
        "pixels": Pixels(),
    }
    places = {name: name for name in modules}
    for name in [name for name in networks if name not in ("encoder", "prior", "decoder")]:
        places[name] = f"{name.partition('-')[0]}_step"
        modules[name] = type(modules[places[name]])(networks[name])
    dims = {"b": 3, "g": 2}
    graphs = []
    for name, module in modules.items():
        shapes = {
            key: [dims[d] if isinstance(d, str) else d for d in shape]
            for key, shape in interface(places[name], image, latent)[0].items()
        }
        inputs = {key: torch.zeros(shape, dtype=getattr(torch, dtype_of(key))) for key, shape in shapes.items()}
        graphs.append(StepGraph(name, module.eval(), inputs))
    return graphs


def export_onnx(graph: StepGraph, outputs: list[str], opset: int) -> ir.Model:
    """The graph with its weights inside, batch and branches dynamic (Dim names b, g). ULError if torch cannot."""
    for module in graph.module.modules():
        if isinstance(module, SelfAttention):
            module.one_operator = opset >= _ATTENTION
    return by_torch(graph, outputs, opset)


def by_torch(graph: StepGraph, outputs: list[str], opset: int) -> ir.Model:
    """What torch's exporter makes of a graph as it is, its nodes and weights named after modules and parameters."""
    dynamic = {
        name: {0: torch.export.Dim("b", min=1)}
        | ({1: torch.export.Dim("g", min=1)} if name in ("label", "weight") else {})
        for name in graph.inputs
    }
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
    name_nodes(program.model)
    name_weights(program.model, graph.module)
    return program.model


def export_graphs(
    networks: dict[str, nn.Module], info: BundleInfo, opset: int, half_weights: bool = False
) -> dict[str, bytes]:
    """All graph and weight files of a bundle by name; `half_weights`: float16 for those that it holds exactly."""
    files: dict[str, bytes] = {}
    for graph in step_graphs(networks, info.image, info.latent):
        _LOG.info(f"graph {graph.name}")
        entry = info.all_graphs[graph.name]
        model = export_onnx(graph, [tensor.name for tensor in entry.outputs], opset)
        if half_weights:
            model = store_half(model, exact_in_half(model))
        files[entry.file], files[entry.weights] = split_weights(model, entry.weights)
    return files
