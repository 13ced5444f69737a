"""A step graph with its weights inside, in memory: for backends that would look for them on the disk.

No path that a graph names is ever opened. onnx is imported here and nowhere else in the runtime, when it is needed.
"""

from collections.abc import Iterator, Mapping, MutableSequence
from typing import TYPE_CHECKING

import numpy as np

from ul_runtime.install import require_packages

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from onnx import TensorProto

# TensorProto.DataType -> how `Bundle.initializers` hands such a weight over (bfloat16: its bits)
_DTYPES = {1: "<f4", 2: "u1", 3: "i1", 6: "<i4", 7: "<i8", 9: "?", 10: "<f2", 16: "<u2"}


def with_weights(graph: bytes, weights: Mapping[str, np.ndarray]) -> bytes:
    """The ONNX model `graph`, every tensor with external data holding the array of its name in `weights` instead.

    ValueError: not an ONNX model; a tensor that `weights` lacks or that has another shape or type there; an array
    that no tensor asks for; more than protobuf's 2 GiB. UsageError: onnx is not installed.
    """
    require_packages("onnx", extras="tensorrt")  # or tensorrt-rtx, openvino
    from google.protobuf.message import DecodeError, EncodeError
    from onnx import ModelProto

    try:
        model = ModelProto.FromString(graph)
    except DecodeError as error:
        raise ValueError(f"not an ONNX model: {error}") from error
    left = dict(weights)
    for tensor in _tensors(model):
        if tensor.data_location != tensor.EXTERNAL and not tensor.external_data:
            continue
        if tensor.name not in left:
            raise ValueError(f"weight {tensor.name[:100]!a} is not in the weights file, or is asked for twice")
        _put(left.pop(tensor.name), tensor)
    if left:
        raise ValueError(f"weight {next(iter(left))[:100]!a} is in the weights file and not in the graph")
    try:
        return model.SerializeToString()
    except EncodeError as error:
        raise ValueError(f"too large for one ONNX model in memory (2 GiB): {error}") from error


def _put(array: np.ndarray, tensor: "TensorProto") -> None:
    dtype = _DTYPES.get(tensor.data_type)
    if dtype is None or array.dtype != np.dtype(dtype) or array.shape != tuple(tensor.dims):
        given = f"{array.dtype}{list(array.shape)}"
        raise ValueError(f"weight {tensor.name[:100]!a} is {given}, the graph expects {dtype}{list(tensor.dims)}")
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")
    tensor.raw_data = array.tobytes()


def _tensors(message: "Message") -> Iterator["TensorProto"]:
    """All tensors in a message, at any depth: initializers, attributes, subgraphs, functions."""
    from google.protobuf.message import Message
    from onnx import TensorProto

    for _, value in message.ListFields():
        for part in value if isinstance(value, MutableSequence) else [value]:
            if isinstance(part, TensorProto):
                yield part
            elif isinstance(part, Message):
                yield from _tensors(part)
