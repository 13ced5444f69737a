"""Graphs and their tensors: a copy, other nodes, which tensors are float32, and weights in half precision."""

import ast
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from safetensors.numpy import save

from ul_runtime.bundle import parse_weights
from ul_runtime.errors import BadInputError, ULError

_SCOPES = "pkg.torch.onnx.name_scopes"  # torch's note on a node: its modules from the outside in, then the operation


def name_nodes(model: ModelProto) -> None:
    """`network.middle.blocks.0.mlp.0/MatMul`; a second one of a kind in a module ends in `_2`."""
    seen: Counter[str] = Counter()
    for node in model.graph.node:
        name = f"{_path(node)}/{node.op_type}"
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"


def module_of(node_name: str) -> str:
    """Path of the module in a node's name; empty for the graph itself."""
    return node_name.rpartition("/")[0]


def _path(node: NodeProto) -> str:
    notes = {entry.key: entry.value for entry in node.metadata_props}
    scopes = ast.literal_eval(notes.get(_SCOPES, "['']"))
    path = scopes[-2] if len(scopes) > 1 else ""
    return "" if path.startswith("_empty_nn_module_stack") else str(path)


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


_INLINE_BYTES = 256  # smaller initializers (shapes, scalars) stay in the graph


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
