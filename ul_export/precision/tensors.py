"""Graphs and their tensors: a copy, other nodes, which tensors are float32, and weights in half precision."""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ul_runtime.errors import ULError


def copied(model: ModelProto) -> ModelProto:
    """A copy, to be changed."""
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def set_nodes(model: ModelProto, nodes: Sequence[NodeProto]) -> None:
    """Its nodes become these; what it noted down of the results of others goes."""
    kept = list(nodes)
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(kept)


def tensor_types(model: ModelProto) -> dict[str, int]:
    """Element types (onnx.TensorProto) of inputs, weights and results of nodes by name, by ONNX's own inference.

    ULError: it does not know what a node makes.
    """
    graph = model.graph
    kinds = {each.name: each.data_type for each in graph.initializer}
    weights = (helper.make_tensor_value_info(each.name, each.data_type, each.dims) for each in graph.initializer)
    bare = helper.make_model(  # without the weights, which may be more than protobuf's 2 GiB
        helper.make_graph([*map(_inferable, graph.node)], "types", [*graph.input, *weights], list(graph.output)),
        opset_imports=list(model.opset_import),
        functions=list(model.functions),
    )
    inferred = onnx.shape_inference.infer_shapes(bare).graph
    for info in (*inferred.input, *inferred.output, *inferred.value_info):
        kinds[info.name] = info.type.tensor_type.elem_type
    for node in graph.node:
        for name in node.output:
            if name and not kinds.get(name):
                raise ULError(f"{node.name}: the type of its result {name} is not known; update onnx")
    return kinds


def _inferable(node: NodeProto) -> NodeProto:
    """The node, or one that makes the same types and shapes where ONNX infers nothing (1.23: group norms)."""
    if node.op_type == "GroupNormalization":
        return helper.make_node("Identity", node.input[:1], node.output, name=node.name)
    return node


def float_tensors(model: ModelProto) -> set[str]:
    """Names of the float32 inputs, weights and results of nodes. ULError: it is not known what a node makes."""
    return {name for name, kind in tensor_types(model).items() if kind == TensorProto.FLOAT}


def stored_name(weight: str) -> str:
    """What a weight that is stored in half precision is called, in every graph that takes it."""
    return f"{weight}.half"


def half_tensor(tensor: TensorProto, kind: int) -> TensorProto:
    """A float32 weight as the nearest value of half precision (what is too large becomes infinite)."""
    with np.errstate(over="ignore"):
        values = numpy_helper.to_array(tensor).astype(helper.tensor_dtype_to_np_dtype(kind))
    return numpy_helper.from_array(values, tensor.name)
