"""Weights put into a graph in memory: equal to what the onnx package does with the files, and nothing else is taken."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from ul_runtime.backends.onnx_weights import _DTYPES, with_weights
from ul_runtime.bundle import Bundle
from ul_runtime.manifest import GRAPH_NAMES

W = np.arange(6, dtype=np.float32).reshape(2, 3)


def external(name: str = "w", shape: tuple[int, ...] = (2, 3), dtype: int = TensorProto.FLOAT) -> TensorProto:
    """A tensor whose values are said to lie in a file."""
    tensor = TensorProto(name=name, data_type=dtype, dims=shape, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    return tensor


def model(nodes: list[onnx.NodeProto], initializers: list[TensorProto]) -> bytes:
    """A model without inputs whose output is y."""
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])
    return helper.make_model(helper.make_graph(nodes, "g", [], [y], initializers)).SerializeToString()


def identity(tensor: TensorProto) -> bytes:
    return model([helper.make_node("Identity", ["w"], ["y"])], [tensor])


@pytest.mark.parametrize("graph", GRAPH_NAMES)
def test_a_graph_with_its_weights_is_what_onnx_loads_from_the_files(analytic_bundle: Path, graph: str) -> None:
    bundle = Bundle.open(analytic_bundle)
    expected = onnx.load(str(analytic_bundle / f"{graph}.onnx"))
    for tensor in expected.graph.initializer:
        tensor.ClearField("data_location")
        tensor.ClearField("external_data")
    made = onnx.load_from_string(with_weights(bundle.graph(graph), bundle.initializers(graph)))
    assert made.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)


def test_types_are_those_of_onnx() -> None:
    for number, dtype in _DTYPES.items():
        if number != TensorProto.BFLOAT16:
            assert np.dtype(dtype) == helper.tensor_dtype_to_np_dtype(number)


def nested(tensor: TensorProto, where: str) -> bytes:
    """A model in which the tensor is no initializer of the main graph."""
    constant = helper.make_node("Constant", [], ["y"], value=tensor)
    if where == "attribute":
        return model([constant], [])
    if where == "list":
        return model([helper.make_node("Op", [], ["y"], many=[tensor])], [])
    if where == "sparse":
        sparse = helper.make_sparse_tensor(tensor, helper.make_tensor("i", TensorProto.INT64, [6], range(6)), [2, 3])
        return model([helper.make_node("Constant", [], ["y"], sparse_value=sparse)], [])
    if where == "training":
        made = helper.make_model(helper.make_graph([], "g", [], []))
        made.training_info.add().algorithm.initializer.append(tensor)
        return made.SerializeToString()
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])
    if where == "subgraph":
        branch = helper.make_graph([constant], "b", [], [y])
        condition = helper.make_tensor("c", TensorProto.BOOL, [], [True])
        node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
        return model([node], [condition])
    made = helper.make_model(helper.make_graph([], "g", [], [y]))
    opset = [helper.make_opsetid("", 18)]
    made.functions.append(helper.make_function("local", "f", [], ["y"], [constant], opset))
    return made.SerializeToString()


@pytest.mark.parametrize("where", ["attribute", "list", "sparse", "subgraph", "function", "training"])
def test_external_data_is_found_wherever_it_hides(where: str) -> None:
    with pytest.raises(ValueError, match="'w' is not in the weights file"):
        with_weights(nested(external(), where), {})


def test_a_graph_without_external_data_stays_as_it_is() -> None:
    inline = identity(onnx.numpy_helper.from_array(W, "w"))
    made = onnx.load_from_string(with_weights(inline, {}))
    assert made == onnx.load_from_string(inline)


@pytest.mark.parametrize(
    ("graph", "weights", "message"),
    [
        (b"not a graph", {}, "not an ONNX model"),
        (identity(external()), {}, "'w' is not in the weights file"),
        (identity(external()), {"w": W.T}, r"float32\[3, 2\], the graph expects <f4\[2, 3\]"),
        (identity(external()), {"w": W.astype(np.float16)}, r"float16\[2, 3\]"),
        (identity(external(dtype=TensorProto.DOUBLE)), {"w": W.astype(np.float64)}, "the graph expects None"),
        (identity(external()), {"w": W, "v": W}, "'v' is in the weights file and not in the graph"),
        (model([], [external(), external()]), {"w": W}, "asked for twice"),
    ],
)
def test_weights_that_do_not_fit_are_refused(graph: bytes, weights: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_weights(graph, weights)
