"""Graphs in int8: what is quantised, by which scales, and that an image does not depend on its batch."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from ul_export.onnx_model import initializers, typed_model
from ul_export.precision.lower import by_channel, quantisable, quantised, quantised_weights

DRAW = np.random.default_rng(0)
KERNEL = DRAW.standard_normal((4, 2, 3, 3)).astype(np.float32)
GEMM = DRAW.standard_normal((5, 16)).astype(np.float32)  # transB
PRODUCT = DRAW.standard_normal((5, 3)).astype(np.float32)
X = DRAW.standard_normal((3, 2, 4, 4)).astype(np.float32)


def model() -> ir.Model:
    """y = (flat(conv(x)) gemm^T) product + x's own product with itself, which has no weights."""
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["c"], "network.a/Conv"),
        helper.make_node("Flatten", ["c"], ["f"], "network.a/Flatten"),
        helper.make_node("Gemm", ["f", "gemm"], ["g"], "network.b/Gemm", transB=1),
        helper.make_node("MatMul", ["g", "product"], ["m"], "network.c/MatMul"),
        helper.make_node("MatMul", ["x", "x"], ["s"], "network.d/MatMul"),
        helper.make_node("ReduceMean", ["s"], ["r"], "network.d/ReduceMean", keepdims=0),
        helper.make_node("MatMul", ["m", "last"], ["l"], "network.out/MatMul"),
        helper.make_node("Add", ["l", "r"], ["y"], "/Add"),
    ]
    weights = {"kernel": KERNEL, "gemm": GEMM, "product": PRODUCT, "last": np.eye(3, dtype=np.float32)}
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 2, 4, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 3])
    stored = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], stored)
    return typed_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


NODES = {"network.a/Conv", "network.b/Gemm", "network.c/MatMul"}


def run(graph: ir.Model, x: np.ndarray = X, *, more: tuple[str, ...] = ()) -> list[np.ndarray]:
    copy = ir.to_proto(graph)
    inner = [info for info in copy.graph.value_info if info.name not in more]
    del copy.graph.value_info[:]
    copy.graph.value_info.extend(inner)
    for name in more:
        shape = ["b", 4, 2, 2] if name == "c" else ["b", {"f": 16, "g": 5, "m": 3}[name]]
        copy.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    onnx.checker.check_model(copy, full_check=True)
    return onnxruntime.InferenceSession(copy.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        None, {"x": x}
    )


def ranges() -> dict[str, float]:
    values = dict(zip(("c", "f", "g", "m"), run(model(), more=("c", "f", "g", "m"))[1:], strict=True))
    return {"x": float(np.abs(X).max())} | {name: float(np.abs(array).max()) for name, array in values.items()}


def rounded(array: np.ndarray, largest: float) -> np.ndarray:
    scale = np.float32(largest / 127)
    return (np.rint(array / scale).clip(-128, 127) * scale).astype(np.float32)


def test_products_with_weights_are_quantised_and_not_the_result_nor_products_of_activations():
    assert quantisable(model()) == NODES


@pytest.mark.parametrize(("weight", "axis"), [(KERNEL, 0), (GEMM, 0), (PRODUCT, 1)])
def test_a_weight_is_within_half_a_step_of_its_channel(weight, axis):
    values, scale = by_channel(weight, axis)
    assert values.dtype == np.int8
    assert scale.shape == (weight.shape[axis],)
    shape = [-1 if each == axis else 1 for each in range(weight.ndim)]
    back = values * scale.reshape(shape)
    assert (np.abs(back - weight) <= 0.5001 * scale.reshape(shape)).all()
    others = tuple(each for each in range(weight.ndim) if each != axis)
    assert np.abs(values).max(axis=others).tolist() == [127] * weight.shape[axis]


def test_a_weight_of_zeros_stays_zero():
    values, scale = by_channel(np.zeros((2, 3), np.float32), 0)
    assert not values.any()
    assert np.isfinite(scale).all()
    assert (scale > 0).all()


def test_every_product_takes_its_input_by_the_largest_magnitude_seen_and_its_weight_by_channel():
    largest = ranges()
    by_name = {"kernel": (KERNEL, 0), "gemm": (GEMM, 0), "product": (PRODUCT, 1)}
    exact = model()
    back = {}
    for name, (weight, axis) in by_name.items():
        values, scale = by_channel(weight, axis)
        shape = [-1 if each == axis else 1 for each in range(weight.ndim)]
        back[name] = (values * scale.reshape(shape)).astype(np.float32)
        exact.graph.initializers[name].const_value = ir.Tensor(back[name])
    c = run(exact, rounded(X, largest["x"]), more=("c",))[1]
    f = rounded(c.reshape(3, -1), largest["f"])
    g = rounded(f @ back["gemm"].T, largest["g"])
    s = np.float32((X @ X).mean())
    expected = g @ back["product"] + s
    (given,) = run(quantised(model(), NODES, largest))
    np.testing.assert_allclose(given, expected, rtol=1e-4, atol=2e-4 * np.abs(expected).max())
    (plain,) = run(model())
    assert 1e-3 < np.abs(given - plain).max() / np.abs(plain).max() < 0.05


def test_an_image_does_not_depend_on_the_others_in_its_batch():
    graph = quantised(model(), NODES, ranges())
    alone, together = (run(graph, x, more=("m",))[1] for x in (X[:1], np.concatenate([X[:1], 100 * X])))
    np.testing.assert_array_equal(alone[0], together[0])


def test_with_weights_alone_in_int8_the_graph_computes_in_float32():
    graph = quantised_weights(model(), NODES)
    assert {node.op_type for node in graph.graph if "uantize" in node.op_type} == {"DequantizeLinear"}
    stored = {name: tensor.dtype for name, tensor in initializers(graph).items()}
    assert sorted(name for name, kind in stored.items() if kind == ir.DataType.INT8) == [
        "gemm/axis0.int8",
        "kernel/axis0.int8",
        "product/axis1.int8",
    ]
    assert "kernel" not in stored
    assert "last" in stored
    (given,), (plain,) = run(graph), run(model())
    assert 1e-4 < np.abs(given - plain).max() / np.abs(plain).max() < 0.03
