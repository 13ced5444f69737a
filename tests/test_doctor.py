"""ul-doctor tries what is installed, says what is not, and finds what is broken."""

import json
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from host_memory import HostMemory

from ul_runtime.backends import choose
from ul_runtime.backends.ort_cpu import OrtCpuBackend
from ul_runtime.backends.ort_cuda import OrtDeviceBackend
from ul_runtime.backends.tensorrt_engines import EngineCache, Facts
from ul_runtime.cli import examine as doctor
from ul_runtime.cli.doctor import main
from ul_runtime.errors import ULError, UsageError
from ul_runtime.install import install
from ul_runtime.loading import open_bundle
from ul_train import torch_backend

FACTS = Facts("tiny", "encoder", "a" * 64, "b" * 64, "tensorrt-rtx", "0.0.1", "sm89", "", "1,8,64")


def findings(command, *options):
    result = command(main, "--json", *options)
    return result, {finding["what"]: finding for finding in json.loads(result.out)}


def test_every_library_is_tried_or_said_to_be_missing(command, tmp_path):
    result, found = findings(command, "--engines", tmp_path)
    assert result.code == 0, result
    known = {"CPU", "ort-cpu", "openvino", "NVIDIA GPUs", "tensorrt", "tensorrt-rtx", "engines", "torch"}
    known |= {"ort-cuda"} if doctor._ort_cuda([]) and not doctor._gpu()[1] else set()
    assert known == {what for what in found if "GPU " not in what}
    assert found["ort-cpu"]["works"] is True
    for finding in found.values():
        assert finding["works"] or finding["says"]
        if finding["says"] == "not installed":
            assert finding["advice"].startswith("pip install ")


def test_the_table_is_for_people(command, tmp_path):
    result = command(main, "--engines", tmp_path)
    assert result.code == 0, result
    assert " yes  ort-cpu           onnxruntime " in result.out
    assert f"none in {tmp_path}" in result.out


