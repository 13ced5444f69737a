"""Graphs that are run before they are files."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ul_export.onnx_model import FLOAT, initializers, name_of, split_weights
from ul_runtime.backends import WrappedBackend
from ul_runtime.backends.ort_cpu import OrtCpuBackend
from ul_runtime.bundle import Bundle
from ul_runtime.manifest import BundleInfo, FileEntry, GraphName, Manifest
from ul_train.activations import LARGEST_FLOAT16


def in_memory(info: BundleInfo, models: Mapping[GraphName, ir.Model], threads: int | None = None) -> OrtCpuBackend:
    """ONNX Runtime over these graphs, weights inside them, which take the place of those that `info` describes."""
    files: dict[str, bytes] = {}
    for name, model in models.items():
        files[_file(name)], files[_weights(name)] = split_weights(model, _weights(name))
    graphs = {
        name: graph.model_copy(update={"file": _file(name), "weights": _weights(name), "float32_file": None})
        for name, graph in info.all_graphs.items()
    }
    entries = {name: FileEntry(sha256="0" * 64, size=0) for graph in graphs for name in (_file(graph), _weights(graph))}
    manifest = Manifest.model_construct(**{**dict(info.with_graphs(graphs)), "files": entries})
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
    exact: ir.Model, other: ir.Model, info: BundleInfo, graph: GraphName, inputs: Mapping[str, np.ndarray]
) -> list[NodeError]:
    """Nodes of `exact` in the order of what they add to the error of `other`, a graph of the same results by name.

    A result that is not finite on one side alone has an infinite error.
    """
    shared = {value.name for node in other.graph for value in node.outputs}
    made = [value for node in exact.graph for value in node.outputs]
    names = [name_of(value) for value in made if value.dtype == FLOAT and value.name in shared]
    expected, given = (
        in_memory(info, {graph: exposed(model, names)}).run(graph, dict(inputs)) for model in (exact, other)
    )
    error = {name: _relative(expected[name], given[name]) for name in names}
    found = []
    for node in exact.graph:
        of_node = [error[name_of(value)] for value in node.outputs if value.name in error]
        if of_node:
            brought = max((error.get(value.name or "", 0.0) for value in node.inputs if value is not None), default=0.0)
            grown = max(of_node) - brought if np.isfinite(brought) else 0.0
            found.append(NodeError(name_of(node), max(of_node), grown))
    return sorted(found, key=lambda each: -each.grown)


def _relative(expected: np.ndarray, given: np.ndarray) -> float:
    if not np.isfinite(given).all():
        return np.inf
    scale = float(np.sqrt(np.square(expected, dtype=np.float64).mean()))
    gap = float(np.sqrt(np.square(expected.astype(np.float64) - given).mean()))
    return gap / scale if scale else gap


def exposed(model: ir.Model, names: Collection[str]) -> ir.Model:
    """A copy that gives these results too."""
    copy = model.clone()
    values = ir.convenience.create_value_mapping(copy.graph)
    copy.graph.outputs.extend(value for name in names if not (value := values[name]).is_graph_output())
    return copy


OUTPUT = "ranges"


def with_ranges(model: ir.Model) -> tuple[ir.Model, list[str]]:
    """(a copy with one more output OUTPUT `n`, the n float32 tensors whose largest magnitude it holds)."""
    copy = model.clone()
    made = [*copy.graph.inputs, *(value for node in copy.graph for value in node.outputs)]
    floats = [value for value in made if value.dtype == FLOAT]
    tape = ir.tape.Tape(copy.graph)
    one = tape.initializer(ir.Tensor(np.array([1], np.int64)), f"{OUTPUT}/one")
    largest = []
    for value in floats:
        magnitude = tape.op("ReduceMax", [tape.op("Abs", [value])], {"keepdims": 0})
        largest.append(tape.op("Reshape", [magnitude, one]))
    ranges = ir.Value(name=OUTPUT, shape=ir.Shape([len(floats)]), type=ir.TensorType(FLOAT))
    tape.op("Concat", largest, {"axis": 0}, output=ranges)
    copy.graph.outputs.append(ranges)
    return copy, [name_of(value) for value in floats]


def weight_ranges(model: ir.Model) -> dict[str, float]:
    """The largest magnitude of every float32 weight."""
    floats = {name: tensor.numpy() for name, tensor in initializers(model).items() if tensor.dtype == FLOAT}
    return {name: float(np.abs(array).max(initial=0.0)) for name, array in floats.items()}


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
