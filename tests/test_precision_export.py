"""ul-export --fp16 and --bf16 of runs with random weights: pins where they are needed, check, bundle and runtime."""

import json
import re
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from random_run import write_run
from tiny_run import blobs, write_npz
from tool_module import load_tool
from torch import nn

from ul_export import export as export_command
from ul_export.cli import main
from ul_export.onnx_model import typed_model
from ul_export.options import ExportOptions
from ul_export.precision.graphs import headroom_bits, node_errors
from ul_export.precision.lower import FP16, PRECISIONS
from ul_export.precision.reduce import with_their_weights
from ul_export.precision.search import Calibration, Pins, compare_typed, overflow_pins, reduce, worst_nodes
from ul_export.verify import FP32, Tolerance, image_psnr_db
from ul_runtime.backends import openvino
from ul_runtime.backends.choose import choose_on_cpu
from ul_runtime.bundle import Bundle
from ul_runtime.cli.generate import main as generate
from ul_runtime.images.convert import from_uint8
from ul_runtime.loading import load
from ul_runtime.manifest import GRAPH_NAMES, NETWORK_GRAPHS

pytestmark = pytest.mark.slow
LARGE = 3000.0


def calm(networks: dict[str, nn.Module]) -> None:
    """Results of the size that trained networks have: those of random ones err as much more as they are larger."""
    with torch.no_grad():
        for network in networks.values():
            network.out.weight *= 0.3  # type: ignore[operator, union-attr]


def plant(networks: dict[str, nn.Module]) -> None:
    """One channel of the encoder's first stage becomes huge where the image is flat, and small again behind it."""
    calm(networks)
    encoder: Any = networks["encoder"]
    with torch.no_grad():
        encoder.embed.weight[0], encoder.embed.bias[0] = LARGE, 0.0
        encoder.stages[1].weight[:, 0] /= LARGE


@dataclass(frozen=True)
class Case:
    """A run, its bundle in float32, and that bundle ready to be reduced."""

    run: Path
    bundle: Path
    calibration: Calibration


