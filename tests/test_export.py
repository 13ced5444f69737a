"""ul-export of runs whose weights are random and nowhere zero: what a bundle holds, and that it equals torch."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from exported_run import CASES, HALF, PLAIN, Exported, exported_run
from onnx import ModelProto, numpy_helper
from safetensors.numpy import load_file

from ul_export.export import progress_of
from ul_export.verify import BATCH_SIZES, CHECK_BATCHES, FP32_GRAPH, compare_outputs
from ul_runtime.backends.ort_cpu import OrtCpuBackend
from ul_runtime.bundle import Bundle
from ul_runtime.cli.generate import main as generate
from ul_runtime.manifest import GRAPH_NAMES, NETWORK_GRAPHS
from ul_runtime.pipeline import Pipeline
from ul_train.run import Run

pytestmark = pytest.mark.slow


@pytest.fixture(params=CASES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported_run(request.param, tmp_path_factory)


def models(bundle: Path) -> dict[str, ModelProto]:
    return {name: onnx.load(str(bundle / f"{name}.onnx"), load_external_data=False) for name in GRAPH_NAMES}


def random_inputs(bundle: Bundle, graph: str, batch: int, branches: int) -> dict[str, np.ndarray]:
    """Inputs by the manifest's interface, none of them zero."""
    draw = np.random.default_rng(batch)
    sizes = {"b": batch, "g": branches}
    inputs = {}
    for tensor in bundle.manifest.graphs[graph].inputs:  # type: ignore[index]
        shape = [sizes[d] if isinstance(d, str) else d for d in tensor.shape]
        is_label = tensor.dtype == "int64"
        inputs[tensor.name] = (
            draw.integers(0, len(bundle.manifest.classes) + 1, shape)
            if is_label
            else draw.standard_normal(shape).astype(np.float32)
        )
    return inputs


