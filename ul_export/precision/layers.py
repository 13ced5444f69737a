"""Where two versions of a graph part: the error of every node, on inputs of the real path."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, TensorProto, helper

from ul_export.precision.memory import in_memory
from ul_export.precision.tensors import copied, float_tensors
from ul_runtime.manifest import BundleInfo, GraphName


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
