"""Weights stored in float16: which are, what the graph then computes, and what is refused."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from analytic_bundle import write_analytic_bundle
from onnx import TensorProto, helper, numpy_helper
from random_run import randomise, save, write_run

from ul_export.cli import main
from ul_export.export import effect_of_rounding, rounded
from ul_export.onnx_model import exact_in_half, initializers, store_half, typed_model
from ul_runtime.backends.ort_cpu import OrtCpuBackend
from ul_runtime.errors import BadInputError
from ul_runtime.pipeline import Pipeline
from ul_train.run import Run


def product(weight: np.ndarray) -> ir.Model:
    """y = x w + 0.1"""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "c"], ["y"])]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 4]) for name in "xy")
    weights = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.array(0.1, np.float32), "c")]
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    return typed_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    serialized = ir.to_proto(model)
    onnx.checker.check_model(serialized, full_check=True)
    session = onnxruntime.InferenceSession(serialized.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def test_a_graph_with_weights_in_float16_computes_the_same_bytes():
    draw = np.random.default_rng(0)
    weight = draw.standard_normal((4, 4)).astype(np.float16).astype(np.float32)
    x = draw.standard_normal((3, 4)).astype(np.float32)
    half = store_half(product(weight), exact_in_half(product(weight)))
    stored = {name: tensor.dtype for name, tensor in initializers(half).items()}
    assert stored == {"w.half": ir.DataType.FLOAT16, "c": ir.DataType.FLOAT}
    np.testing.assert_array_equal(run(half, x), run(product(weight), x))


@pytest.mark.parametrize("value", [0.1, 1e6, 1e-9, np.nan])
def test_a_weight_that_float16_does_not_hold_stays_as_it_is(value):
    weight = np.full((4, 4), 0.5, np.float32)
    weight[1, 2] = value
    model = store_half(product(weight), exact_in_half(product(weight)))
    assert list(model.graph.initializers) == ["w", "c"]
    assert [node.op_type for node in model.graph] == ["MatMul", "Add"]


def test_rounding_leaves_the_networks_themselves_alone():
    linear = randomise(torch.nn.Linear(8, 8), 0)
    before = linear.weight.detach().clone()
    copy = rounded({"n": linear})["n"]
    assert torch.equal(linear.weight, before)
    assert torch.equal(copy.weight, before.half().float())
    assert not torch.equal(copy.weight, before)


def test_a_weight_beyond_float16_is_refused_with_its_name():
    linear = torch.nn.Linear(2, 2)
    with torch.no_grad():
        linear.bias[1] = -7e4
    with pytest.raises(BadInputError, match=r"weight n\.bias is up to 7e\+04, float16 ends at 65504; .*--weights fp32"):
        rounded({"n": linear})


def test_pictures_that_rounding_would_change_too_much_are_refused(tmp_path):
    pipelines = {}
    for std in (0.5, 0.501, 0.6):
        bundle = write_analytic_bundle(tmp_path / f"{std}", latent_std=std)
        pipelines[std] = Pipeline(bundle.manifest, OrtCpuBackend(bundle, threads=1))
    assert effect_of_rounding(pipelines[0.5], pipelines[0.5])["image_psnr_db"] == 200.0
    assert 50 < effect_of_rounding(pipelines[0.5], pipelines[0.501])["image_psnr_db"] < 80
    with pytest.raises(BadInputError, match="dB of those by exact weights, at least 35 is asked for"):
        effect_of_rounding(pipelines[0.5], pipelines[0.6])


def test_a_run_with_a_weight_beyond_float16_is_not_exported(command, tmp_path):
    networks = write_run(tmp_path / "run")
    with torch.no_grad():
        networks["decoder"].embed_z.weight[0, 0] = 1e5
    joint = {name: networks[name] for name in ("encoder", "prior", "decoder")}
    config = Run.open(tmp_path / "run").config
    encoder = save(tmp_path / "run", config, "joint", joint)
    save(tmp_path / "run", config, "base", {"base": networks["base"]}, encoder)
    result = command(main, tmp_path / "run", "--out", tmp_path / "bundle", "--weights", "fp16")
    assert result.code == 65, result
    assert "weight decoder.embed_z.weight is up to 1e+05" in result.err
    assert not (tmp_path / "bundle").exists()


def test_other_kinds_of_weights_are_refused(command, tmp_path):
    result = command(main, tmp_path / "run", "--out", tmp_path / "bundle", "--weights", "fp8")
    assert result.code == 2
    assert "--weights fp8: expected fp32 or fp16" in result.err
