"""A float32 graph as a typed graph of half precision: nodes compute in it, islands stay in float32, casts in between.

TensorRT from 11 on knows no other way to say a precision, and every other runtime takes it too. Inputs and outputs stay
float32, so that bundles of any precision are interchangeable.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Literal

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ul_export.onnx_model import copied, float_tensors, half_tensor, module_of, set_nodes, stored_name, tensor_types
from ul_train.activations import CONDITIONING, RESULT

HALF = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
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


def by_design(model: ModelProto) -> dict[str, str]:
    """Nodes that stay in float32 in every graph, and why: statistics, conditioning, the result, all around the network.

    With conditioning and result in float16 too, the error of a prior step of garments-32 is 1.7 to 2.6 times as large.
    """
    wrapped = any(module_of(node.name).split(".")[0] == NETWORK for node in model.graph.node)
    reasons = {}
    for node in model.graph.node:
        path = module_of(node.name).split(".")
        if node.op_type in STATISTICS:
            reasons[node.name] = f"{node.op_type} needs its range"
        elif wrapped and path[0] != NETWORK:
            reasons[node.name] = "guidance and the sampler's update"
        elif CONDITIONING.intersection(path):
            reasons[node.name] = "conditioning on noise level and label"
        elif path == [NETWORK, RESULT] or path == [RESULT]:
            reasons[node.name] = "result of the network"
    return reasons


def half_nodes(model: ModelProto, pinned: Collection[str]) -> set[str]:
    """Names of the nodes that compute in half precision: all that make float32, with these exceptions.

    Nodes `by_design` and `pinned`; movements of float32 values; sums and products that take float32 from a node and
    give it to float32 alone.
    """
    floats, fixed = float_tensors(model), {*by_design(model), *pinned}
    weights = {each.name for each in model.graph.initializer}
    outputs = {each.name for each in model.graph.output}
    half: set[str] = set()
    made_half: set[str] = set()
    for node in model.graph.node:
        given = [name for name in node.input if name in floats and name not in weights]
        follows = node.op_type in MOVEMENT and not (given and all(name in made_half for name in given))
        if node.name in fixed or node.op_type == "Cast" or follows or not any(name in floats for name in node.output):
            continue
        if not given and not any(name in floats for name in node.input):
            continue  # made of shapes
        half.add(node.name)
        made_half.update(name for name in node.output if name in floats)
    users = _users(model)
    for node in reversed(model.graph.node):
        if node.name not in half or node.op_type not in ELEMENTWISE:
            continue
        from_float = any(name in floats and name not in weights and name not in made_half for name in node.input)
        taken = [user.name for name in node.output for user in users[name]]
        if from_float and not any(name in half for name in taken) and (taken or outputs.intersection(node.output)):
            half.discard(node.name)
            made_half.difference_update(node.output)
    return half


def _users(model: ModelProto) -> dict[str, list[NodeProto]]:
    users: dict[str, list[NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            users[name].append(node)
    return users


def lower(model: ModelProto, kind: str, half: set[str]) -> ModelProto:
    """A copy in which the nodes `half` compute in `kind` (a key of HALF), with casts where precisions meet."""
    return _Lowering(model, kind, half).result()


class _Lowering:
    def __init__(self, model: ModelProto, kind: str, half: set[str]) -> None:
        self.model, self.type, self.half = copied(model), HALF[kind], half
        self.floats = float_tensors(model)
        self.made_half: set[str] = set()
        self.stored: dict[str, str] = {}  # weights of half nodes alone, by their new names
        self.nodes: list[NodeProto] = []
        self.cast: set[str] = set()

    def result(self) -> ModelProto:
        """The lowered graph."""
        graph = self.model.graph
        self._weights()
        for node in graph.node:
            self._inputs(node)
            self.nodes.append(node)
            if node.name in self.half:
                self.made_half.update(name for name in node.output if name in self.floats)
        for output in graph.output:
            if output.name in self.made_half:
                self._output(output.name)
        set_nodes(self.model, self.nodes)
        return self.model

    def _weights(self) -> None:
        """Weights that only half nodes take are stored in half precision."""
        users = _users(self.model)
        for tensor in self.model.graph.initializer:
            takers = [user.name for user in users[tensor.name]]
            if tensor.name in self.floats and takers and self.half.issuperset(takers):
                self.stored[tensor.name] = stored_name(tensor.name)
                tensor.CopyFrom(half_tensor(tensor, self.type))
                tensor.name = stored_name(tensor.name)

    def _inputs(self, node: NodeProto) -> None:
        wants_half = node.name in self.half
        for at, name in enumerate(node.input):
            if name in self.stored:
                node.input[at] = self.stored[name]
            elif name in self.floats and (name in self.made_half) != wants_half:
                node.input[at] = self._as(name, wants_half)

    def _as(self, name: str, half: bool) -> str:
        """The value in the other precision, cast once however many nodes take it."""
        other = f"{name}/{'half' if half else 'float'}"
        if other not in self.cast:
            self.cast.add(other)
            to = self.type if half else TensorProto.FLOAT
            self.nodes.append(helper.make_node("Cast", [name], [other], name=f"{other}/Cast", to=to))
        return other

    def _output(self, name: str) -> None:
        """A result of half precision leaves the graph in float32."""
        inner = f"{name}/inner"
        for node in self.nodes:
            for names in (node.input, node.output):
                for at, each in enumerate(names):
                    if each == name:
                        names[at] = inner
        self.nodes.append(helper.make_node("Cast", [inner], [name], name=f"{name}/Cast", to=TensorProto.FLOAT))
        self.made_half.discard(name)


def emulated(lowered: ModelProto) -> ModelProto:
    """A copy that computes in float32 and rounds wherever the graph holds half precision, overflow included.

    What a processor with such arithmetic does that accumulates in float32. ONNX Runtime's own CPU kernels do not show
    it: they run a typed graph in float32 and leave the rounding out, so that what overflows on a GPU passes there.
    """
    model = copied(lowered)
    graph, halves = model.graph, set(HALF.values())
    kinds = tensor_types(lowered)
    for tensor in graph.initializer:
        if tensor.data_type in halves:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    nodes: list[NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        to = next((each.i for each in node.attribute if each.name == "to"), None)
        if node.op_type == "Cast" and to in halves:
            rounded = f"{node.output[0]}/rounded"
            nodes.append(helper.make_node("Cast", [rounded], [node.output[0]], to=TensorProto.FLOAT))
            node.output[0] = rounded
        elif node.op_type not in MOVEMENT:
            for at, name in enumerate(node.output):
                if kinds.get(name) in halves:
                    exact, rounded = f"{name}/exact", f"{name}/rounded"
                    node.output[at] = exact
                    nodes.append(helper.make_node("Cast", [exact], [rounded], to=kinds[name]))
                    nodes.append(helper.make_node("Cast", [rounded], [name], to=TensorProto.FLOAT))
    set_nodes(model, nodes)
    return model


_FLOAT = TensorProto.FLOAT


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


Kind = Literal["fp16", "bf16", "int8"]
KINDS: tuple[Kind, ...] = ("fp16", "bf16", "int8")


def candidates(model: ModelProto, kind: Kind, pinned: Collection[str]) -> set[str]:
    """Names of the nodes that compute in `kind` where `pinned` ones may not."""
    return quantisable(model) - set(pinned) if kind == "int8" else half_nodes(model, pinned)


def typed(model: ModelProto, kind: Kind, nodes: set[str], largest: Mapping[str, float]) -> ModelProto:
    """A copy in which `nodes` compute in `kind`; `largest`: magnitudes of the calibration, for int8."""
    return quantised(model, nodes, largest) if kind == "int8" else lower(model, kind, nodes)


def as_computed(graph: ModelProto, kind: Kind) -> ModelProto:
    """A typed graph as ONNX Runtime's CPU can run it with all its rounding: int8 as it is, half precision emulated."""
    return graph if kind == "int8" else emulated(graph)


def in_float32(model: ModelProto, kind: Kind, nodes: set[str], graph: ModelProto) -> ModelProto:
    """The same weights as the typed `graph` of `model`, all computed in float32."""
    if kind == "int8":
        return quantised_weights(model, nodes)
    copy = copied(model)
    stored = {tensor.name for tensor in graph.graph.initializer}
    halved = {tensor.name for tensor in copy.graph.initializer if stored_name(tensor.name) in stored}
    return store_half(copy, halved, HALF[kind])
