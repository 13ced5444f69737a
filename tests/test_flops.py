"""FLOPs counted in ONNX graphs: exact for graphs of one operator, and those that ul-train counts in torch."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from analytic_bundle import write_analytic_bundle
from exported_run import CASES, exported_run
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save

from ul_export.bench.measure import Node, count_flops, node_flops, run_nodes
from ul_runtime.backends.ort_cpu import OrtCpuBackend
from ul_runtime.bundle import Bundle
from ul_runtime.errors import ULError
from ul_train.account import account
from ul_train.config import load_config

HEADS = {"q_num_heads": 4, "kv_num_heads": 4}
RNG = np.random.default_rng(0)


def counted(path: Path, op: str, x: tuple[int, ...], *weights: tuple[int, ...], **attributes: Any) -> int:
    """FLOPs of one operator on x and weights, with a Relu and an Add of its output around, as ONNX Runtime ran it."""
    names = [f"w{i}" for i in range(len(weights))]
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node(op, ["r", *names], ["y"], **attributes),
        helper.make_node("Add", ["y", "y"], ["z"]),
    ]
    values = [
        numpy_helper.from_array(RNG.normal(size=s).astype(np.float32), n) for n, s in zip(names, weights, strict=True)
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * len(x)) for n in ("x", "z")]
    graph = helper.make_graph(nodes, "one", ends[:1], ends[1:], values)
    bundle = write_analytic_bundle(path)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    bundle._held |= {"encoder.onnx": model.SerializeToString(), "encoder.safetensors": save({})}
    return count_flops(run_nodes(OrtCpuBackend(bundle, threads=1), "encoder", {"x": np.ones(x, np.float32)}))


@pytest.mark.parametrize(
    ("op", "x", "weights", "attributes", "expected"),
    [
        ("MatMul", (5, 7, 16), [(16, 32)], {}, 2 * 5 * 7 * 16 * 32),
        ("MatMul", (2, 3, 7, 16), [(2, 3, 16, 9)], {}, 2 * 2 * 3 * 7 * 16 * 9),
        ("Gemm", (5, 16), [(32, 16), (32,)], {"transB": 1}, 2 * 5 * 16 * 32),
        ("Gemm", (16, 5), [(16, 32)], {"transA": 1}, 2 * 5 * 16 * 32),
        ("Conv", (2, 8, 9, 9), [(12, 8, 3, 3), (12,)], {"pads": [1] * 4, "strides": [2, 2]}, 2 * 2 * 12 * 25 * 8 * 9),
        ("Conv", (2, 8, 9, 9), [(8, 2, 3, 3)], {"group": 4}, 2 * 2 * 8 * 49 * 2 * 9),
        ("ConvTranspose", (2, 8, 5, 5), [(8, 6, 2, 2)], {"strides": [2, 2]}, 2 * 2 * 8 * 25 * 6 * 4),
        ("Attention", (2, 4, 10, 16), [(2, 4, 12, 16), (2, 4, 12, 16)], {}, 2 * 2 * 4 * 10 * 12 * (16 + 16)),
        ("Attention", (2, 10, 64), [(2, 12, 64), (2, 12, 64)], HEADS, 4 * 2 * 10 * 12 * 64),
        ("Mul", (5, 16), [(5, 16)], {}, 0),
    ],
)  # fmt: skip
def test_an_operator_costs_its_closed_form(
    tmp_path: Path,
    op: str,
    x: tuple[int, ...],
    weights: list[tuple[int, ...]],
    attributes: dict[str, Any],
    expected: int,
) -> None:
    assert counted(tmp_path / "bundle", op, x, *weights, **attributes) == expected


def test_an_operator_of_unknown_cost_is_refused() -> None:
    with pytest.raises(ULError, match="Einsum"):
        node_flops(Node("Einsum", ((2, 3), (3, 4)), ((2, 4),)))


def test_the_analytic_graphs_cost_their_convolutions(analytic_bundle: Path) -> None:
    backend = OrtCpuBackend(Bundle.open(analytic_bundle), threads=1)
    x = np.zeros((2, 3, 8, 8), np.float32)
    assert count_flops(run_nodes(backend, "encoder", {"x": x})) == 2 * 2 * (4 * 4 * 4) * (3 * 2 * 2)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_exported_graphs_cost_what_ul_train_counts(case: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    exported = exported_run(case, tmp_path_factory)
    bundle = Bundle.open(exported.bundle)
    manifest = bundle.manifest
    expected = account(load_config(str(exported.run / "config.toml"), []), len(manifest.classes))["networks"]
    backend = OrtCpuBackend(bundle, threads=1)

    def flops(graph: Any, batch: int, branches: int = 1) -> int:
        sizes = {"b": batch, "g": branches}
        inputs = {
            tensor.name: np.zeros([sizes[d] if isinstance(d, str) else d for d in tensor.shape], tensor.dtype)
            for tensor in manifest.graphs[graph].inputs
        }
        assert math.prod(next(iter(inputs.values())).shape) > 0
        return count_flops(run_nodes(backend, graph, inputs))

    for batch in (1, 3):
        assert flops("encoder", batch) == batch * expected["encoder"]["forward_flops"]
        assert flops("decoder_step", batch) == batch * expected["decoder"]["forward_flops"]
        for branches in (1, 2):
            assert flops("prior_step", batch, branches) == batch * branches * expected["base"]["forward_flops"]
