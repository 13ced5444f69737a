"""A step graph with its weights inside, in memory: for backends that would look for them on the disk.

The graph is parsed with those messages of onnx.proto that can hold a tensor; protobuf carries all other fields along.
So neither the `onnx` package nor a file is needed, and no path that a graph names is ever opened.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, EncodeError

_PACKAGE = "unified_latents.onnx"
# message -> field -> (number, type; * = repeated), from onnx/onnx.proto, IR version 13
_MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "Entry": {"key": (1, "bytes"), "value": (2, "bytes")},
    "Tensor": {
        "dims": (1, "*int64"), "data_type": (2, "int32"), "name": (8, "string"), "raw_data": (9, "bytes"),
        "external_data": (13, "*Entry"), "data_location": (14, "int32"),
    },
    "Sparse": {"values": (1, "Tensor"), "indices": (2, "Tensor")},
    "Attribute": {
        "t": (5, "Tensor"), "g": (6, "Graph"), "tensors": (10, "*Tensor"), "graphs": (11, "*Graph"),
        "sparse_tensor": (22, "Sparse"), "sparse_tensors": (23, "*Sparse"),
    },
    "Node": {"attribute": (5, "*Attribute")},
    "Graph": {"node": (1, "*Node"), "initializer": (5, "*Tensor"), "sparse_initializer": (15, "*Sparse")},
    "Function": {"node": (7, "*Node"), "attribute_proto": (11, "*Attribute")},
    "Training": {"initialization": (1, "Graph"), "algorithm": (2, "Graph")},
    "Model": {"graph": (7, "Graph"), "training_info": (20, "*Training"), "functions": (25, "*Function")},
}  # fmt: skip
# TensorProto.DataType -> how `Bundle.initializers` hands such a weight over (bfloat16: its bits)
_DTYPES = {1: "<f4", 2: "u1", 3: "i1", 6: "<i4", 7: "<i8", 9: "?", 10: "<f2", 16: "<u2"}
_SCALARS = {"bytes": "TYPE_BYTES", "int32": "TYPE_INT32", "int64": "TYPE_INT64", "string": "TYPE_STRING"}
_EXTERNAL = 1  # TensorProto.DataLocation


@cache
def _model_class() -> type[Any]:
    """ModelProto with the fields of `_MESSAGES`."""
    Field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="weights_of_onnx.proto", package=_PACKAGE, syntax="proto2")
    for message, fields in _MESSAGES.items():
        described = file.message_type.add(name=message)
        for name, (number, kind) in fields.items():
            one = kind.removeprefix("*")
            field = described.field.add(
                name=name, number=number, type=getattr(Field, _SCALARS.get(one, "TYPE_MESSAGE"))
            )
            field.label = Field.LABEL_REPEATED if kind != one else Field.LABEL_OPTIONAL
            if one not in _SCALARS:
                field.type_name = f".{_PACKAGE}.{one}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Model"))


def _tensors(message: Any) -> Iterator[Any]:
    """All tensors in a message, at any depth: initializers, attributes, subgraphs, functions."""
    for field, value in message.ListFields():
        kind = _MESSAGES[message.DESCRIPTOR.name][field.name][1]
        one = kind.removeprefix("*")
        if one not in _SCALARS:
            for part in value if kind != one else [value]:
                if one == "Tensor":
                    yield part
                yield from _tensors(part)


def with_weights(graph: bytes, weights: Mapping[str, np.ndarray]) -> bytes:
    """The ONNX model `graph`, every tensor with external data holding the array of its name in `weights` instead.

    ValueError: not an ONNX model; a tensor that `weights` lacks or that has another shape or type there; an array
    that no tensor asks for; more than protobuf's 2 GiB.
    """
    try:
        model = _model_class().FromString(graph)
    except DecodeError as error:
        raise ValueError(f"not an ONNX model: {error}") from error
    left = dict(weights)
    for tensor in _tensors(model):
        if tensor.data_location != _EXTERNAL and not tensor.external_data:
            continue
        name = tensor.name
        if name not in left:
            raise ValueError(f"weight {name[:100]!a} is not in the weights file, or is asked for twice")
        array, dtype = left.pop(name), _DTYPES.get(tensor.data_type)
        if dtype is None or array.dtype != np.dtype(dtype) or array.shape != tuple(tensor.dims):
            given = f"{array.dtype}{list(array.shape)}"
            raise ValueError(f"weight {name[:100]!a} is {given}, the graph expects {dtype}{list(tensor.dims)}")
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        tensor.raw_data = array.tobytes()
    if left:
        raise ValueError(f"weight {next(iter(left))[:100]!a} is in the weights file and not in the graph")
    try:
        return model.SerializeToString()
    except EncodeError as error:
        raise ValueError(f"too large for one ONNX model in memory (2 GiB): {error}") from error
