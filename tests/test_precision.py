"""Typed graphs of half precision: what they round, what stays in float32, and what is measured to choose."""

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from ul_export.onnx_model import FLOAT, initializers, module_of, name_nodes, typed_model
from ul_export.precision.graphs import OUTPUT, headroom_bits, weight_ranges, with_ranges
from ul_export.precision.lower import by_design, emulated, half_nodes, lower
from ul_export.precision.search import overflow_pins
from ul_runtime.errors import ULError

DRAW = np.random.default_rng(0)
W_1, W_2 = (DRAW.standard_normal((8, 8)).astype(np.float32) for _ in range(2))
BIAS = DRAW.standard_normal(8).astype(np.float32)
X = DRAW.standard_normal((5, 8)).astype(np.float32)
HALF = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
NUMPY = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}
COMPUTED = {"network.a/MatMul", "network.a/Add", "network.c/MatMul", "network.c/Identity"}


def model(w_1: np.ndarray = W_1, scale: float = 1.0) -> ir.Model:
    """The graph of `proto`, with types."""
    return typed_model(proto(w_1, scale))


def proto(w_1: np.ndarray = W_1, scale: float = 1.0) -> ModelProto:
    """y = (softmax(x w_1 + b) w_2 scale + x) x, with the names that exported graphs have."""
    rows = [
        ("network.a/MatMul", ["x", "w_1"], "p"),
        ("network.a/Add", ["p", "b"], "q"),
        ("network.a/Softmax", ["q"], "s"),
        ("network.c/MatMul", ["s", "w_2"], "r"),
        ("network.c/Identity", ["r"], "i"),
        ("network/Add", ["i", "x"], "u"),
        ("/Mul", ["u", "x"], "y"),
    ]
    nodes = [helper.make_node(name.rpartition("/")[2], given, [made], name=name) for name, given, made in rows]
    weights = {"w_1": w_1, "b": BIAS, "w_2": W_2 * np.float32(scale)}
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 8]) for name in "xy")
    graph = helper.make_graph(
        nodes, "g", [x], [y], [numpy_helper.from_array(array, name) for name, array in weights.items()]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(graph: ir.Model, x: np.ndarray = X) -> list[np.ndarray]:
    """Its results, the types that it notes down checked against ONNX's inference."""
    serialized = ir.to_proto(graph)
    onnx.checker.check_model(serialized, full_check=True)
    session = onnxruntime.InferenceSession(serialized.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


def by_hand(kind: str) -> np.ndarray:
    """The same in numpy, rounded after every operation of half precision."""

    def half(array: np.ndarray) -> np.ndarray:
        return array.astype(NUMPY[kind]).astype(np.float32)

    q = half(half(half(X) @ half(W_1)) + half(BIAS))
    e = np.exp(q - q.max(axis=1, keepdims=True))
    r = half(half(e / e.sum(axis=1, keepdims=True)) @ half(W_2))
    return (r + X) * X


def test_statistics_the_update_and_what_meets_it_stay_in_float32():
    assert half_nodes(model(), {}) == COMPUTED
    assert by_design(model()) == {
        "network.a/Softmax": "Softmax needs its range",
        "/Mul": "guidance and the sampler's update",
    }


def test_the_embedding_of_the_noise_level_stays_in_float32():
    graph = model()
    for node in graph.graph[:2]:
        node.name = str(node.name).replace("network.a", "network.logsnr_embedding.mlp.0")
    assert half_nodes(graph, {}) == {"network.c/MatMul", "network.c/Identity"}


def test_a_pinned_node_stays_in_float32_and_what_only_moves_its_result_too():
    assert half_nodes(model(), {"network.c/MatMul": "pinned"}) == {"network.a/MatMul", "network.a/Add"}


@pytest.mark.parametrize("kind", HALF)
def test_a_lowered_graph_is_typed_and_keeps_float32_at_its_ends(kind):
    lowered = lower(model(), HALF[kind], COMPUTED)
    serialized = ir.to_proto(lowered)
    onnx.checker.check_model(serialized, full_check=True)
    for each in (lowered, typed_model(serialized)):  # what it says itself, and what ONNX infers
        values = ir.convenience.create_value_mapping(each.graph)
        assert {name for name in "xypqsriu" if values[name].dtype == HALF[kind]} == {"p", "q", "r", "i"}
    weights = {name: tensor.dtype for name, tensor in initializers(lowered).items()}
    assert weights == dict.fromkeys(["w_1.half", "b.half", "w_2.half"], HALF[kind])
    for end in (*serialized.graph.input, *serialized.graph.output):
        assert end.type.tensor_type.elem_type == TensorProto.FLOAT
    casts = [node for node in lowered.graph if node.op_type == "Cast"]
    assert sorted(str(node.outputs[0].name) for node in casts) == ["i/float", "q/float", "s/half", "x/half"]


@pytest.mark.parametrize("kind", HALF)
def test_an_emulated_graph_rounds_as_the_precision_does(kind):
    (given,) = run(emulated(lower(model(), HALF[kind], COMPUTED)))
    np.testing.assert_allclose(given, by_hand(kind), rtol=2e-6, atol=2e-6)
    (exact,) = run(model())
    step = {"fp16": 2.0**-11, "bf16": 2.0**-8}[kind]
    assert 0.05 * step < np.abs(given - exact).max() < 30 * step


def test_a_graph_that_is_lowered_or_emulated_stays_as_it_was():
    """Clones of onnx-ir share their types."""
    exact = model()
    before = ir.to_proto(exact).SerializeToString()
    lowered = lower(exact, HALF["fp16"], COMPUTED)
    between = ir.to_proto(lowered).SerializeToString()
    emulated(lowered)
    assert ir.to_proto(exact).SerializeToString() == before != between == ir.to_proto(lowered).SerializeToString()


def test_an_emulated_graph_overflows_where_float16_does_and_bfloat16_does_not():
    assert not np.isfinite(run(emulated(lower(model(scale=1e6), HALF["fp16"], COMPUTED)))[0]).any()
    assert np.isfinite(run(emulated(lower(model(scale=1e6), HALF["bf16"], COMPUTED)))[0]).all()


def test_a_result_of_half_precision_that_leaves_the_graph_is_rounded_and_float32():
    graph = proto()
    del graph.graph.node[5:]
    graph.graph.output[0].name = "i"
    lowered = lower(typed_model(graph), HALF["fp16"], COMPUTED)
    (given,) = run(emulated(lowered))
    assert given.dtype == np.float32
    np.testing.assert_array_equal(given, given.astype(np.float16).astype(np.float32))
    np.testing.assert_allclose(run(lowered)[0], given, rtol=2e-3, atol=1e-3)


def test_a_weight_that_both_precisions_take_is_stored_once_in_float32():
    graph = proto()
    graph.graph.node[3].input[1] = "w_1"
    lowered = lower(typed_model(graph), HALF["fp16"], {"network.a/MatMul", "network.a/Add"})
    assert {name: tensor.dtype for name, tensor in initializers(lowered).items()} == {
        "w_1": FLOAT,
        "b.half": ir.DataType.FLOAT16,
        "w_2": FLOAT,
    }
    run(emulated(lowered))


def test_ranges_are_the_largest_magnitudes_of_inputs_and_results():
    measured, names = with_ranges(model())
    y, ranges = run(measured)
    q = X @ W_1 + BIAS
    assert names == ["x", "p", "q", "s", "r", "i", "u", "y"]
    assert measured.graph.outputs[1].name == OUTPUT
    expected = {"x": X, "p": X @ W_1, "q": q, "y": y}
    assert {name: ranges[names.index(name)] for name in expected} == pytest.approx(
        {name: np.abs(array).max() for name, array in expected.items()}, rel=1e-6
    )
    np.testing.assert_array_equal(y, run(model())[0])
    assert weight_ranges(model()) == pytest.approx({"w_1": abs(W_1).max(), "b": abs(BIAS).max(), "w_2": abs(W_2).max()})


@pytest.mark.parametrize(("largest", "bits"), [(65504.0, 0.0), (32752.0, 1.0), (131008.0, -1.0), (0.0, np.inf)])
def test_headroom_is_how_often_a_magnitude_can_double(largest, bits):
    assert headroom_bits(largest) == bits


def test_nodes_that_touch_a_magnitude_with_less_than_a_bit_of_headroom_are_pinned():
    largest = dict.fromkeys(["x", "p", "s", "r", "i", "u", "y", "w_1", "b", "w_2"], 1.0)
    assert overflow_pins(model(), largest | {"q": 32752.0}) == {}
    pins = overflow_pins(model(), largest | {"q": 32753.0})
    assert list(pins) == ["network.a/Add"], "the softmax is in float32 by design"
    assert pins["network.a/Add"] == "magnitude 3.275e+04, headroom 1.0 bits"
    assert list(overflow_pins(model(), largest | {"w_2": 7e4})) == ["network.c/MatMul"]
    assert list(overflow_pins(model(), largest | {"r": 7e4})) == ["network.c/MatMul"], "the next one only moves it"


def test_nodes_are_named_by_their_module_and_a_second_one_is_counted():
    serialized = proto()
    scopes: list[Any] = ["['', 'network', 'network.a', 'linear']"] * 3 + ["['', 'mul']", "['_empty_nn_module_stack_x']"]
    for node, scope in zip(serialized.graph.node, scopes, strict=False):
        node.op_type = "MatMul"
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scope)
    graph = ir.from_proto(serialized)
    name_nodes(graph)
    names = [str(node.name) for node in graph.graph]
    assert names[:5] == ["network.a/MatMul", "network.a/MatMul_2", "network.a/MatMul_3", "/MatMul", "/MatMul_2"]
    assert [module_of(name) for name in names[2:4]] == ["network.a", ""]


def test_a_graph_whose_types_are_not_known_is_refused():
    graph = proto()
    graph.graph.node[0].domain = "elsewhere"
    graph.opset_import.add(domain="elsewhere", version=1)
    with pytest.raises(ULError, match=r"network\.a/MatMul: the type of its result p is not known"):
        typed_model(graph)


def test_the_type_of_a_group_norm_is_that_of_what_it_takes():
    graph = proto()
    given = ["x", "b", "b"]
    norm = helper.make_node("GroupNormalization", given, ["p"], name="network.n/GroupNormalization", num_groups=2)
    graph.graph.node[0].CopyFrom(norm)
    values = ir.convenience.create_value_mapping(typed_model(graph).graph)
    assert values["p"].dtype == values["q"].dtype == FLOAT


def test_types_noted_down_in_a_graph_are_not_carried_into_another_precision():
    graph = proto()
    graph.graph.value_info.append(helper.make_tensor_value_info("p", TensorProto.FLOAT, ["b", 8]))
    lowered = lower(typed_model(graph), HALF["fp16"], COMPUTED)
    np.testing.assert_allclose(run(emulated(lowered))[0], by_hand("fp16"), rtol=2e-6, atol=2e-6)
    assert run(lowered)[0].shape == (len(X), 8)
