"""The largest magnitude of every tensor along the real sampling path: what half precision must be able to hold."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from ul_export.precision.tensors import copied, float_tensors
from ul_runtime.backends import InFront
from ul_runtime.manifest import GraphName
from ul_train.activations import LARGEST_FLOAT16

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
class RangeRecorder(InFront):
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