def test_every_graph_passes_the_checker_and_has_the_interface_of_the_manifest(exported):
    manifest = Bundle.open(exported.bundle).manifest
    names = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.INT64: "int64", onnx.TensorProto.UINT8: "uint8"}
    for name, model in models(exported.bundle).items():
        onnx.checker.check_model(str(exported.bundle / f"{name}.onnx"), full_check=True)
        assert not model.graph.value_info  # bytes that nobody needs
        graph = manifest.graphs[name]
        assert (
            [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")] == [exported.opset] == [graph.opset]
        )
        assert [o.domain for o in model.opset_import if o.domain not in ("", "ai.onnx")] == []
        for infos, tensors in ((model.graph.input, graph.inputs), (model.graph.output, graph.outputs)):
            found = [
                (
                    info.name,
                    names[info.type.tensor_type.elem_type],
                    tuple(d.dim_param or d.dim_value for d in info.type.tensor_type.shape.dim),
                )
                for info in infos
            ]
            assert found == [(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]


@pytest.mark.parametrize("batch", [1, 2, 3, 16])
def test_every_graph_equals_torch_at_any_batch_size_and_number_of_branches(exported, batch):
    bundle = Bundle.open(exported.bundle)
    runtime, reference = OrtCpuBackend(bundle, threads=1), exported.torch_backend()
    for graph in GRAPH_NAMES:
        for branches in (1, 2, 3) if graph == "prior_step" else (1,):
            inputs = random_inputs(bundle, graph, batch, branches)
            expected = reference.run(graph, inputs)
            for name, difference in compare_outputs(expected, runtime.run(graph, inputs), FP32_GRAPH).items():
                assert difference.within, (graph, name, branches, difference)


def test_no_input_is_without_effect(exported):
    """A graph that ignores what the comparison feeds it would make the comparison say nothing."""
    bundle = Bundle.open(exported.bundle)
    runtime = OrtCpuBackend(bundle, threads=1)
    classes = len(bundle.manifest.classes)
    for graph in GRAPH_NAMES:
        inputs = random_inputs(bundle, graph, 3, 2)
        outputs = runtime.run(graph, inputs)
        for name, array in inputs.items():
            other = (array + 1) % (classes + 1) if name == "label" else array + np.float32(0.5)
            changed = runtime.run(graph, inputs | {name: other})
            effect = any(np.abs(changed[key] - outputs[key]).max() > 1e-3 for key in outputs)
            assert effect == (name != "label" or classes > 0), (graph, name)


@pytest.mark.parametrize("sampler", [{}, {"sampler": "ancestral", "decoder_sampler": "ancestral"}])
@pytest.mark.parametrize("guidance", [{"guidance": 1.0}, {"guidance": 3.0, "guidance_rescale": 0.7}])
def test_images_equal_those_of_torch_along_the_whole_path(exported, sampler, guidance):
    bundle = Bundle.open(exported.bundle)
    settings = sampler | (guidance if bundle.manifest.classes else {})
    batches = [
        list(Pipeline(bundle.manifest, backend).generate(10, seed=5, batch_size=7, **settings))
        for backend in (OrtCpuBackend(bundle, threads=1), exported.torch_backend())
    ]
    ours, theirs = (np.concatenate([batch.images for batch in side]).astype(int) for side in batches)
    assert len(np.unique(theirs)) > 50  # not a flat picture
    assert (np.abs(ours - theirs) <= 1).mean() >= 0.999


def test_the_bundle_opens_with_onnx_and_onnx_runtime_by_path(exported):
    bundle = Bundle.open(exported.bundle)
    runtime = OrtCpuBackend(bundle, threads=1)
    for graph in GRAPH_NAMES:
        path = exported.bundle / f"{graph}.onnx"
        weights = load_file(exported.bundle / bundle.manifest.graphs[graph].weights)
        for tensor in onnx.load(str(path)).graph.initializer:
            if tensor.name in weights:
                np.testing.assert_array_equal(numpy_helper.to_array(tensor), weights[tensor.name])
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        inputs = random_inputs(bundle, graph, 2, 2)
        for name, value in runtime.run(graph, inputs).items():
            np.testing.assert_allclose(session.run([name], inputs)[0], value, atol=1e-6)


def test_weights_are_in_the_safetensors_files_and_only_there(exported):
    bundle = Bundle.open(exported.bundle)
    for graph, model in models(exported.bundle).items():
        weights = set(load_file(exported.bundle / bundle.manifest.graphs[graph].weights))
        outside = {t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
        inside = [t for t in model.graph.initializer if t.name not in outside]
        assert outside == weights
        assert bool(weights) == (graph != "pixels")
        assert max(len(t.raw_data) for t in inside) <= 256
        assert not any(t.float_data or t.int64_data for t in inside)


def test_graphs_say_nothing_of_the_machine_that_made_them(exported):
    forbidden = (
        "site-packages",
        ".py",
        'File "',
        "stack_trace",
        str(Path.home()),
        str(exported.run.parent),
        os.getcwd(),
    )
    for graph in GRAPH_NAMES:
        data = (exported.bundle / f"{graph}.onnx").read_bytes()
        for text in (*forbidden, "pkg.torch"):
            assert text.encode() not in data, (graph, text)
    text = (exported.bundle / "manifest.json").read_text()
    assert not [word for word in forbidden if word in text]


def test_the_manifest_tells_the_provenance_and_the_measured_differences(exported):
    manifest = Bundle.open(exported.bundle).manifest
    run = json.loads((exported.run / "run.json").read_text())
    assert manifest.provenance.run_id == run["run_id"]
    weights = "ema" if exported.weights == "fp32" else "ema, rounded to float16"
    assert (manifest.provenance.step, manifest.provenance.weights) == (20, weights)
    assert re.fullmatch("[0-9a-f]{64}", manifest.provenance.encoder_sha256)
    parity = dict(manifest.parity)
    assert parity.pop("backend") == "ort-cpu"
    assert str(parity.pop("reference")).startswith("torch ")
    if exported.weights == "fp16":
        by_rounding = parity.pop("rounded_weights")
        assert 35 < by_rounding["image_psnr_db"] < 100, "no change at all would mean that nothing was rounded"
        assert by_rounding["image_psnr_db"] == exported.figures["rounded_weights_psnr_db"]
    guidance = ("1", "1.5") if manifest.classes else ("1",)
    assert sum(CHECK_BATCHES) >= 64
    first = {f"batch {batch}, guidance {weight}" for batch in BATCH_SIZES for weight in guidance}
    paths = first | {f"batch 16, guidance {weight}, seed {seed}" for weight in guidance for seed in (1, 2, 3)}
    assert set(parity) == paths | {"any coefficients"}
    assert set(parity["any coefficients"]["largest_difference"]) == set(NETWORK_GRAPHS)
    assert 0 < exported.figures["worst_graph_difference"] < 1e-4
    assert exported.figures["worst_image_psnr_db"] > 60
    assert any("base step 20 of 20" in line for line in exported.said)


def test_bundles_of_one_encoder_say_so_at_any_opset(tmp_path_factory):
    encoders = {
        name: Bundle.open(exported_run(name, tmp_path_factory).bundle).manifest.provenance.encoder_sha256
        for name in CASES
    }
    colour = encoders.pop("RGB without classes, opset 20")
    assert len(set(encoders.values())) == 1
    assert colour not in encoders.values()


def test_weights_in_float16_halve_the_bundle_and_are_those_that_torch_rounds_to(tmp_path_factory):
    plain, half = (exported_run(name, tmp_path_factory) for name in (PLAIN, HALF))
    exact, stored = (load_file(each.bundle / "prior.safetensors") for each in (plain, half))
    rounded = {name.removesuffix(".half"): array for name, array in stored.items() if name.endswith(".half")}
    assert len(rounded) > 0.7 * len(exact)  # torch folds a few with constants, which float16 no longer holds
    for name, array in rounded.items():
        assert array.dtype == np.float16
        np.testing.assert_array_equal(array, exact[name].astype(np.float16))
    sizes = [sum(file.stat().st_size for file in each.bundle.glob("*.safetensors")) for each in (plain, half)]
    assert sizes[1] < 0.55 * sizes[0]


def test_a_run_that_is_not_finished_is_exported_with_a_warning(exported, caplog):
    trained = Run.open(exported.run).finished()
    assert progress_of(trained) == "base step 20 of 20"
    assert caplog.messages == []
    assert progress_of(replace(trained, step=17)) == "base step 17 of 20"
    (line,) = caplog.messages
    assert line.startswith("warning: the run is not finished (base step 17 of 20)")


def test_ul_generate_makes_pictures_of_the_bundle(exported, command, tmp_path):
    result = command(generate, exported.bundle, "--out", tmp_path / "out", "--num-images", 4, "--threads", 1)
    assert result.code == 0, result
    assert len(list((tmp_path / "out").glob("0*.png"))) == 4
