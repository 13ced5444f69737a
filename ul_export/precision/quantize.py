"""A float32 graph with products and convolutions in int8: QuantizeLinear and DequantizeLinear around what they take.

Symmetric, as TensorRT wants it: weights by output channel, activations by the largest magnitude of the calibration, one
scale for all images, so that an image does not depend on the others in its batch.
"""

from collections.abc import Mapping

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ul_export.precision.lower import by_design
from ul_export.precision.tensors import copied, set_nodes

LARGEST_INT8 = 127
_TINY = float(np.finfo(np.float32).tiny)  # scale of what is zero throughout


def quantisable(model: ModelProto) -> set[str]:
    """Names of the products and convolutions of activations with weights, but for those in float32 by design."""
    weights = {each.name for each in model.graph.initializer if each.data_type == TensorProto.FLOAT}
    fixed = by_design(model)
    return {
        node.name
        for node in model.graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul")
        and node.name not in fixed
        and node.input[1] in weights
        and node.input[0] not in weights
    }


def quantised(model: ModelProto, nodes: set[str], largest: Mapping[str, float]) -> ModelProto:
    """A copy in which `nodes` take int8: activations by their `largest` magnitude, weights by output channel."""
    copy = quantised_weights(model, nodes)
    made: list[NodeProto] = []
    known: set[str] = set()
    for node in copy.graph.node:
        if node.name in nodes:
            name = node.input[0]
            if name not in known:
                known.add(name)
                scale = max(largest[name], _TINY) / LARGEST_INT8
                copy.graph.initializer.extend(
                    [
                        numpy_helper.from_array(np.array(scale, np.float32), f"{name}/scale"),
                        numpy_helper.from_array(np.array(0, np.int8), f"{name}/zero"),
                    ]
                )
                how = [f"{name}/scale", f"{name}/zero"]
                quantise = helper.make_node("QuantizeLinear", [name, *how], [f"{name}/int8"], f"{name}/Quantize")
                back = helper.make_node(
                    "DequantizeLinear", [f"{name}/int8", *how], [f"{name}/back"], f"{name}/Dequantize"
                )
                made += [quantise, back]
            node.input[0] = f"{name}/back"
        made.append(node)
    set_nodes(copy, made)
    return copy


def quantised_weights(model: ModelProto, nodes: set[str]) -> ModelProto:
    """A copy in which the weights of `nodes` alone are int8; it computes in float32."""
    copy = copied(model)
    arrays = {each.name: each for each in copy.graph.initializer}
    made: list[NodeProto] = []
    taken: set[str] = set()
    for node in copy.graph.node:
        if node.name in nodes:
            name, axis = node.input[1], _output_axis(node)
            back = f"{name}/axis{axis}"
            if back not in taken:
                values, scale = by_channel(numpy_helper.to_array(arrays[name]), axis)
                copy.graph.initializer.extend(
                    [numpy_helper.from_array(values, f"{back}.int8"), numpy_helper.from_array(scale, f"{back}.scale")]
                )
                given = [f"{back}.int8", f"{back}.scale"]
                made.append(helper.make_node("DequantizeLinear", given, [back], f"{back}/Dequantize", axis=axis))
                taken.add(back)
            node.input[1] = back
        made.append(node)
    set_nodes(copy, made)
    used = {name for node in copy.graph.node for name in node.input}
    kept = [each for each in copy.graph.initializer if each.name in used]
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(kept)
    return copy


def by_channel(weight: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """(int8 values, float32 scales): weight ~ values * scale along `axis`, by the largest magnitude of each channel."""
    others = tuple(each for each in range(weight.ndim) if each != axis)
    scale = np.maximum(np.abs(weight).max(axis=others), _TINY) / LARGEST_INT8
    shape = [-1 if each == axis else 1 for each in range(weight.ndim)]
    values = np.rint(weight / scale.reshape(shape)).clip(-LARGEST_INT8, LARGEST_INT8)
    return values.astype(np.int8), scale.astype(np.float32)


def _output_axis(node: NodeProto) -> int:
    """Of the weight: the axis of the channels that a node makes."""
    if node.op_type == "Conv":
        return 0
    transposed = any(each.name == "transB" and each.i for each in node.attribute)
    return 0 if node.op_type == "Gemm" and transposed else 1
