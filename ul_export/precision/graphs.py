"""Graphs that are run before they are files."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from ul_export.onnx_model import copied, float_tensors, split_weights
from ul_runtime.backends import WrappedBackend
from ul_runtime.backends.ort_cpu import OrtCpuBackend
from ul_runtime.bundle import Bundle
from ul_runtime.manifest import BundleInfo, FileEntry, GraphName, Manifest
from ul_train.activations import LARGEST_FLOAT16


def in_memory(info: BundleInfo, models: Mapping[GraphName, ModelProto], threads: int | None = None) -> OrtCpuBackend:
    """ONNX Runtime over these graphs, weights inside them, which take the place of those that `info` describes."""
    files: dict[str, bytes] = {}
    for name, model in models.items():
        files[_file(name)], files[_weights(name)] = split_weights(copied(model), _weights(name))
    graphs = {
        name: graph.model_copy(update={"file": _file(name), "weights": _weights(name), "float32_file": None})
        for name, graph in info.graphs.items()
    }
    entries = {
        name: FileEntry(sha256="0" * 64, size=0) for graph in info.graphs for name in (_file(graph), _weights(graph))
    }
    manifest = Manifest.model_construct(**{**dict(info), "graphs": graphs, "files": entries})
    return OrtCpuBackend(Bundle(Path("memory"), manifest, "0" * 64, files), threads=threads)


def _file(graph: GraphName) -> str:
    return f"{graph}.onnx"


def _weights(graph: GraphName) -> str:
    return f"{graph}.safetensors"


@dataclass(frozen=True)
class NodeError:
    """Relative root-mean-square error of a node's result, and how much of it its inputs did not bring."""

    node: str
    error: float
    grown: float


def node_errors(
    exact: ModelProto, other: ModelProto, info: BundleInfo, graph: GraphName, inputs: Mapping[str, np.ndarray]
) -> list[NodeError]:
    """Nodes of `exact` in the order of what they add to the error of `other`, a graph of the same results by name.

    A result that is not finite on one side alone has an infinite error.
    """
    floats = float_tensors(exact)
    shared = {name for node in other.graph.node for name in node.output}
    names = [name for node in exact.graph.node for name in node.output if name in floats & shared]
    expected, given = (
        in_memory(info, {graph: exposed(model, names)}).run(graph, dict(inputs)) for model in (exact, other)
    )
    error = {name: _relative(expected[name], given[name]) for name in names}
    found = []
    for node in exact.graph.node:
        made = [error[name] for name in node.output if name in error]
        if made:
            brought = max((error.get(name, 0.0) for name in node.input), default=0.0)
            grown = max(made) - brought if np.isfinite(brought) else 0.0
            found.append(NodeError(node.name, max(made), grown))
    return sorted(found, key=lambda each: -each.grown)


def _relative(expected: np.ndarray, given: np.ndarray) -> float:
    if not np.isfinite(given).all():
        return np.inf
    scale = float(np.sqrt(np.square(expected, dtype=np.float64).mean()))
    gap = float(np.sqrt(np.square(expected.astype(np.float64) - given).mean()))
    return gap / scale if scale else gap


def exposed(model: ModelProto, names: Collection[str]) -> ModelProto:
    """A copy that gives these results too."""
    copy = copied(model)
    known = {each.name for each in copy.graph.output}
    copy.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names if name not in known
    )
    return copy


OUTPUT = "ranges"


def with_ranges(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """(a copy with one more output OUTPUT `n`, the n float32 tensors whose largest magnitude it holds)."""
    measured, floats = copied(model), float_tensors(model)
    graph = measured.graph
    made = [*(each.name for each in graph.input), *(name for node in graph.node for name in node.output)]
    names = [name for name in made if name in floats]
    one = numpy_helper.from_array(np.array([1], np.int64), "ranges/one")
    graph.initializer.append(one)
    for name in names:
        graph.node.append(helper.make_node("Abs", [name], [f"ranges/abs/{name}"]))
        graph.node.append(helper.make_node("ReduceMax", [f"ranges/abs/{name}"], [f"ranges/max/{name}"], keepdims=0))
        graph.node.append(helper.make_node("Reshape", [f"ranges/max/{name}", one.name], [f"ranges/one/{name}"]))
    graph.node.append(helper.make_node("Concat", [f"ranges/one/{name}" for name in names], [OUTPUT], axis=0))
    graph.output.append(helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [len(names)]))
    return measured, names


def weight_ranges(model: ModelProto) -> dict[str, float]:
    """The largest magnitude of every float32 weight."""
    weights = (each for each in model.graph.initializer if each.data_type == TensorProto.FLOAT)
    return {each.name: float(np.abs(numpy_helper.to_array(each)).max(initial=0.0)) for each in weights}


@dataclass
class RangeRecorder(WrappedBackend):
    """Keeps the largest magnitude of every tensor over all calls of a backend whose graphs are `with_ranges`.

    `names`: the tensors in the order of each graph's OUTPUT; `largest`: starts with those of the weights.
    """

    names: Mapping[GraphName, list[str]]
    largest: dict[GraphName, dict[str, float]] = field(default_factory=dict)

    def run(self, graph_name: GraphName, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run, keep the ranges, and pass the other outputs on."""
        outputs = self.backend.run(graph_name, inputs)
        known = self.largest.setdefault(graph_name, {})
        for name, value in zip(self.names[graph_name], outputs.pop(OUTPUT).tolist(), strict=True):
            known[name] = max(known.get(name, 0.0), value)
        return outputs


def headroom_bits(largest: float) -> float:
    """log2(65504 / largest): how often a magnitude can double before float16 overflows; infinite for 0."""
    return math.log2(LARGEST_FLOAT16 / largest) if largest else math.inf