def case(folder: Path, **options: Any) -> Case:
    write_npz(folder / "images.npz")
    write_run(folder / "run", **({"change": calm} | options))
    export_command.export_bundle(folder / "run", folder / "bundle", ExportOptions(threads=1))
    bundle = Bundle.open(folder / "bundle")
    files = {name: bundle.read(name) for name in bundle.manifest.files}
    x = from_uint8(blobs(12)[0])
    return Case(
        folder / "run",
        folder / "bundle",
        Calibration(bundle.manifest, with_their_weights(bundle.manifest, files), x, threads=1),
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(tmp_path_factory.mktemp("planted"), change=plant)


def test_an_overflow_on_the_real_path_alone_is_pinned_with_exactly_the_nodes_it_needs(planted, caplog):
    calibration = planted.calibration
    largest = calibration.largest
    draw = np.random.default_rng(0)
    noise = replace(calibration, x=draw.standard_normal(calibration.x.shape).astype(np.float32))
    (embed,) = (node for node in calibration.models["encoder"].graph if node.name == "embed/Conv")
    assert headroom_bits(largest["encoder"][str(embed.outputs[0].name)]) < -0.5
    assert headroom_bits(noise.largest["encoder"][str(embed.outputs[0].name)]) > 0, "random inputs do not show it"
    caplog.set_level("INFO")
    reduced = reduce(calibration, FP16)
    assert reduced.comparison.failures == []
    assert caplog.messages == [], "ranges alone found them"
    assert {graph: sorted(pins) for graph, pins in reduced.pinned.items()} == {
        "encoder": ["embed/Conv", "stages.1/Conv"],  # the sum between them stays with them
        "prior_step": [],
        "decoder_step": [],
    }
    for node in reduced.pinned["encoder"]:
        fewer: Pins = {
            graph: {n: why for n, why in pins.items() if n != node} for graph, pins in reduced.pinned.items()
        }
        lowered = {
            graph: FP16.lowered(model, FP16.nodes(model, fewer[graph]), {})
            for graph, model in calibration.models.items()
        }
        assert compare_typed(calibration, FP16, lowered, (1,)).failures, f"{node} was not needed"


def test_without_calibration_on_the_real_path_the_comparison_fails_and_names_the_node(planted, command, monkeypatch):
    monkeypatch.setattr(Calibration, "largest", {graph: {} for graph in NETWORK_GRAPHS})
    monkeypatch.setattr("ul_export.precision.search.MOST_ROUNDS", 0)
    out = planted.run.parent / "unverified"
    words = ("--fp16", "--out", out, "--threads", 1, "--calibrate", planted.run.parent / "images.npz")
    result = command(main, planted.run, *words)
    assert result.code == 65
    assert "fp16 does not equal float32, no bundle was written" in result.err
    assert "worst node of encoder: embed/Conv" in result.err
    assert not out.exists()


@pytest.mark.case(
    "N16",
    "the search of ul-export --fp16, which is normal",
    "it reads as what it is; one line says the result",
)
def test_where_the_tolerance_asks_for_it_the_nodes_that_add_most_are_pinned_and_no_more(plain, caplog):
    calibration = plain.calibration
    loose = reduce(calibration, FP16)
    assert loose.pinned == {graph: {} for graph in NETWORK_GRAPHS}
    share = max(calls[0].share for calls in loose.comparison.worst_calls.values())
    graph = FP16.tolerances.graph
    tight = Tolerance(0.9 * share * graph.absolute, 0.9 * share * graph.relative)
    strict = replace(FP16, tolerances=replace(FP16.tolerances, graph=tight))
    caplog.set_level("INFO")
    reduced = reduce(calibration, strict)
    assert reduced.comparison.failures == []
    pinned = [node for pins in reduced.pinned.values() for node in pins]
    assert 1 <= len(pinned) <= 8
    assert len(caplog.messages) >= 1
    assert all(message.startswith("fp16: choosing what stays in float32 in ") for message in caplog.messages)
    assert all("its rounding alone" in why for pins in reduced.pinned.values() for why in pins.values())
    for graph, pins in reduced.pinned.items():
        if pins:
            fewer = reduced.pinned | {graph: dict(list(pins.items())[:-1])}
            lowered = {
                name: FP16.lowered(model, FP16.nodes(model, fewer[name]), {})
                for name, model in calibration.models.items()
            }
            assert compare_typed(calibration, strict, lowered).failures, "one fewer does not do"


def with_error(model: ModelProto, node_name: str) -> ModelProto:
    """The graph where this node's result is a thousandth too large."""
    copy = ModelProto()
    copy.CopyFrom(model)
    nodes = []
    for node in copy.graph.node:
        nodes.append(node)
        if node.name == node_name:
            result, node.output[0] = node.output[0], "planted"
            nodes.append(helper.make_node("Mul", ["planted", "planted/factor"], [result], name="planted/Mul"))
    assert len(nodes) == len(model.graph.node) + 1
    copy.graph.initializer.append(numpy_helper.from_array(np.array(1.001, np.float32), "planted/factor"))
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    return copy


WRONG = "network.middle.blocks.0.mlp.0/MatMul"


def test_an_error_of_a_thousandth_in_one_operator_fails_the_export_and_is_named(plain, command, monkeypatch, tmp_path):
    export = export_command.export_graphs

    def with_fault(*arguments: Any) -> dict[str, bytes]:
        files = export(*arguments)
        model = onnx.load_model_from_string(files["prior_step.onnx"])
        return files | {"prior_step.onnx": with_error(model, WRONG).SerializeToString()}

    monkeypatch.setattr(export_command, "export_graphs", with_fault)
    result = command(main, plain.run, "--out", tmp_path / "bundle", "--threads", 1)
    assert result.code == 65
    assert "prior_step parts from torch in network.middle.blocks.0.mlp.0 (node network.middle" in result.err
    assert not (tmp_path / "bundle").exists()


def test_the_node_that_adds_the_error_is_first_among_the_node_errors(plain):
    calibration = plain.calibration
    model = calibration.models["prior_step"]
    reduced = reduce(calibration, FP16)
    inputs = reduced.comparison.worst_calls["prior_step"][0].inputs
    wrong = typed_model(with_error(ir.to_proto(model), WRONG))
    errors = node_errors(model, wrong, calibration.info, "prior_step", inputs)
    assert errors[0].node == WRONG
    assert errors[0].error == pytest.approx(1e-3, rel=1e-2)
    none = node_errors(model, model, calibration.info, "prior_step", inputs)
    assert max(each.error for each in none) == 0.0
    graph, nodes = worst_nodes(calibration, reduced)
    assert graph in NETWORK_GRAPHS
    assert 0 < nodes[0].grown < 1e-2


@pytest.mark.parametrize("kind", PRECISIONS)
def test_a_reduced_bundle_is_typed_shares_its_weights_and_makes_nearly_the_same_images(kind, plain, command, tmp_path):
    out, images = tmp_path / "bundle", plain.run.parent / "images.npz"
    result = command(main, plain.run, f"--{kind}", "--out", out, "--threads", 1, "--calibrate", images)
    assert result.code == 0, result.err
    assert result.err.count(f"{kind}: equals float32 within the tolerance; nodes kept in float32: ") == 1
    bundle = Bundle.open(out)
    type_ = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16, "int8": TensorProto.INT8}[kind]
    pixels = bundle.manifest.graphs["pixels"]
    assert (pixels.precision, pixels.float32_file) == ("fp32", None)
    constants = onnx.load_model_from_string(bundle.read(pixels.file)).graph.initializer
    assert {each.data_type for each in constants} == {TensorProto.FLOAT, TensorProto.INT64}
    for name in NETWORK_GRAPHS:
        graph = bundle.manifest.graphs[name]
        typed = onnx.load(str(out / graph.file), load_external_data=False)
        twin = onnx.load(str(out / f"{name}.float32.onnx"), load_external_data=False)
        assert graph.precision == kind
        assert any(each.data_type == type_ for each in typed.graph.initializer)
        assert {each.name for each in typed.graph.initializer if each.external_data} == {
            each.name for each in twin.graph.initializer if each.external_data
        }
    weights = sum((out / name).stat().st_size for name in bundle.manifest.files if name.endswith(".safetensors"))
    exact = sum((plain.bundle / name).stat().st_size for name in bundle.manifest.files if name.endswith(".safetensors"))
    assert weights < 0.7 * exact
    report = json.loads((out / "precision.json").read_bytes())
    for name, each in report["graphs"].items():
        nodes = each["nodes"]
        assert sum(node["flops_share"] for node in nodes) == pytest.approx(1.0)
        assert 0.85 < each["flops_share"] == sum(node["flops_share"] for node in nodes if node["precision"] == kind)
        assert all((node["precision"] == kind) == (node["why"] == "") for node in nodes)
        assert sum(each["weight_bytes"].values()) < 0.75 * each["weight_bytes_float32"]
        assert bundle.manifest.parity[kind]["flops_share"][name] == pytest.approx(each["flops_share"])
    page = (out / "precision.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r'(src|href)="(?!data:)', page), "needs no other file"
    assert str(tmp_path) not in page + json.dumps(report)
    if find_spec("tensorrt_rtx") is not None:
        words = ("--tensorrt", "--target", "sm89", "--engines", tmp_path / "engines", "--json")
        assert json.loads(command(main, out, *words).out)["engines_built"] == len(GRAPH_NAMES)
    parity = bundle.manifest.parity[kind]
    assert set(parity["pinned"]) == set(NETWORK_GRAPHS)
    assert (
        len(parity["batch 16, guidance 1.5, seed 3"]["drift"]["prior_step"]) == bundle.manifest.defaults.prior.num_steps
    )
    pipeline = load(out, threads=1)
    native = kind == "bf16" and openvino.has_bf16()
    assert pipeline.backend.precision == ("int8" if kind == "int8" else "bf16" if native else "fp32")
    assert pipeline.backend.name == ("openvino" if native else "ort-cpu")
    assert ("openvino" in bundle.manifest.parity[kind]) == native
    assert load(out, precision="fp32").backend.precision == "fp32"
    assert bundle.manifest.parity[kind]["calibration"]["images"] == 40, "all that --calibrate has"
    made = command(generate, out, "--out", tmp_path / "samples", "--num-images", 2)
    assert made.code == 0, made.err
    again = command(generate, out, "--replay", tmp_path / "samples" / "000001.png")
    assert (again.code, "byte for byte" in again.out) == (0, True), again
    (given,), (expected,) = (list(each.generate(4)) for each in (pipeline, load(plain.bundle, threads=1)))
    least_psnr_db = PRECISIONS[kind].tolerances.least_psnr_db
    assert least_psnr_db < image_psnr_db(expected.x, given.x) < FP32.least_psnr_db + 20
    if kind != "int8":  # as it would be evaluated: every rounding written out
        copy = load_tool("precisions").rounded_copy(bundle, tmp_path / "rounded")
        (rounded,) = load(copy.path, threads=1).generate(4)
        assert (
            PRECISIONS[kind].tolerances.least_psnr_db < image_psnr_db(expected.x, rounded.x) < FP32.least_psnr_db + 20
        )


def test_a_bundle_in_fp16_says_on_a_cpu_that_it_computes_in_float32(plain, command, tmp_path):
    out = tmp_path / "bundle"
    assert command(main, plain.run, "--fp16", "--out", out, "--calibrate", plain.run.parent / "images.npz").code == 0
    assert choose_on_cpu(Bundle.open(out).manifest, None) == (
        *("ort-cpu", None, "computes in fp32 with the fp16 bundle's weights"),
    )
    made = command(generate, out, "--out", tmp_path / "samples", "--num-images", 2)
    assert made.code == 0
    assert "backend auto: ort-cpu, computes in fp32 with the fp16 bundle's weights" in made.err
    made = command(generate, out, "--out", tmp_path / "named", "--num-images", 2, "--backend", "ort-cpu")
    assert "backend ort-cpu: computes in fp32 with the fp16 bundle's weights" in made.err
    command.fails(generate, 2, "no CPU backend computes in 'fp16'", out, "--precision", "fp16", "--out", "x")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--fp16", "--bf16"), 2, "--fp16 and --bf16: give one of them"),
        (("--bf16", "--opset", 20), 2, "--opset is 20; convolutions take bfloat16 from opset 22 on"),
        (("--fp16", "--weights", "fp16"), 2, "--weights fp16: --fp16 says itself how weights are stored"),
        (("--calibrate", "x"), 2, "--calibrate is for --fp16, --bf16 and --int8"),
        (("--fp16",), 65, "give others by --calibrate"),
        (("--fp16", "--calibrate", "nowhere"), 65, "nowhere: does not exist"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_before_any_work(words, code, message, plain, command, tmp_path):
    result = command(main, plain.run, "--out", tmp_path / "bundle", *words)
    assert (result.code, result.err.count("\n")) == (code, 1), result.err
    assert message in result.err


def test_a_precision_that_would_be_float32_for_the_most_part_is_refused(plain, command, monkeypatch, tmp_path):
    monkeypatch.setattr("ul_export.precision.reduce.LEAST_SHARE", 0.98)
    words = ("--fp16", "--threads", 1, "--calibrate", plain.run.parent / "images.npz", "--out", tmp_path / "bundle")
    result = command(main, plain.run, *words)
    assert result.code == 65
    assert re.search(r"prior_step would compute 9\d% of its FLOPs in fp16, .* at least 98% are expected", result.err)
    assert not (tmp_path / "bundle").exists()


def test_pins_are_found_in_the_weights_too(plain):
    largest = plain.calibration.largest
    model = plain.calibration.models["decoder_step"]
    weight = next(name for name in model.graph.initializers if name.endswith("embed.weight"))
    assert overflow_pins(model, largest["decoder_step"]) == {}
    assert list(overflow_pins(model, largest["decoder_step"] | {weight: 1e5})) == ["network.embed/Conv"]
