"""Graphs as models of onnx-ir, whose values know their types and users; and their weights in one safetensors file."""

import ast
import json
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import ModelProto
from safetensors.numpy import save

from ul_runtime.bundle import parse_weights
from ul_runtime.errors import BadInputError, ULError, one_line

FLOAT = ir.DataType.FLOAT
_SCOPES = "pkg.torch.onnx.name_scopes"  # torch's note on a node: its modules from the outside in, then the operation
_INLINE_BYTES = 256  # smaller initializers (shapes, scalars) stay in the graph


def name_nodes(model: ir.Model) -> None:
    """`network.middle.blocks.0.mlp.0/MatMul`; a second one of a kind in a module ends in `_2`."""
    seen: Counter[str] = Counter()
    for node in model.graph:
        name = f"{_path(node)}/{node.op_type}"
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"


def _path(node: ir.Node) -> str:
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "['']"))
    path = scopes[-2] if len(scopes) > 1 else ""
    return "" if path.startswith("_empty_nn_module_stack") else str(path)


def module_of(node_name: str) -> str:
    """Path of the module in a node's name; empty for the graph itself."""
    return node_name.rpartition("/")[0]


def name_of(part: ir.Node | ir.Value) -> str:
    """Its name. ValueError: it has none."""
    if not part.name:
        raise ValueError(f"{part} has no name")
    return part.name


def initializers(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """Weights and constants by name."""
    return {name: tensor for name, each in model.graph.initializers.items() if (tensor := each.const_value) is not None}


def typed_model(graph: ModelProto) -> ir.Model:
    """The graph, in which every value has its element type, by ONNX's own inference.

    ULError: it does not know what a node makes.
    """
    inferable = ModelProto()
    inferable.CopyFrom(graph)
    for node in inferable.graph.node:
        if node.op_type == "GroupNormalization":  # of which ONNX 1.23 infers nothing
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
    typed = ModelProto()
    typed.CopyFrom(graph)
    del typed.graph.value_info[:]
    typed.graph.value_info.extend(onnx.shape_inference.infer_shapes(inferable).graph.value_info)
    model = ir.from_proto(typed)
    for each in model.graph:
        for value in each.outputs:
            if value.name and value.dtype is None:
                raise ULError(f"{each.name}: the type of its result {value.name} is not known; update onnx")
    return model


def new_value(name: str, like: ir.Value, dtype: ir.DataType) -> ir.Value:
    """A value of the shape of another one."""
    return ir.Value(name=name, shape=like.shape, type=ir.TensorType(dtype))


def retype(value: ir.Value, dtype: ir.DataType) -> None:
    """Change its type; setting `value.dtype` would do so in all clones of the graph, which share it."""
    value.type = ir.TensorType(dtype)


def cast(value: ir.Value, made: ir.Value, name: str) -> ir.Node:
    """A node that makes `made` of `value`, in its type."""
    assert made.dtype is not None
    return ir.Node("", "Cast", [value], [ir.AttrInt64("to", made.dtype)], outputs=[made], name=name)


def stored_name(weight: str) -> str:
    """What a weight that is stored in half precision is called, in every graph that takes it."""
    return f"{weight}.half"


def rounded_tensor(values: np.ndarray, dtype: ir.DataType) -> ir.Tensor:
    """The nearest values of half precision (what is too large becomes infinite)."""
    with np.errstate(over="ignore"):
        return ir.Tensor(values.astype(dtype.numpy()), dtype=dtype)


def exact_in_half(model: ir.Model) -> set[str]:
    """Names of the float32 initializers that float16 holds exactly."""
    found = set()
    for name, tensor in initializers(model).items():
        if tensor.dtype == FLOAT and len(tensor.shape):
            half = rounded_tensor(tensor.numpy(), ir.DataType.FLOAT16).numpy().astype(np.float32)  # infinity: overflow
            if np.array_equal(half, tensor.numpy()):
                found.add(name)
    return found


def store_half(model: ir.Model, names: Collection[str], dtype: ir.DataType = ir.DataType.FLOAT16) -> ir.Model:
    """A copy where these float32 initializers are stored in half precision, and cast where the graph begins."""
    copy = model.clone()
    casts = []
    for value in halve_initializers(copy, names, dtype):
        name = name_of(value)
        back = new_value(name.removesuffix(stored_name("")), value, FLOAT)
        value.replace_all_uses_with(back)
        casts.append(cast(value, back, f"{name}/Cast"))
    if casts:
        copy.graph.insert_before(copy.graph[0], casts)
    return copy


def halve_initializers(model: ir.Model, names: Collection[str], dtype: ir.DataType) -> list[ir.Value]:
    """Put these float32 initializers into half precision, in their places and under new names; returns them."""
    found, table = [], model.graph.initializers
    for name, value in list(table.items()):
        table.pop(name)  # and back again, so that all keep their order
        if name in names:
            assert value.const_value is not None
            value.const_value = rounded_tensor(value.const_value.numpy(), dtype)
            value.name = stored_name(name)
            retype(value, dtype)
            found.append(value)
        table.add(value)
    return found


def split_weights(model: ir.Model, weights_file: str) -> tuple[bytes, bytes]:
    """(graph without weights, safetensors bytes): every large initializer becomes external data in `weights_file`.

    What torch noted down for itself stays out: its own names, types, and stack traces with paths of this machine.
    """
    copy = model.clone()
    large = {name: each for name, each in initializers(copy).items() if each.nbytes > _INLINE_BYTES}
    weights = save({name: np.ascontiguousarray(tensor.numpy()) for name, tensor in large.items()})
    start = 8 + int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8:start])
    for name, tensor in large.items():
        begin, end = header[name]["data_offsets"]
        copy.graph.initializers[name].const_value = ir.ExternalTensor(
            weights_file, start + begin, end - begin, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
        )
    proto = ir.to_proto(copy)
    graph = proto.graph
    del graph.value_info[:]  # a quarter of a graph's bytes; everyone infers it
    for part in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    return proto.SerializeToString(deterministic=True), weights


def join_weights(graph: bytes, weights: bytes, weights_file: str) -> ir.Model:
    """What `split_weights` took apart; no file that the graph names is opened. Weights may be larger than 2 GiB."""
    model, arrays = typed_model(onnx.load_model_from_string(graph)), parse_weights(weights, weights_file)
    for name, value in model.graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.Tensor(arrays[name], dtype=value.const_value.dtype, name=name)
    return model


def check_graph(path: Path) -> None:
    """onnx.checker with shape inference over a graph file beside its weights; BadInputError says what it found."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BadInputError(
            f"{path.name}: onnx.checker refuses the graph: {one_line(error)}; no bundle was written"
        ) from error
