"""New weights of the same networks in the graphs of a bundle."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from torch import nn

from ul_export.onnx_graphs import _AGAIN, _HALF, _INT8, _TRANSPOSED, parameters, step_graphs
from ul_export.onnx_model import initializers, join_weights, rounded_tensor, split_weights
from ul_export.precision.lower import by_channel
from ul_runtime.bundle import Bundle
from ul_runtime.errors import BadInputError
from ul_runtime.manifest import BundleInfo


def updated_files(old: Bundle, info: BundleInfo, networks: dict[str, nn.Module]) -> dict[str, bytes]:
    """The bundle's graphs over the weights of these networks; its report, of the old ones, stays behind."""
    files = {}
    modules = {graph.name: graph.module for graph in step_graphs(networks, info.image, info.latent)}
    for name, entry in info.all_graphs.items():
        given = parameters(modules[name])
        for file in (entry.file, entry.float32_file):
            if file is not None:
                model = join_weights(old.read(file), old.read(entry.weights), entry.weights)
                replace_weights(model, given)
                files[file], files[entry.weights] = split_weights(model, entry.weights)
    return files


def replace_weights(model: ir.Model, given: Mapping[str, np.ndarray]) -> None:
    """Put these parameters into the initializers named after them, in the precision that they have there.

    BadInputError: another number of values, or not the same parameters on both sides: none may keep its old values.
    """
    used: set[str] = set()
    for name, tensor in initializers(model).items():
        half, int8 = _HALF.fullmatch(name), _INT8.fullmatch(name)
        stem = _AGAIN.sub("", (half or int8 or {"weight": name})["weight"])
        source = stem.removesuffix(_TRANSPOSED)
        if source not in given:
            if "." in source:  # a parameter's name, which no constant has
                raise BadInputError(f"the bundle has a weight {source} and the run has not; export without --update")
            continue
        used.add(source)
        value = given[source].T if stem.endswith(_TRANSPOSED) else given[source]
        if int8 is not None:
            values, scale = by_channel(value, int(int8["axis"]))
            value = values if int8["part"] == "int8" else scale
        shape = tensor.shape.numpy()
        if value.size != np.prod(shape):
            raise BadInputError(f"{source} has {value.size} values, the bundle {list(shape)}; export without --update")
        new = np.ascontiguousarray(value.reshape(shape))
        model.graph.initializers[name].const_value = rounded_tensor(new, tensor.dtype)
    if left := sorted(given.keys() - used):
        raise BadInputError(
            f"the graph does not have {len(left)} weights of the run, such as {left[0]}; export without --update"
        )
