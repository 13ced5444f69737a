"""Without a GPU: what the code for one calls is there in the installed packages, and what is missing is said."""

import gc
import inspect
import re

import pytest

from ul_runtime.backends import ON_GPU, gpu, ort_cuda
from ul_runtime.backends import tensorrt as backend
from ul_runtime.backends.choose import open_backend
from ul_runtime.bundle import Bundle
from ul_runtime.errors import UsageError
from ul_runtime.machine import Gpu, gpus


def gpu_or_reason() -> str:
    """Empty where a GPU can be used."""
    try:
        return "" if gpus() else "none"
    except UsageError as error:
        return str(error)


def test_the_cuda_runtime_has_what_the_memory_calls():
    runtime = pytest.importorskip("cuda.bindings.runtime")
    names = set(re.findall(r"(?:self\._cuda|runtime)\.(\w+)(?:\.(\w+))?", inspect.getsource(gpu.CudaMemory)))
    assert len(names) > 15
    for name, member in names:
        assert hasattr(runtime, name), name
        assert not member or hasattr(getattr(runtime, name), member), f"{name}.{member}"


@pytest.fixture
def cuda(monkeypatch):
    """The CUDA runtime of the installed package, with functions in place of those that need a GPU: their calls."""
    runtime = pytest.importorskip("cuda.bindings.runtime")
    calls, good, addresses = [], runtime.cudaError_t.cudaSuccess, iter(range(1, 100))
    answers = {"cudaGetDevice": (good, 5), "cudaStreamCreateWithFlags": (good, 77), "cudaStreamEndCapture": (good, 8)}
    answers |= {"cudaGraphInstantiate": (good, 9)}

    def stand_in(name):
        def call(*arguments):
            calls.append((name, *arguments))
            return (good, next(addresses)) if name == "cudaMalloc" else answers.get(name, (good,))

        return call

    for name in re.findall(r"(?:self\._cuda|runtime)\.(cuda[A-Z]\w+)\b", inspect.getsource(gpu)):
        if callable(getattr(runtime, name)) and not isinstance(getattr(runtime, name), type):
            monkeypatch.setattr(runtime, name, stand_in(name))
    monkeypatch.setattr(gpu, "gpus", lambda: [Gpu(0, "Test GPU", "sm89", 2**30)])
    return calls


def test_a_memory_that_nobody_holds_any_more_gives_back_what_it_has(cuda):
    held = gpu.CudaMemory()
    kept, freed = held.allocate(10), held.allocate(20)
    held.free(freed)
    cuda.clear()
    cycle = [held]
    cycle.append(cycle)
    del held, cycle
    gc.collect()
    assert cuda == [
        ("cudaGetDevice",),
        ("cudaSetDevice", 0),
        ("cudaStreamSynchronize", 77),
        ("cudaFree", kept),
        ("cudaSetDevice", 5),
    ]


def test_no_garbage_is_collected_while_a_step_is_captured(cuda):
    held, seen = gpu.CudaMemory(), []
    held.capture(lambda: seen.append(gc.isenabled()))()
    assert seen == [False]
    assert gc.isenabled()
    assert ("cudaGraphLaunch", 9, 77) in cuda
    with pytest.raises(ZeroDivisionError):
        held.capture(lambda: seen.append(1 // 0))
    assert gc.isenabled()
    assert cuda[-1] == ("cudaStreamEndCapture", 77)


def test_tensorrt_has_what_the_backend_calls():
    api = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no package for this machine")
    source = inspect.getsource(backend)
    for class_, pattern in (
        ("IExecutionContext", r"\bcontext\.(\w+)\("),
        ("Runtime", r"_runtime\.(\w+)\("),
        ("ICudaEngine", r"(?:\bengine|loaded)\.(\w+)\((?!graph)"),
        ("IRuntimeConfig", r"config\.(\w+)\("),
        ("IRuntimeCache", r"_compiled\.(\w+)\("),
    ):
        called = set(re.findall(pattern, source))
        assert called, class_
        assert called <= set(dir(getattr(api, class_))), class_
    assert hasattr(api.ExecutionContextAllocationStrategy, "USER_MANAGED")
    assert hasattr(api.DynamicShapesKernelSpecializationStrategy, "EAGER")
    assert hasattr(api.IRuntimeConfig, "dynamic_shapes_kernel_specialization_strategy")


@pytest.mark.parametrize("name", ON_GPU)
def test_a_backend_on_a_gpu_says_why_it_cannot_be(name, analytic_bundle):
    if not gpu_or_reason():
        pytest.skip("there is a GPU here")
    with pytest.raises(
        UsageError, match=r"no NVIDIA GPU( can be used: .*driver| 0 here)|cuda-bindings is not installed"
    ):
        open_backend(name, Bundle.open(analytic_bundle))
    with pytest.raises(UsageError, match=f"{name} computes in what the bundle's graphs are in, fp32, not 'bf16'"):
        open_backend(name, Bundle.open(analytic_bundle), precision="bf16")


def test_onnx_runtime_without_its_cuda_provider_says_what_to_install(monkeypatch):
    monkeypatch.setattr(ort_cuda.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UsageError, match="pip install 'onnxruntime-gpu"):
        ort_cuda.cuda_providers(None)  # type: ignore[arg-type]
