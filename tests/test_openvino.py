"""The OpenVINO backend: the same images as ONNX Runtime in float32, close ones in bfloat16, and what it refuses."""

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from analytic_bundle import write_analytic_bundle
from command import Runner
from exported_run import exported_run
from safetensors.numpy import save

from ul_export.verify import FP32, FP32_GRAPH, Recorder, compare_outputs, image_psnr_db
from ul_runtime.backends import Backend
from ul_runtime.backends import openvino as module
from ul_runtime.backends.choose import choose_on_cpu, open_backend
from ul_runtime.backends.openvino import OpenVinoBackend
from ul_runtime.bundle import Bundle
from ul_runtime.cli.generate import main
from ul_runtime.errors import BadInputError, ULError, UsageError
from ul_runtime.install import install
from ul_runtime.pipeline import Pipeline

LEAST_BF16_PSNR_DB = 45.0  # of whole images against float32; 50.2 to 51.6 measured on two networks, random weights
MOST_BF16_ERROR = (
    1.3e-2  # root mean square, relative, of one prior step; 9e-3 measured, 1.7e-2 to 2e-2 without float32 waves
)
X = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
CASES = ("grey with classes, opset 20", "grey with classes, opset 18", "RGB without classes, opset 20")


@pytest.fixture(params=CASES)
def exported_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of real networks with random weights."""
    return Bundle.open(exported_run(request.param, tmp_path_factory).bundle)


@pytest.fixture
def bf16() -> None:
    """Skips on a processor that has no bfloat16, where the backend refuses it."""
    if not module.has_bf16():
        pytest.skip("no bfloat16 on this processor")


def opened(bundle: Bundle, precision: str = "fp32", threads: int = 1) -> OpenVinoBackend:
    backend = open_backend("openvino", bundle, precision=precision, threads=threads)
    assert isinstance(backend, OpenVinoBackend)
    return backend


def images(bundle: Bundle, backend: Backend, num: int = 5, **settings: Any) -> np.ndarray:
    """x of the first images."""
    return np.concatenate([batch.x for batch in Pipeline(bundle.manifest, backend).generate(num, **settings)])


def recorded(bundle: Bundle) -> Iterator[tuple[Any, dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """The graph calls of ONNX Runtime on a real path, and one of the encoder."""
    recorder = Recorder(open_backend("ort-cpu", bundle, threads=1))
    pipeline = Pipeline(bundle.manifest, recorder)
    list(pipeline.generate(3))
    pipeline.encode(np.random.default_rng(0).uniform(-1, 1, (3, *pipeline.image_shape)).astype(np.float32))
    yield from recorder.calls


# The same images


@pytest.mark.slow
def test_float32_equals_onnx_runtime_call_by_call_and_along_the_whole_path(exported_bundle: Bundle) -> None:
    backend = opened(exported_bundle)
    for graph, inputs, outputs in recorded(exported_bundle):
        differences = compare_outputs(outputs, backend.run(graph, inputs), FP32_GRAPH)
        assert all(difference.within for difference in differences.values()), (graph, differences)
    reference = images(exported_bundle, open_backend("ort-cpu", exported_bundle, threads=1))
    assert image_psnr_db(reference, images(exported_bundle, backend)) >= FP32.least_psnr_db


@pytest.mark.slow
def test_bfloat16_images_are_close_to_float32_and_not_the_same(exported_bundle: Bundle, bf16: None) -> None:
    reference = images(exported_bundle, open_backend("ort-cpu", exported_bundle, threads=1))
    psnr = image_psnr_db(reference, images(exported_bundle, opened(exported_bundle, "bf16")))
    assert LEAST_BF16_PSNR_DB <= psnr < FP32.least_psnr_db


@pytest.mark.slow
def test_the_bound_of_bfloat16_finds_weights_that_are_two_percent_off(exported_bundle: Bundle, bf16: None) -> None:
    """The control of the test above."""
    reference = images(exported_bundle, open_backend("ort-cpu", exported_bundle, threads=1))
    name = exported_bundle.manifest.graphs["decoder_step"].weights
    weights = {key: value * 1.02 for key, value in exported_bundle.initializers("decoder_step").items()}
    exported_bundle._held[name] = save(weights)
    assert image_psnr_db(reference, images(exported_bundle, opened(exported_bundle, "bf16"))) < LEAST_BF16_PSNR_DB


def prior_error(bundle: Bundle) -> float:
    """Largest relative error, root mean square, of a prior step in bfloat16."""
    backend, errors = opened(bundle, "bf16"), []
    for graph, inputs, outputs in recorded(bundle):
        if graph == "prior_step":
            gap = backend.run(graph, inputs)["pred"] - outputs["pred"]
            errors.append(float(np.sqrt(np.square(gap).mean() / np.square(outputs["pred"]).mean())))
    return max(errors)


@pytest.mark.slow
def test_noise_levels_stay_in_float32(exported_bundle: Bundle, bf16: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prior_error(exported_bundle) < MOST_BF16_ERROR
    monkeypatch.setattr(module, "_take_out_waves", lambda model: None)
    assert prior_error(exported_bundle) > MOST_BF16_ERROR


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_image_is_the_same_bytes_at_any_batch_size_and_position(
    exported_bundle: Bundle, precision: str, bf16: None
) -> None:
    settings = {"sampler": "ancestral", "decoder_sampler": "ancestral", "steps": 3}
    expected = images(exported_bundle, opened(exported_bundle, precision), 8, batch_size=8, **settings)
    other = opened(exported_bundle, precision)
    for batch_size in (1, 3, 5):
        assert np.array_equal(images(exported_bundle, other, 8, batch_size=batch_size, **settings), expected)
    few = [batch.x for batch in Pipeline(exported_bundle.manifest, other).generate([6, 1, 3], **settings)]
    assert np.array_equal(np.concatenate(few), expected[[6, 1, 3]])


# What it is told


def test_threads_and_precision_reach_openvino(analytic_bundle: Path, bf16: None) -> None:
    for threads, precision, element in ((1, "fp32", "f32"), (2, "bf16", "bf16")):
        backend = opened(Bundle.open(analytic_bundle), precision, threads)
        backend.run("encoder", {"x": X})
        (graph,) = backend._graphs.values()
        compiled = graph.main.get_compiled_model()
        assert compiled.get_property("INFERENCE_NUM_THREADS") == threads
        assert compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == element
        assert (backend.name, backend.precision, backend.threads) == ("openvino", precision, threads)


def test_without_a_number_the_backend_says_how_many_threads_there_are(analytic_bundle: Path) -> None:
    backend = open_backend("openvino", Bundle.open(analytic_bundle))
    assert isinstance(backend, OpenVinoBackend)
    backend.run("encoder", {"x": X})
    (graph,) = backend._graphs.values()
    assert backend.threads == graph.main.get_compiled_model().get_property("INFERENCE_NUM_THREADS") >= 1


def test_a_batch_size_is_compiled_once_for_its_power_of_two(analytic_bundle: Path, bf16: None) -> None:
    backend = opened(Bundle.open(analytic_bundle), "bf16")
    for batch in (3, 4, 1):
        assert backend.run("encoder", {"x": np.repeat(X[:1], batch, 0)})["z_clean"].shape == (batch, 4, 4, 4)
    assert sorted(dims for _, dims in backend._graphs) == [(("b", 1),), (("b", 4),)]


def test_auto_takes_openvino_only_for_a_precision_that_the_bundle_does_not_have(analytic_bundle: Path) -> None:
    bundle = Bundle.open(analytic_bundle)
    assert [choose_on_cpu(bundle.manifest, precision)[0] for precision in (None, "fp32", "bf16")] == [
        "ort-cpu",
        "ort-cpu",
        "openvino",
    ]


def in_bf16(bundle: Bundle, proof: dict[str, Any]) -> Bundle:
    """The bundle as if ul-export had written it in bf16 with this proof; its graphs stay."""
    graphs = {
        name: graph.model_copy(update={"precision": "bf16", "float32_file": graph.file})
        for name, graph in bundle.manifest.graphs.items()
    }
    return replace(bundle, manifest=bundle.manifest.model_copy(update={"graphs": graphs, "parity": {"bf16": proof}}))


def test_auto_computes_a_bundle_in_bf16_natively_only_where_that_was_proved(
    analytic_bundle: Path, bf16: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(analytic_bundle)
    proved, unproved = in_bf16(bundle, {"openvino": {"versions": {}}}), in_bf16(bundle, {"pinned": {}})
    proof = ("openvino", "bf16", "computes in bf16 as ul-export verified the bundle")
    assert choose_on_cpu(proved.manifest, None) == proof
    backend = open_backend("auto", proved, threads=1)
    assert (backend.name, backend.precision) == ("openvino", "bf16")
    assert backend.run("encoder", {"x": X})["z_clean"].shape == (len(X), 4, 4, 4)
    backend = open_backend("auto", unproved, threads=1)
    assert (backend.name, backend.precision) == ("ort-cpu", "fp32")
    assert choose_on_cpu(unproved.manifest, None).why.endswith("weights: ul-export did not verify it on OpenVINO")
    assert choose_on_cpu(proved.manifest, "fp32")[:2] == ("ort-cpu", "fp32")
    monkeypatch.setattr(module, "has_bf16", lambda: False)
    assert choose_on_cpu(proved.manifest, None)[:2] == ("ort-cpu", None)
    assert "this CPU has no bfloat16" in choose_on_cpu(proved.manifest, None).why
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert "openvino is not installed; pip install" in choose_on_cpu(proved.manifest, None).why


def test_provenance_says_backend_threads_and_precision(command: Runner, analytic_bundle: Path, tmp_path: Path) -> None:
    options = ("--backend", "openvino", "--threads", 1, "-n", 1, "--json")
    result = command(main, analytic_bundle, "--out", tmp_path / "out", *options)
    assert result.code == 0, result
    job = json.loads((tmp_path / "out/generate.json").read_text())["job"]
    assert (job["backend"], job["precision"], job["threads"]) == ("openvino", "fp32", 1)


def test_auto_says_in_one_line_what_it_took_and_why(command: Runner, analytic_bundle: Path, tmp_path: Path) -> None:
    result = command(main, analytic_bundle, "--out", tmp_path / "out", "-n", 1)
    assert result.err == "backend auto: ort-cpu, computes in fp32 as ul-export verified the bundle\n"
    assert command(main, analytic_bundle, "--out", tmp_path / "out", "-n", 1, "--backend", "ort-cpu").err == ""


# What it refuses


def test_without_openvino_auto_works_and_bfloat16_says_what_to_install(
    command: Runner, analytic_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    out = ("--out", tmp_path / "out", "-n", 1)
    message = f"openvino is not installed; {install('openvino')}"
    command.fails(main, 2, message, analytic_bundle, *out, "--backend", "openvino")
    command.fails(main, 2, message, analytic_bundle, *out, "--precision", "bf16")
    assert command(main, analytic_bundle, *out).code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--backend", "ort-cpu", "--precision", "bf16"), "ort-cpu computes in the bundle's precision, fp32; for bf16"),
        (("--precision", "int4"), "no CPU backend computes in 'int4'; expected one of fp32, bf16"),
        (("--backend", "openvino", "--threads", 0), "number of threads is 0"),
    ],
)
def test_a_choice_that_cannot_be_is_one_line(
    command: Runner, analytic_bundle: Path, tmp_path: Path, options: tuple[Any, ...], message: str
) -> None:
    command.fails(main, 2, message, analytic_bundle, "--out", tmp_path / "out", *options)


def test_a_precision_of_the_bundle_that_openvino_lacks_is_refused(analytic_bundle: Path) -> None:
    with pytest.raises(UsageError, match="openvino computes in fp32 or bf16, not in int8"):
        OpenVinoBackend(Bundle.open(analytic_bundle), "int8")


def test_weights_come_from_the_verified_bytes(tmp_path: Path) -> None:
    bundle = write_analytic_bundle(tmp_path / "bundle")
    expected = open_backend("ort-cpu", bundle).run("encoder", {"x": X})["z_clean"]
    for file in (tmp_path / "bundle").iterdir():
        file.unlink()
    assert np.allclose(opened(bundle).run("encoder", {"x": X})["z_clean"], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("file", "data"),
    [
        ("encoder.onnx", b"not a graph"),
        ("encoder.safetensors", save({})),
        ("encoder.safetensors", save({"kernel": np.zeros((4, 3, 2, 1), np.float32)})),
    ],
)
def test_a_graph_or_weights_that_do_not_fit_are_named(analytic_bundle: Path, file: str, data: bytes) -> None:
    bundle = Bundle.open(analytic_bundle)
    bundle._held[file] = data
    with pytest.raises(BadInputError, match="graph encoder cannot be loaded"):
        opened(bundle).run("encoder", {"x": X})


def test_an_input_that_does_not_fit_is_one_line_with_its_shape(analytic_bundle: Path) -> None:
    with pytest.raises(ULError, match=r"encoder: OpenVINO failed on x float32\[2, 3, 8, 4\]"):
        opened(Bundle.open(analytic_bundle)).run("encoder", {"x": X[..., :4]})


def test_nothing_is_sent_and_no_process_is_started(analytic_bundle: Path) -> None:
    """openvino reports its own import, in a process of its own, where that is not prevented."""
    code = """
