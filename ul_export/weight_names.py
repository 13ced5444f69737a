"""Weights of a graph named by the parameters that they come from, so that newer ones can take their place."""

import re
from collections.abc import Mapping

import numpy as np
from onnx import ModelProto, TensorProto, numpy_helper
from torch import nn

from ul_export.module_paths import module_of
from ul_export.precision.quantize import by_channel
from ul_export.precision.tensors import half_tensor
from ul_runtime.errors import BadInputError

_TRANSPOSED = ".T"
_AGAIN = re.compile(r"~\d+$")  # another initializer of the same parameter, in another shape
_HALF = re.compile(r"(?P<weight>.+)\.half")
_INT8 = re.compile(r"(?P<weight>.+)/axis(?P<axis>\d)\.(?P<part>int8|scale)")


def parameters(module: nn.Module) -> dict[str, np.ndarray]:
    """Float32 arrays of a module's parameters and buffers by name."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: value.detach().cpu().float().numpy() for name, value in named}


def name_weights(model: ModelProto, module: nn.Module) -> None:
    """Rename the initializers that the exporter folded: `PARAMETER.T` is transposed, any other reshaped at most."""
    given = parameters(module)
    taken = {tensor.name for tensor in model.graph.initializer}
    renamed: dict[str, str] = {}
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or tensor.name in given:
            continue
        users = [module_of(node.name) for node in model.graph.node if tensor.name in node.input]
        source = _source(numpy_helper.to_array(tensor), given, users)
        if source is None:
            continue  # a constant
        name = source
        while name in taken:
            name = f"{source}~{len(taken)}"
        taken.add(name)
        renamed[tensor.name] = tensor.name = name
    for node in model.graph.node:
        for at, each in enumerate(node.input):
            node.input[at] = renamed.get(each, each)


def _source(array: np.ndarray, given: Mapping[str, np.ndarray], users: list[str]) -> str | None:
    """The parameter with these values, of a module that takes them if there is one."""
    for near in (True, False):
        for name, value in given.items():
            if near != any(name.startswith(f"{user}.") for user in users) or value.size != array.size:
                continue
            if value.ndim == 2 and value.T.shape == array.shape and np.array_equal(value.T, array):
                return name + _TRANSPOSED
            if np.array_equal(value.reshape(array.shape), array):
                return name
    return None


def replace_weights(model: ModelProto, given: Mapping[str, np.ndarray], constants: Mapping[str, np.ndarray]) -> None:
    """Put these parameters into the initializers named after them, in the precision that they have there.

    `constants`: of initializers that lie outside of the graph and are no parameters. BadInputError: another number of
    values, or not the same parameters on both sides: none may keep its old values.
    """
    used: set[str] = set()
    for tensor in model.graph.initializer:
        half, int8 = _HALF.fullmatch(tensor.name), _INT8.fullmatch(tensor.name)
        stem = _AGAIN.sub("", (half or int8 or {"weight": tensor.name})["weight"])
        source = stem.removesuffix(_TRANSPOSED)
        if source not in given:
            if "." in source:  # a parameter's name, which no constant has
                raise BadInputError(f"the bundle has a weight {source} and the run has not; export without --update")
            if tensor.external_data:
                tensor.CopyFrom(numpy_helper.from_array(constants[tensor.name], tensor.name))
            continue
        used.add(source)
        value = given[source].T if stem.endswith(_TRANSPOSED) else given[source]
        if int8 is not None:
            values, scale = by_channel(value, int(int8["axis"]))
            value = values if int8["part"] == "int8" else scale
        if value.size != int(np.prod(tensor.dims)):
            raise BadInputError(
                f"{source} has {value.size} values, the bundle {list(tensor.dims)}; export without --update"
            )
        new = numpy_helper.from_array(np.ascontiguousarray(value.reshape(tuple(tensor.dims))), tensor.name)
        tensor.CopyFrom(half_tensor(new, tensor.data_type) if half else new)
    if left := sorted(given.keys() - used):
        raise BadInputError(
            f"the graph does not have {len(left)} weights of the run, such as {left[0]}; export without --update"
        )
