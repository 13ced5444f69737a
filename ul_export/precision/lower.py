"""A float32 graph as a typed graph of a lower precision, and what there is to say of each: fp16, bf16, int8.

In half precision nodes compute in it, islands stay in float32, casts in between. TensorRT from 11 on knows no other way
to say a precision, and every other runtime takes it too. Inputs and outputs stay float32, so that bundles of any
precision are interchangeable.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ul_export.onnx_model import (
    FLOAT,
    cast,
    halve_initializers,
    initializers,
    module_of,
    name_of,
    new_value,
    retype,
    store_half,
)
from ul_export.verify import Tolerance, Tolerances
from ul_train.activations import CONDITIONING, LARGEST_FLOAT16, RESULT

HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
# Sums and quotients over many values, and waves of large angles: short of digits or of range in half precision.
STATISTICS = {
    "Cos",
    "Exp",
    "GroupNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "Log",
    "Pow",
    "ReduceMean",
    "ReduceSum",
    "Reciprocal",
    "RMSNormalization",
    "Sin",
    "Softmax",
    "Sqrt",
}
# Values go through unchanged: these take the precision of what they are given.
MOVEMENT = {
    "Concat",
    "DepthToSpace",
    "Expand",
    "Flatten",
    "Gather",
    "Identity",
    "Reshape",
    "Slice",
    "SpaceToDepth",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
    "Where",
}
ELEMENTWISE = {"Add", "Div", "Mul", "Sub"}
NETWORK = "network"  # the network's module in the step graphs


def by_design(model: ir.Model) -> dict[str, str]:
    """Nodes that stay in float32 in every graph, and why: statistics, conditioning, the result, all around the network.

    With conditioning and result in float16 too, the error of a prior step of garments-32 is 1.7 to 2.6 times as large.
    """
    names = [name_of(node) for node in model.graph]
    wrapped = any(module_of(name).split(".")[0] == NETWORK for name in names)
    reasons = {}
    for name, node in zip(names, model.graph, strict=True):
        path = module_of(name).split(".")
        if node.op_type in STATISTICS:
            reasons[name] = f"{node.op_type} needs its range"
        elif wrapped and path[0] != NETWORK:
            reasons[name] = "guidance and the sampler's update"
        elif CONDITIONING.intersection(path):
            reasons[name] = "conditioning on noise level and label"
        elif path == [NETWORK, RESULT] or path == [RESULT]:
            reasons[name] = "result of the network"
    return reasons


def half_nodes(model: ir.Model, pinned: Collection[str]) -> set[str]:
    """Names of the nodes that compute in half precision: all that make float32, with these exceptions.

    Nodes `by_design` and `pinned`; movements of float32 values; sums and products that take float32 from a node and
    give it to float32 alone.
    """
    fixed = {*by_design(model), *pinned}
    half: set[str] = set()

    def in_float32(value: ir.Value) -> bool:
        producer = value.producer()
        return value.dtype == FLOAT and not value.is_initializer() and (producer is None or producer.name not in half)

    for node in model.graph:
        floats = [value for value in node.inputs if value is not None and value.dtype == FLOAT]
        if name_of(node) in fixed or node.op_type == "Cast" or not floats or not _makes_float(node):
            continue
        given = [value for value in floats if not value.is_initializer()]
        if node.op_type not in MOVEMENT or (given and not any(map(in_float32, given))):
            half.add(name_of(node))
    for node in reversed(model.graph):
        if node.name not in half or node.op_type not in ELEMENTWISE:
            continue
        from_float = any(in_float32(value) for value in node.inputs if value is not None)
        users = [user.name for value in node.outputs for user in value.consumers()]
        taken = users or any(value.is_graph_output() for value in node.outputs)
        if from_float and taken and half.isdisjoint(users):
            half.discard(name_of(node))
    return half


def _makes_float(node: ir.Node) -> bool:
    return any(value.dtype == FLOAT for value in node.outputs)


def _weights_of(model: ir.Model, nodes: Collection[str]) -> set[str]:
    """Names of the float32 weights that only these nodes take."""
    found = set()
    for name, value in model.graph.initializers.items():
        users = [user.name for user in value.consumers()]
        if value.dtype == FLOAT and users and all(user in nodes for user in users):
            found.add(name)
    return found


def lower(model: ir.Model, dtype: ir.DataType, half: set[str]) -> ir.Model:
    """A copy in which the nodes `half` compute in `dtype`, with casts where precisions meet.

    Weights that only they take are stored in it.
    """
    copy = model.clone()
    graph = copy.graph
    halve_initializers(copy, _weights_of(copy, half), dtype)
    casts: dict[ir.Value, ir.Value] = {}  # once, however many nodes take a value in its other precision
    for node in graph:
        wanted = dtype if node.name in half else FLOAT
        for at, value in enumerate(node.inputs):
            if value is None or value.dtype not in (FLOAT, dtype) or value.dtype == wanted:
                continue
            if value not in casts:
                name = f"{value.name}/{'float' if wanted == FLOAT else 'half'}"
                casts[value] = new_value(name, value, wanted)
                graph.insert_before(node, cast(value, casts[value], f"{name}/Cast"))
            node.replace_input_with(at, casts[value])
        for value in node.outputs if wanted == dtype else ():
            if value.dtype == FLOAT:
                retype(value, dtype)
    for at, value in enumerate(graph.outputs):  # which leave the graph in float32
        if value.dtype == dtype:
            graph.outputs[at] = new_value(name_of(value), value, FLOAT)
            value.name = f"{value.name}/inner"
            graph.append(cast(value, graph.outputs[at], f"{graph.outputs[at].name}/Cast"))
    return copy


def emulated(lowered: ir.Model) -> ir.Model:
    """A copy that computes in float32 and rounds wherever the graph holds half precision, overflow included.

    What hardware with such arithmetic does that accumulates in float32. ONNX Runtime's own CPU kernels do not show
    it: they run a typed graph in float32 and leave the rounding out, so that what overflows on a GPU passes there.
    """
    copy = lowered.clone()
    for value in copy.graph.initializers.values():
        if value.dtype in HALF and value.const_value is not None:
            value.const_value = ir.Tensor(value.const_value.numpy().astype(np.float32))
            retype(value, FLOAT)
    for node in list(copy.graph):
        for value in node.outputs:
            if (dtype := value.dtype) not in HALF:
                continue
            if node.op_type != "Cast":
                retype(value, FLOAT)
            if node.op_type not in MOVEMENT:
                _round(copy.graph, node, value, dtype)
    return copy


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value, dtype: ir.DataType) -> None:
    """All that take a value of the node take what is left of it in `dtype`, which has its name from now on."""
    name = name_of(value)
    back = new_value(name, value, FLOAT)
    value.replace_all_uses_with(back)
    nodes = []
    if value.dtype == FLOAT:
        value.name, exact, value = f"{name}/exact", value, new_value(f"{name}/rounded", value, dtype)
        nodes.append(cast(exact, value, f"{name}/exact/Cast"))
    else:
        value.name = f"{name}/rounded"
    graph.insert_after(node, [*nodes, cast(value, back, f"{name}/rounded/Cast")])


LARGEST_INT8 = 127
_TINY = float(np.finfo(np.float32).tiny)  # scale of what is zero throughout


def quantisable(model: ir.Model, pinned: Collection[str] = ()) -> set[str]:
    """Names of the products and convolutions of activations with weights, but for those in float32 by design."""
    fixed = {*by_design(model), *pinned}
    found = set()
    for node in model.graph:
        if node.op_type in ("Conv", "Gemm", "MatMul") and name_of(node) not in fixed:
            given, weight = (_value(value) for value in node.inputs[:2])
            if weight.is_initializer() and weight.dtype == FLOAT and not given.is_initializer():
                found.add(name_of(node))
    return found


def _value(value: ir.Value | None) -> ir.Value:
    """An input that a node has to have."""
    assert value is not None
    return value


def quantised(model: ir.Model, nodes: set[str], largest: Mapping[str, float]) -> ir.Model:
    """A copy in which `nodes` take int8: activations by their `largest` magnitude, weights by output channel."""
    copy = quantised_weights(model, nodes)
    graph = copy.graph
    known: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        if node.name not in nodes:
            continue
        value = _value(node.inputs[0])
        if value not in known:
            name = name_of(value)
            scale = np.array(max(largest[name], _TINY) / LARGEST_INT8, np.float32)
            how = [_add(graph, f"{name}/scale", scale), _add(graph, f"{name}/zero", np.array(0, np.int8))]
            small = new_value(f"{name}/int8", value, ir.DataType.INT8)
            known[value] = new_value(f"{name}/back", value, FLOAT)
            quantise = ir.Node("", "QuantizeLinear", [value, *how], outputs=[small], name=f"{name}/Quantize")
            back = ir.Node("", "DequantizeLinear", [small, *how], outputs=[known[value]], name=f"{name}/Dequantize")
            graph.insert_before(node, [quantise, back])
        node.replace_input_with(0, known[value])
    return copy


def quantised_weights(model: ir.Model, nodes: set[str]) -> ir.Model:
    """A copy in which the weights of `nodes` alone are int8; it computes in float32."""
    copy = model.clone()
    graph, arrays = copy.graph, initializers(copy)
    known: dict[str, ir.Value] = {}
    for node in list(graph):
        if node.name not in nodes:
            continue
        weight, axis = _value(node.inputs[1]), _output_axis(node)
        name = f"{weight.name}/axis{axis}"
        if name not in known:
            values, scale = by_channel(arrays[name_of(weight)].numpy(), axis)
            given = [_add(graph, f"{name}.int8", values), _add(graph, f"{name}.scale", scale)]
            known[name] = new_value(name, weight, FLOAT)
            attributes = [ir.AttrInt64("axis", axis)]
            graph.insert_before(
                node,
                ir.Node("", "DequantizeLinear", given, attributes, outputs=[known[name]], name=f"{name}/Dequantize"),
            )
        node.replace_input_with(1, known[name])
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
    return copy


def _add(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """One more initializer."""
    tensor = ir.Tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.initializers.add(value)
    return value


def by_channel(weight: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """(int8 values, float32 scales): weight ~ values * scale along `axis`, by the largest magnitude of each channel."""
    others = tuple(each for each in range(weight.ndim) if each != axis)
    scale = np.maximum(np.abs(weight).max(axis=others), _TINY) / LARGEST_INT8
    shape = [-1 if each == axis else 1 for each in range(weight.ndim)]
    values = np.rint(weight / scale.reshape(shape)).clip(-LARGEST_INT8, LARGEST_INT8)
    return values.astype(np.int8), scale.astype(np.float32)


def _output_axis(node: ir.Node) -> int:
    """Of the weight: the axis of the channels that a node makes."""
    if node.op_type == "Conv":
        return 0
    return 0 if node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int() else 1


@dataclass(frozen=True)
class Precision:
    """What networks compute in wherever that holds.

    `nodes`: names of those that can, where `pinned` ones may not. `lowered`: a copy in which they do; by the largest
    magnitudes of the calibration. `as_computed`: a lowered graph as ONNX Runtime's CPU runs it with all its rounding.
    `in_float32`: the same weights as a graph in which these nodes are lowered, all computed in float32.
    """

    name: str
    tolerances: Tolerances  # against float32
    nodes: Callable[[ir.Model, Collection[str]], set[str]]
    lowered: Callable[[ir.Model, set[str], Mapping[str, float]], ir.Model]
    as_computed: Callable[[ir.Model], ir.Model]
    in_float32: Callable[[ir.Model, set[str]], ir.Model]
    rounding: str  # in words
    rest: str  # why a node that nobody pinned stays in float32
    least_opset: int = 18
    largest: float | None = None  # above, a magnitude overflows, and pins are looked for
    on_cpu: bool = False  # whether ONNX Runtime computes in it there


def _half(name: str, dtype: ir.DataType, tolerances: Tolerances, long_name: str, **more: Any) -> Precision:
    return Precision(
        name,
        tolerances,
        nodes=half_nodes,
        lowered=lambda model, nodes, largest: lower(model, dtype, nodes),
        as_computed=emulated,
        in_float32=lambda model, nodes: store_half(model, _weights_of(model, nodes), dtype),
        rounding=f"Rounded to {long_name} after every operation, sums in float32.",
        rest="moves float32, or stands between float32 nodes",
        **more,
    )


# Half precision has steps of 2^-11 and 2^-8, int8 scales that the path has shown.
FP16 = _half(
    "fp16",
    ir.DataType.FLOAT16,
    Tolerances(Tolerance(absolute=2.5e-3, relative=1e-3), None, least_psnr_db=35.0),
    "float16",
    largest=LARGEST_FLOAT16,
)
BF16 = _half(
    "bf16",
    ir.DataType.BFLOAT16,
    Tolerances(Tolerance(absolute=0.02, relative=0.01), None, least_psnr_db=35.0),
    "bfloat16",
    least_opset=22,  # from which on convolutions take it
)
INT8 = Precision(
    "int8",
    Tolerances(Tolerance(absolute=0.1, relative=0.05), None, least_psnr_db=35.0, off_path=False),
    nodes=quantisable,
    lowered=quantised,
    as_computed=lambda model: model,
    in_float32=quantised_weights,
    rounding="Products and convolutions with weights take int8: activations by one scale, from the largest magnitude "
    "that the sampling path showed, weights by output channel. All else is float32.",
    rest="no product with weights",
    on_cpu=True,
)
PRECISIONS = {precision.name: precision for precision in (FP16, BF16, INT8)}