import sys
from pathlib import Path
seen = []
sys.addaudithook(lambda event, _: seen.append(event))
import ul_runtime
next(ul_runtime.load(sys.argv[1], backend="openvino", threads=1).generate(1))
print(sorted({event for event in seen if event.startswith(("socket.", "subprocess.", "os.fork", "os.posix_spawn"))}))
"""
    done = subprocess.run([sys.executable, "-c", code, analytic_bundle], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_signal_is_handled_after_backends_were_opened_and_dropped(analytic_bundle: Path) -> None:
    """OpenVINO gives the thread a stack for signals and, with several cores, takes the wrong one away: a crash."""
    code = """
import os, signal, sys
import ul_runtime
from ul_runtime.errors import StoppedError
from ul_runtime.signals import check_stopped, stop_on_signal
for _ in range(2):
    first, second = (ul_runtime.load(sys.argv[1], backend="openvino", threads=1) for _ in range(2))
    for pipeline in (first, second):
        next(pipeline.generate(1))
    del first, pipeline
    del second
with stop_on_signal():
    os.kill(os.getpid(), signal.SIGINT)
    try:
        check_stopped()
    except StoppedError:
        print(True)
"""
    done = subprocess.run([sys.executable, "-c", code, analytic_bundle], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_threads_that_call_at_once_get_their_own_results(exported_bundle: Bundle) -> None:
    backend = opened(exported_bundle)
    draw = np.random.default_rng(0)
    x = [draw.uniform(-1, 1, (3, *images(exported_bundle, backend, 1).shape[1:])).astype(np.float32) for _ in range(40)]
    alone = [backend.run("encoder", {"x": each})["z_clean"].tobytes() for each in x]
    assert len(set(alone)) == len(x)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            together = pool.map(lambda each: backend.run("encoder", {"x": each})["z_clean"].tobytes(), x)
            assert list(together) == alone
