"""The small reader of ONNX against the onnx package, and the list of operators against what ul-export writes."""

import random
from pathlib import Path

import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from ul_runtime.files.onnx_file import MAX_BYTES, read_model
from ul_runtime.graph_check import OPERATORS, _check_precision
from ul_runtime.loading import DEFAULT, MODELS

GRAPHS = sorted((MODELS / DEFAULT).glob("*.onnx"))


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_the_reader_finds_what_onnx_finds(path: Path) -> None:
    found, expected = read_model(path.read_bytes())["graph"], onnx.load(str(path), load_external_data=False).graph
    nodes = [(node.get("op_type"), node.get("input", []), node.get("output", [])) for node in found["node"]]
    assert nodes == [(node.op_type, list(node.input), list(node.output)) for node in expected.node]
    assert {op for op, _, _ in nodes} <= OPERATORS
    weights = [(each["name"], each.get("dims", []), each["data_type"]) for each in found["initializer"]]
    assert weights == [(each.name, list(each.dims), each.data_type) for each in expected.initializer]
    for kind in ("input", "output"):
        assert [each["name"] for each in found[kind]] == [each.name for each in getattr(expected, kind)]


def test_numbers_are_read_packed_or_not_and_with_their_sign() -> None:
    tensor = TensorProto(name="t", data_type=TensorProto.INT64, dims=[2], int64_data=[-1, 2**63 - 1])
    node = helper.make_node("Constant", [], ["y"], value=tensor, axes=[-3, 300], ratio=[0.5, 1.5])
    model = helper.make_model(helper.make_graph([node], "g", [], []))
    (read,) = read_model(model.SerializeToString())["graph"]["node"]
    by_name = {each["name"]: each for each in read["attribute"]}
    assert by_name["value"]["t"]["int64_data"] == [-1, 2**63 - 1]
    assert by_name["axes"]["ints"] == [-3, 300]
    assert len(by_name["ratio"]["floats"]) == 2


def test_a_cast_to_half_is_rounding_only_where_the_value_is_cast_back_at_once() -> None:
    to_half = helper.make_node("Cast", ["x"], ["h"], to=TensorProto.BFLOAT16)
    back = helper.make_node("Cast", ["h"], ["y"], to=TensorProto.FLOAT)
    product = helper.make_node("MatMul", ["h", "h"], ["z"])

    def check(*nodes: onnx.NodeProto, precision: str) -> None:
        model = helper.make_model(helper.make_graph(nodes, "g", [], []))
        _check_precision(read_model(model.SerializeToString())["graph"]["node"], precision)

    check(to_half, back, precision="fp32")
    check(to_half, back, product, precision="bf16")
    for nodes, precision in (((to_half, back), "bf16"), ((to_half, back, product), "fp32"), ((product,), "fp16")):
        with pytest.raises(ValueError, match=f"the manifest says {precision}"):
            check(*nodes, precision=precision)


@pytest.mark.case(
    "B5", "mutated ONNX bytes", "refused before an engine sees them, unless they are still a graph of the bundle"
)
def test_mutated_bytes_are_refused_or_read() -> None:
    draw, good = random.Random(0), (MODELS / DEFAULT / "pixels.onnx").read_bytes()
    refused = 0
    for _ in range(3000):
        bad = bytearray(good)
        at, other = draw.randrange(len(bad)), draw.randrange(len(bad))
        kind = draw.randrange(4)
        if kind == 0:
            bad[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del bad[at : at + draw.choice([1, 2, 16, 200])]
        elif kind == 2:
            bad[at:at] = bad[other : other + draw.choice([2, 8, 64])]
        else:
            bad[at] = draw.choice([0, 127, 128, 255])
        try:
            assert isinstance(read_model(bytes(bad)), dict)
        except ValueError:
            refused += 1
    assert refused > 1000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80" * 11, "cut or damaged"),
        (b"\x3a\x7f", "cut or damaged"),
        (bytes(MAX_BYTES + 1), "at most"),
        (ModelProto(ir_version=8).SerializeToString() * 2, "two of ir_version"),
        (b"\x7a\x00", "field 15, which ul-export never writes"),
    ],
)
def test_what_is_no_model_is_a_value_error(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_model(data)