def test_rtx_builds_an_engine_here(command, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no package for this machine")
    _, found = findings(command, "--engines", tmp_path)
    assert found["tensorrt-rtx"]["works"] is True
    assert "builds ahead, without a GPU, for sm75, sm80" in found["tensorrt-rtx"]["says"]


def test_a_backend_that_computes_wrongly_is_found(command, monkeypatch, tmp_path):
    run = OrtCpuBackend.run
    monkeypatch.setattr(
        OrtCpuBackend, "run", lambda *given: {name: 1.01 * array for name, array in run(*given).items()}
    )
    result, found = findings(command, "--engines", tmp_path)
    assert result.code == 1
    assert found["ort-cpu"]["works"] is False
    assert "does not work here: ort-cpu" in result.err


def test_engines_are_counted_and_damage_is_named(command, tmp_path):
    cache = EngineCache(tmp_path / "engines")
    cache.store(FACTS, b"engine")
    _, found = findings(command, "--engines", cache.folder)
    says = found["engines"]["says"]
    what = "of another version of their library" if find_spec("tensorrt_rtx") else "of a library that is not installed"
    assert says.startswith(f"0 valid, 1 {what};")
    path = cache.store(FACTS, b"engine")
    path.write_bytes(path.read_bytes()[:-1])
    result, found = findings(command, "--engines", cache.folder)
    assert result.code == 1
    assert found["engines"]["advice"] == f"remove {path}; what is needed is built anew"
    path.chmod(0o666)
    (cache.folder / "folder.engine").mkdir()
    result, found = findings(command, "--engines", cache.folder)
    assert result.code == 1
    assert "2 that are not this user's alone" in found["engines"]["says"]
    assert "damaged" not in found["engines"]["says"]
    cache.folder.chmod(0o777)
    _, found = findings(command, "--engines", cache.folder)
    assert "others may write to it" in found["engines"]["says"]
    assert "damaged" not in found["engines"]["says"]
    (tmp_path / "file").touch()
    _, found = findings(command, "--engines", tmp_path / "file")
    assert "is no folder" in found["engines"]["says"]


def test_valid_engines_are_said_with_their_architectures(command, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no package for this machine")
    version = doctor.open_library("tensorrt-rtx").version
    cache = EngineCache(tmp_path / "engines")
    for targets in ("sm86", "sm89"):
        cache.store(replace(FACTS, version=version, targets=targets), b"engine")
    _, found = findings(command, "--engines", cache.folder)
    assert found["engines"]["says"].startswith("2 valid (for sm86, sm89); ")
    assert found["engines"]["works"] is True


@pytest.mark.parametrize(
    ("there", "gpus", "works", "says"),
    [
        ({"onnxruntime": "1"}, 0, None, "onnxruntime-gpu is not installed"),
        ({"onnxruntime-gpu": "1"}, 0, None, "onnxruntime-gpu 1, and no GPU to try it on"),
        ({"onnxruntime-gpu": "1", "onnxruntime": "1"}, 0, False, "are both installed"),
        ({"onnxruntime-gpu": "1", "onnxruntime": "1"}, 1, False, "are both installed"),
    ],
)
def test_packages_of_onnx_runtime_that_overwrite_each_other_are_found(monkeypatch, there, gpus, works, says):
    monkeypatch.setattr(doctor, "versions", lambda _: {"python": "3"} | there)
    finding = doctor._ort_cuda([doctor.Gpu(0, "Test GPU", "sm89", 2**30)] * gpus)
    assert finding is not None
    assert finding.works is works
    assert says in finding.says


def test_packages_that_are_as_they_should_be_are_not_mentioned_where_a_gpu_is(monkeypatch):
    monkeypatch.setattr(doctor, "versions", lambda _: {"python": "3", "onnxruntime-gpu": "1"})
    assert doctor._ort_cuda([doctor.Gpu(0, "Test GPU", "sm89", 2**30)]) is None


def test_a_gpu_without_an_architecture_of_the_library_is_said(monkeypatch, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no package for this machine")
    gpu = doctor.Gpu(0, "H200", "sm90", 2**37)
    finding = doctor._tensorrt("tensorrt-rtx", [gpu], open_bundle(None))
    assert finding.works is True
    assert "not for sm90 of GPU 0" in finding.says


def opening(monkeypatch, how):
    """A machine with a GPU, on which `how(bundle)` is each of its backends."""
    gpu = doctor.Gpu(0, "Test GPU", "sm89", 2**30)
    monkeypatch.setattr(doctor, "_gpu", lambda: (doctor.Finding("NVIDIA GPUs", True, "one"), [gpu]))
    monkeypatch.setattr(choose, "open_on_gpu", lambda bundle, options, _: how(options.backend, bundle))


def test_each_backend_is_run_on_each_gpu_and_its_memory_given_back(command, monkeypatch, tmp_path):
    memories = []

    def working(name, bundle):
        if name == "tensorrt":
            raise UsageError("no TensorRT for a GPU of sm89")
        memories.append(HostMemory())
        return OrtDeviceBackend(bundle, memories[0], ["CPUExecutionProvider"])

    opening(monkeypatch, working)
    monkeypatch.setattr(doctor, "_torch", lambda _: doctor.Finding("torch", None, "not installed"))
    result, found = findings(command, "--engines", tmp_path)
    assert result.code == 0, result
    assert found["ort-cuda, GPU 0"]["works"] is True
    assert "steps of garments-32 differ from the CPU's by " in found["ort-cuda, GPU 0"]["says"]
    assert found["tensorrt, GPU 0"] == {
        "what": "tensorrt, GPU 0",
        "works": None,
        "says": "no TensorRT for a GPU of sm89",
        "advice": "",
    }
    assert memories[0].allocations > 0
    assert memories[0].held == {}


def test_a_backend_that_does_not_work_on_a_gpu_is_found(command, monkeypatch, tmp_path):
    def broken(name, bundle):
        if name == "tensorrt":
            raise ULError("TensorRT does not run here: the driver is too old")
        backend = OrtDeviceBackend(bundle, HostMemory(), ["CPUExecutionProvider"])
        run = backend.run
        backend.run = lambda *inputs: {key: 2 * value for key, value in run(*inputs).items()}
        return backend

    opening(monkeypatch, broken)
    result, found = findings(command, "--engines", tmp_path)
    assert result.code == 1
    assert "differs from the CPU's by 100 %" in found["ort-cuda, GPU 0"]["says"]
    assert found["tensorrt, GPU 0"]["says"] == "TensorRT does not run here: the driver is too old"
    assert "does not work here: tensorrt, GPU 0, ort-cuda, GPU 0" in result.err


def test_torch_that_computes_wrongly_or_does_not_see_the_gpu_is_found(monkeypatch):
    gpu = doctor.Gpu(0, "Test GPU", "sm89", 2**30)
    monkeypatch.setattr(torch_backend, "choose_device", lambda _: torch.device("cpu"))
    assert doctor._torch([]).works is True
    assert "though there is a GPU" in doctor._torch([gpu]).says
    monkeypatch.setattr(torch, "matmul", lambda a, b: a @ b + 1)
    assert "a product of two matrices on cpu is wrong" in doctor._torch([gpu]).says

    def without_kernels(a, b):
        raise RuntimeError("CUDA error: no kernel image is available")

    monkeypatch.setattr(torch, "matmul", without_kernels)
    assert "fails on cpu: CUDA error: no kernel image" in doctor._torch([gpu]).says
    assert doctor._torch([gpu]).works is False


def test_advice_warns_of_what_would_overwrite_onnxruntime_gpu(monkeypatch):
    assert doctor._install("openvino") == install("openvino")
    monkeypatch.setattr(doctor, "versions", lambda _: {"onnxruntime-gpu": "1"})
    assert "brings onnxruntime back over onnxruntime-gpu" in doctor._install("openvino")
