"""TensorRT-RTX builds the step graphs on a machine without a GPU, and says what it cannot build and where."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from exported_run import CASES, exported_run
from onnx import TensorProto, helper

from ul_export.precision.lower import PRECISIONS
from ul_export.precision.reduce import with_their_weights
from ul_runtime.backends import tensorrt_build as libraries
from ul_runtime.backends.onnx_weights import with_weights
from ul_runtime.backends.tensorrt_build import Plan, Profile, Timings, _Phases, build_engine
from ul_runtime.bundle import Bundle
from ul_runtime.errors import BadInputError, StoppedError, UsageError
from ul_runtime.install import install
from ul_runtime.manifest import GRAPH_NAMES, TensorFormat

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no package for this machine")

SHAPE = ("b", 2, 16, 32)
TARGETS = ("sm86", "sm89")


@pytest.fixture(scope="module")
def library() -> libraries.Library:
    return libraries.library_for(("sm89",))


def plan_of(bundle: Bundle, graph: str, targets: tuple[str, ...] = TARGETS) -> Plan:
    onnx = with_weights(bundle.graph(graph), bundle.initializers(graph))
    return Plan("bundle", graph, onnx, bundle.manifest.graphs[graph].inputs, Profile(16, 4), targets)


def plan_of_nodes(*nodes, inputs: str = "x", shape=SHAPE, opset: int = 20, dtype=TensorProto.FLOAT) -> Plan:
    """A graph from `inputs` to y."""
    values = [helper.make_tensor_value_info(name, dtype, shape) for name in inputs]
    last = nodes[-1].output[0]
    graph = helper.make_graph(list(nodes), "g", values, [helper.make_tensor_value_info(last, dtype, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    formats = [TensorFormat(name=name, dtype="float32", shape=shape) for name in inputs]
    return Plan("bundle", "prior_step", model.SerializeToString(), formats, Profile(8, 2), ("sm89",))


@pytest.mark.parametrize("graph", GRAPH_NAMES)
@pytest.mark.parametrize("name", [name for name in CASES if "weights" not in name and "23" not in name])
def test_every_step_graph_builds_at_every_opset(library, tmp_path_factory, name, graph):
    bundle = Bundle.open(exported_run(name, tmp_path_factory).bundle)
    engine = build_engine(library, plan_of(bundle, graph))
    assert len(engine) > sum(array.nbytes for array in bundle.initializers(graph).values())


@pytest.mark.parametrize("graph", ["prior_step", "decoder_step"])
def test_attention_as_one_operator_builds_in_half_precision_and_is_named_in_float32(library, tmp_path_factory, graph):
    exported = exported_run("grey with classes, opset 23", tmp_path_factory)
    manifest = Bundle.open(exported.bundle).manifest
    model = with_their_weights(manifest, exported.files)[graph]
    assert "Attention" in {node.op_type for node in model.graph}
    data, inputs = ir.to_proto(model).SerializeToString(), manifest.graphs[graph].inputs
    with pytest.raises(BadInputError, match=r"node network\.\S+\.attention/Attention"):
        build_engine(library, Plan("bundle", graph, data, inputs, Profile(16, 4), ("sm89",)))
    for kind in ("fp16", "bf16"):
        half = PRECISIONS[kind].lowered(model, PRECISIONS[kind].nodes(model, ()), {})
        data = ir.to_proto(half).SerializeToString()
        assert build_engine(library, Plan("bundle", graph, data, inputs, Profile(16, 4), ("sm89",)))


@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")
def test_measurements_of_kernels_can_be_given_and_come_back(library):
    """TensorRT-RTX measures nothing ahead, but takes and writes them as TensorRT does."""
    plan = replace(plan_of_nodes(helper.make_node("Relu", ["x"], ["y"])), timings=Timings())
    engine = build_engine(library, plan)
    assert plan.timings is not None
    assert plan.timings.data
    assert build_engine(library, plan) == engine
    plan.timings.data = b"of another library"
    assert build_engine(library, plan) == engine


def test_an_operator_that_the_library_does_not_have_is_named_with_its_module(library):
    det = helper.make_node("Det", ["x"], ["y"], name="network.head/Det")
    with pytest.raises(BadInputError, match=r"prior_step: TensorRT-RTX .* node network\.head/Det \(Det\): unsupported"):
        build_engine(library, plan_of_nodes(det, shape=("b", 4, 4)))


def test_types_that_do_not_agree_are_said_with_the_node(library):
    cast = helper.make_node("Cast", ["x"], ["half"], name="network.a/Cast", to=TensorProto.FLOAT16)
    add = helper.make_node("Add", ["half", "x"], ["y"], name="network.a/Add")
    with pytest.raises(BadInputError, match=r"node network\.a/Add \(Add\): invalid node"):
        build_engine(library, plan_of_nodes(cast, add))


def test_bytes_that_are_no_graph_are_refused(library):
    plan = plan_of_nodes(helper.make_node("Relu", ["x"], ["y"]))
    with pytest.raises(BadInputError, match="does not take it"):
        build_engine(library, Plan("bundle", "encoder", b"nonsense", plan.inputs, plan.profile, plan.targets))


def attention(dtype: int) -> Plan:
    """The trap of opset 23: its Attention parses, and in float32 nothing computes it."""
    return plan_of_nodes(
        helper.make_node("Mul", ["q", "q"], ["q2"], name="network.blocks.0/Mul"),
        helper.make_node("Attention", ["q2", "k", "v"], ["out"], name="network.blocks.0.attention/Attention"),
        helper.make_node("Add", ["out", "q"], ["y"], name="network.blocks.0/Add"),
        inputs="qkv",
        opset=23,
        dtype=dtype,
    )


def test_a_failure_of_which_the_library_does_not_say_the_place_is_found_by_bisection(library):
    with pytest.raises(BadInputError, match=r"for sm89: node network\.blocks\.0\.attention/Attention"):
        build_engine(library, attention(TensorProto.FLOAT))
    assert build_engine(library, attention(TensorProto.FLOAT16))


def test_an_architecture_without_the_arithmetic_is_said_with_the_node(library, tmp_path_factory):
    bundle = Bundle.open(exported_run("grey with classes, opset 20", tmp_path_factory).bundle)
    with pytest.raises(BadInputError, match=r"for sm75: node network\.\S+/\w+: .*FP32 GEMM is not supported"):
        build_engine(library, plan_of(bundle, "prior_step", ("sm75",)))


def test_architectures_that_are_not_there_are_refused_with_those_that_are(library):
    with pytest.raises(UsageError, match="does not build for 'sm90'; it builds for sm75, sm80, "):
        libraries.library_for(("sm89", "sm90"))


def test_progress_adds_up_and_a_stop_ends_the_build(library, tmp_path_factory):
    plan = plan_of(Bundle.open(exported_run("grey with classes, opset 20", tmp_path_factory).bundle), "decoder_step")
    told: list[float] = []
    build_engine(library, plan, told.append)
    assert len([share for share in told if share]) > 50
    assert min(told) >= 0
    assert np.isclose(sum(told), 1.0)
    asked = []

    def stopping(amount: float) -> None:
        asked.append(amount)
        if len(asked) > 60:
            raise StoppedError("stopped")

    with pytest.raises(StoppedError):
        build_engine(library, plan, stopping)
    assert len(asked) < len(told)


def test_nested_phases_tell_shares_of_the_whole():
    told: list[float] = []
    phases = _Phases(told.append)
    phases.start("build", None, 4)
    phases.step("build", 0)
    phases.start("part", "build", 2)
    phases.step("part", 0)
    phases.finish("part")
    assert np.allclose(np.cumsum(told), [0.25, 0.375])
    phases.step("build", 0)
    assert len(told) == 2, "never back"
    phases.finish("build")
    assert np.isclose(sum(told), 1.0)


def test_a_gpu_gets_the_library_that_has_its_architecture(library):
    assert libraries.library_on("sm89") is library
    if "tensorrt" not in libraries.installed():
        with pytest.raises(
            UsageError, match=r"no TensorRT for a GPU of sm90: TensorRT-RTX .* and not sm90; TensorRT is"
        ):
            libraries.library_on("sm90")


@pytest.mark.parametrize(("most", "likely"), [(0, 0), (4, 8), (64, 0), (10**6, 8)])
def test_batches_that_cannot_be_are_refused(most, likely):
    with pytest.raises(UsageError, match="expected 1 to 65536"):
        Profile(most, likely)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "holds no library"),
        ("class Builder: pass\n__version__ = '10.11.0'", "10.11.0 is installed; expected 10.12 or newer"),
    ],
)
def test_a_package_that_is_a_stub_or_too_old_is_refused(tmp_path: Path, monkeypatch, source, message):
    monkeypatch.setitem(
        libraries.KINDS, "other", libraries.Kind("Other", "other_rt", "other", (10, 12), False, False, False, False)
    )
    (tmp_path / "other_rt.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "other_rt", raising=False)
    with pytest.raises(UsageError, match=message):
        libraries.open_library("other")


def test_a_library_that_is_missing_is_said_with_what_to_install(monkeypatch):
    monkeypatch.setattr(libraries, "find_spec", lambda module: None)
    with pytest.raises(UsageError, match=re.escape(f"TensorRT-RTX is not installed; {install('tensorrt-rtx')}")):
        libraries.library_for(("sm89",))
    with pytest.raises(UsageError, match="TensorRT or TensorRT-RTX is not installed"):
        libraries.library_for(())
