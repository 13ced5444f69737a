"""Without a GPU: what the code for one calls is there in the installed packages, and what is missing is said."""

import inspect
import re

import pytest

from ul_runtime.backends import ON_GPU, ort_cuda
from ul_runtime.backends import tensorrt as backend
from ul_runtime.backends.choose import open_backend
from ul_runtime.bundle import Bundle
from ul_runtime.errors import UsageError
from ul_runtime.machine import gpus


def gpu_or_reason() -> str:
    """Empty where a GPU can be used."""
    try:
        return "" if gpus() else "none"
    except UsageError as error:
        return str(error)


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
    with pytest.raises(UsageError, match=r"no NVIDIA GPU( can be used: .*driver| 0 here)|cuda-core is not installed"):
        open_backend(name, Bundle.open(analytic_bundle))
    with pytest.raises(UsageError, match=f"{name} computes in what the bundle's graphs are in, fp32, not 'bf16'"):
        open_backend(name, Bundle.open(analytic_bundle), precision="bf16")


def test_onnx_runtime_without_its_cuda_provider_says_what_to_install(monkeypatch):
    monkeypatch.setattr(ort_cuda.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UsageError, match="pip install 'onnxruntime-gpu"):
        ort_cuda.cuda_providers(None)  # type: ignore[arg-type]
