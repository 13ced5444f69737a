"""What `auto` does where a GPU is, with a device that is the host's own memory in the GPU's place."""

import numpy as np
import pytest
from exported_run import PLAIN, exported_run
from host_memory import HostMemory

from ul_runtime.backends import choose, ort_cuda
from ul_runtime.backends.choose import MOST_DIFFERENCE, check_step, choose_backend, open_backend
from ul_runtime.backends.ort_cpu import OrtCpuBackend
from ul_runtime.backends.ort_cuda import OrtDeviceBackend, _BoundSession
from ul_runtime.bundle import Bundle
from ul_runtime.errors import BadInputError, OutOfMemoryError, ULError, UsageError, is_out_of_memory
from ul_runtime.machine import Gpu, MachineOptions
from ul_runtime.samplers import A


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(exported_run(PLAIN, tmp_path_factory).bundle)


class Wrong(OrtCpuBackend):
    """A backend one of whose inputs is not what it was given."""

    def run(self, graph_name, inputs):
        return super().run(graph_name, inputs | {"row": inputs["row"] * (np.arange(8) != A)})


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A machine with a GPU; the backends that it opens, by name: to be filled in."""
    backends: dict[str, object] = {}

    def opened(bundle, options, memory=None):
        if isinstance(backends.get(options.backend), OrtDeviceBackend | Wrong):
            return backends[options.backend]
        raise UsageError(f"{options.backend} is not installed")

    monkeypatch.setattr(choose, "has_bindings", lambda: True)
    monkeypatch.setattr(choose, "gpus", lambda: [Gpu(0, "Test GPU", "sm89", 2**30)])
    monkeypatch.setattr(choose, "open_on_gpu", opened)
    monkeypatch.setattr(choose, "_require_engines", lambda *_: None)
    return backends


def working(bundle: Bundle) -> OrtDeviceBackend:
    return OrtDeviceBackend(bundle, HostMemory(), ["CPUExecutionProvider"])


def test_a_step_of_a_backend_that_works_is_the_cpus(bundle):
    assert check_step(working(bundle), bundle) < 1e-6


def test_a_step_with_a_wrong_input_is_seen(bundle):
    with pytest.raises(ULError, match="differs from the CPU's by"):
        check_step(Wrong(bundle), bundle)


def test_a_decoder_that_fails_is_seen(bundle):
    backend = working(bundle)
    run = backend.run
    backend.run = lambda name, inputs: {
        key: value * (2 if name == "decoder_step" else 1) for key, value in run(name, inputs).items()
    }
    with pytest.raises(ULError, match="a step of the decoder differs"):
        check_step(backend, bundle)


def test_a_backend_that_is_refused_leaves_the_memory_of_its_gpu(bundle, gpu):
    memory = HostMemory()
    refused = OrtDeviceBackend(bundle, memory, ["CPUExecutionProvider"])
    run = refused.run
    refused.run = lambda name, inputs: {key: value * 2 for key, value in run(name, inputs).items()}
    gpu["ort-cuda"] = refused
    assert open_backend("auto", bundle).name == "ort-cpu"
    assert memory.allocations > 0
    assert memory.held == {}
    assert refused._sessions == {}


def test_onnx_runtimes_failures_for_want_of_memory_are_told_from_others():
    long = "Error in execution: Non-zero status code returned while running Conv node. " + "x" * 300
    assert is_out_of_memory(RuntimeError(f"{long} Failed to allocate memory for requested buffer of size 8"))
    assert is_out_of_memory(RuntimeError("CUDA failure 2: out of memory"))
    assert not is_out_of_memory(RuntimeError(f"{long} cuDNN is unavailable"))
    assert not is_out_of_memory(None)


class Bound:
    """What a session's run raises: RuntimeError, not one of ONNX Runtime's own errors."""

    def __init__(self, text: str) -> None:
        self.text = text

    def run_with_iobinding(self, *_: object) -> None:
        raise RuntimeError(self.text)


@pytest.mark.parametrize(("text", "kind"), [("Failed to allocate", OutOfMemoryError), ("no kernel", ULError)])
def test_a_bound_run_that_fails_is_an_error_of_ours(text, kind):
    with pytest.raises(ULError, match=f"decoder: ONNX Runtime failed: {text}") as caught:
        _BoundSession(Bound(text), None, 1, "decoder").enqueue()  # type: ignore[arg-type]
    assert type(caught.value) is kind


def test_a_step_that_is_not_finite_is_seen(bundle):
    backend = working(bundle)
    run = backend.run
    backend.run = lambda name, inputs: {key: value * np.nan for key, value in run(name, inputs).items()}
    with pytest.raises(ULError, match="by nan %"):
        check_step(backend, bundle)
    assert 0 < MOST_DIFFERENCE < 1


def test_auto_takes_the_first_that_works_and_says_why_not_the_others(bundle, gpu, caplog):
    gpu["ort-cuda"] = working(bundle)
    found = choose_backend(bundle, MachineOptions())
    assert found == (gpu["ort-cuda"], "ort-cuda, whose step equals the CPU's")
    assert [record.message for record in caplog.records] == [
        "backend auto: not tensorrt on GPU 0 (Test GPU): tensorrt is not installed"
    ]


def test_auto_goes_to_the_cpu_where_a_gpu_computes_wrongly(bundle, gpu, caplog):
    gpu |= {"tensorrt": Wrong(bundle), "ort-cuda": Wrong(bundle)}
    assert open_backend("auto", bundle).name == "ort-cpu"
    assert [record.message.split(": ")[1] for record in caplog.records] == [
        f"not {name} on GPU 0 (Test GPU)" for name in ("tensorrt", "ort-cuda")
    ]


def test_auto_with_threads_is_the_cpu(bundle, gpu):
    gpu["tensorrt"] = working(bundle)
    assert open_backend("auto", bundle, threads=1).name == "ort-cpu"


def test_what_is_said_about_gpus_is_refused_where_none_works(bundle, gpu):
    for options in ({"devices": "0"}, {"devices": "3"}, {"require_graphs": True}):
        with pytest.raises(UsageError, match="found no NVIDIA GPU that works"):
            open_backend("auto", bundle, **options)
    with pytest.raises(UsageError, match="ort-cpu runs on the CPU; leave out --devices"):
        open_backend("ort-cpu", bundle, devices="1")
    assert open_backend("auto", bundle).name == "ort-cpu"


@pytest.mark.parametrize("words", [["--devices", "0,0"], ["--devices", "gpu"], ["--devices", ""], ["--devices=-1"]])
def test_devices_are_different_numbers(words, command, bundle, tmp_path):
    from ul_runtime.cli import generate

    result = command(generate.main, bundle.path, "--out", tmp_path / "out", *words)
    assert result.code == 2
    assert "--devices" in result.err
    assert not (tmp_path / "out").exists()


def test_a_guide_of_which_only_the_prior_is_read_is_tried_by_its_prior(bundle, gpu):
    prior_alone = Bundle.open(bundle.path, graphs=["prior_step"])
    gpu["ort-cuda"] = working(prior_alone)
    assert open_backend("auto", prior_alone) is gpu["ort-cuda"]
    gpu["ort-cuda"] = Wrong(prior_alone)
    assert open_backend("auto", prior_alone).name == "ort-cpu"


@pytest.mark.parametrize("required", [False, True])
def test_a_graph_that_onnx_runtime_does_not_capture_is_run_without_and_said(bundle, monkeypatch, caplog, required):
    load, tried = ort_cuda.load_session, []

    def refusing(bundle, name, float32, options, providers):
        tried.append(providers[0][1]["enable_cuda_graph"])
        if tried[-1] == "1":
            raise BadInputError("bundle: graph prior_step cannot be loaded: a node is not on the GPU")
        return load(bundle, name, float32, options, ["CPUExecutionProvider"])

    monkeypatch.setattr(ort_cuda, "load_session", refusing)
    providers = [("CPUExecutionProvider", {"enable_cuda_graph": "1"})]
    backend = OrtDeviceBackend(bundle, HostMemory(), providers, require_graphs=required)
    if required:
        with pytest.raises(BadInputError, match="a node is not on the GPU"):
            check_step(backend, bundle)
        assert (tried, caplog.records) == (["1"], [])
    else:
        assert check_step(backend, bundle) < 1e-6
        assert tried == ["1", "0"] * 3
        assert [each.message.split(" is run node by node")[0] for each in caplog.records] == [
            "prior_step",
            "decoder_step",
            "pixels",
        ]
