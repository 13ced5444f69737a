"""What can run on this machine and what cannot, each tried and not only looked for, and what to do about it."""

import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ul_runtime.backends import INSTALL_ORT_GPU, ON_GPU, ORT_GPU, REINSTALL_ORT_GPU, Backend
from ul_runtime.backends.choose import STEPS, close, step_inputs, try_on_gpu
from ul_runtime.backends.onnx_weights import with_weights
from ul_runtime.backends.tensorrt_build import KINDS, Plan, Profile, build_engine, open_library
from ul_runtime.backends.tensorrt_engines import EngineCache
from ul_runtime.bundle import Bundle
from ul_runtime.errors import ULError, UsageError
from ul_runtime.install import install
from ul_runtime.loading import backend_of_runs, open_bundle
from ul_runtime.machine import Gpu, MachineOptions, driver_version, gpus, has_bindings, versions
from ul_runtime.manifest import GraphName

# of the prediction of `step_inputs` by the shipped model: what a backend that computes rightly finds
STEP_RMS: dict[GraphName, float] = {"prior_step": 0.588376, "decoder_step": 0.706121}
_TOLERANCE = 1e-3  # relative; float32 differs by 1e-6


@dataclass(frozen=True)
class Finding:
    """`works`: None = absent, which may be as the user wants it. `advice`: what to do, where there is something."""

    what: str
    works: bool | None
    says: str
    advice: str = ""


def examine(engines: EngineCache) -> Iterator[Finding]:
    """All findings, in the order in which one helps to understand the next."""
    bundle = open_bundle(None)
    yield Finding("CPU", True, f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores for this process")
    yield _ort_cpu(bundle)
    yield _openvino(bundle)
    gpu, found = _gpu()
    yield gpu
    for name in KINDS:
        yield _tensorrt(name, found, bundle)
    if (packages := _ort_cuda(found)) is not None:
        yield packages
    yield _engines(engines, found)
    for each in found:
        for name in ON_GPU:
            yield _on_gpu(name, each, engines.folder, bundle)
    yield _torch(found)


def _ort_cpu(bundle: Bundle) -> Finding:
    try:
        from ul_runtime.backends import ort_cpu
    except UsageError as error:
        return Finding("ort-cpu", False, str(error))
    return _computes("ort-cpu", f"onnxruntime {ort_cpu.VERSION}", lambda: ort_cpu.OrtCpuBackend(bundle), bundle)


def _install(extra: str) -> str:
    """How to install one of this package's extras."""
    again = "; it brings onnxruntime back over onnxruntime-gpu, so uninstall and force-reinstall as the README says"
    return install(extra) + (again if ORT_GPU in versions([ORT_GPU]) else "")


def _ort_cuda(found: list[Gpu]) -> Finding | None:
    """Which of ONNX Runtime's packages is there; None where GPUs are there to try it on, and nothing is in the way."""
    there = versions(("onnxruntime", ORT_GPU))
    if ORT_GPU not in there:
        install = f"with a GPU: pip uninstall -y onnxruntime && {INSTALL_ORT_GPU}"
        return None if found else Finding("ort-cuda", None, "onnxruntime-gpu is not installed", install)
    if "onnxruntime" in there:
        says = "onnxruntime and onnxruntime-gpu are both installed, and the last of them has overwritten the other"
        return Finding("ort-cuda", False, says, f"pip uninstall -y onnxruntime && {REINSTALL_ORT_GPU}")
    says = f"onnxruntime-gpu {there[ORT_GPU]}, and no GPU to try it on"
    return None if found else Finding("ort-cuda", None, says)


def _openvino(bundle: Bundle) -> Finding:
    if find_spec("openvino") is None:
        return Finding("openvino", None, "not installed", _install("openvino"))
    from ul_runtime.backends import openvino

    bf16 = "bfloat16 is native here" if openvino.has_bf16() else "no native bfloat16 here"
    by = f"OpenVINO {openvino.VERSION}, {bf16}"
    return _computes("openvino", by, lambda: openvino.OpenVinoBackend(bundle, "fp32"), bundle)


def _computes(what: str, by: str, open_: Callable[[], Backend], bundle: Bundle) -> Finding:
    """A CPU backend that runs a step of each kind, and whether rightly."""
    try:
        backend = open_()
        found = {graph: _rms(backend.run(graph, inputs)["pred"]) for graph, inputs in step_inputs(bundle)}
    except ULError as error:
        return Finding(what, False, f"{by}: {error}", "install it again")
    for graph, rms in found.items():
        if not abs(rms / STEP_RMS[graph] - 1.0) < _TOLERANCE:
            return Finding(what, False, f"{by}: a step of the {STEPS[graph]} is wrong", "install it again")
    return Finding(what, True, by)


def _rms(array: np.ndarray) -> float:
    return float(np.sqrt(np.square(array.astype(np.float64)).mean()))


def _gpu() -> tuple[Finding, list[Gpu]]:
    if not has_bindings():
        return Finding("NVIDIA GPUs", None, "cuda-core is not installed", _install("gpu")), []
    try:
        found = gpus()
    except UsageError as error:
        return Finding("NVIDIA GPUs", None, str(error), "with a GPU: install NVIDIA's driver"), []
    if not found:
        return Finding("NVIDIA GPUs", None, "none"), []
    names = "; ".join(f"{gpu.number}: {gpu.name}, {gpu.architecture}, {gpu.memory / 2**30:.0f} GiB" for gpu in found)
    return Finding("NVIDIA GPUs", True, f"{names}; the driver takes CUDA {driver_version()}"), found


def _tensorrt(name: str, found: list[Gpu], bundle: Bundle) -> Finding:
    """A library that builds an engine: for the first GPU, or ahead for an architecture where it can."""
    kind = KINDS[name]
    if find_spec(kind.module) is None:
        return Finding(name, None, "not installed", _install(kind.extra))
    try:
        library = open_library(name)
    except UsageError as error:
        return Finding(name, False, str(error))
    able = library.targets()
    if not able and not found:
        return Finding(name, None, f"{library.title}: builds only where a GPU is", "run it on a machine with a GPU")
    ahead = [gpu.architecture for gpu in found if gpu.architecture in able][:1] or able[1:2]
    other = bool(able and found and ahead[0] != found[0].architecture)
    lacking = f"; not for {found[0].architecture} of GPU 0" if other else ""
    onnx, inputs = with_weights(bundle.graph("encoder"), bundle.initializers("encoder")), bundle.manifest.graphs
    try:
        plan = Plan("doctor", "encoder", onnx, inputs["encoder"].inputs, Profile(1, 1), tuple(ahead))
        engine = build_engine(library, plan)
    except ULError as error:
        return Finding(name, False, str(error))
    where = f"builds ahead, without a GPU, for {', '.join(able)}" if able else "builds for GPU 0"
    return Finding(name, True, f"{library.title}: {where}{lacking}; tried: {len(engine)} bytes")


def _on_gpu(name: str, gpu: Gpu, engines: Path, bundle: Bundle) -> Finding:
    """A backend opened on a GPU over the model of the package, and whether its steps are the CPU's."""
    what = f"{name}, GPU {gpu.number}"
    options = MachineOptions(name, devices=str(gpu.number), engines=engines if name == "tensorrt" else None)
    try:
        opened, difference = try_on_gpu(bundle, options)
        close(opened)
        del opened
    except UsageError as error:  # not installed, or not for such a GPU
        return Finding(what, None, str(error))
    except ULError as error:
        return Finding(what, False, str(error))
    finally:
        gc.collect()
    return Finding(what, True, f"steps of {bundle.manifest.name} differ from the CPU's by {difference:.1e}")


def _torch(found: list[Gpu]) -> Finding:
    """Whether torch, which samples a run without an export, computes rightly, and on which device."""
    if find_spec("torch") is None:
        return Finding("torch", None, "not installed", _install("train"))
    try:
        backend = backend_of_runs()
    except (ImportError, OSError, UsageError) as error:
        return Finding("torch", False, f"installed, and cannot be loaded: {error}", _install("train"))
    version = f"torch {versions(['torch'])['torch']}"
    try:
        where = backend.check()
    except ULError as error:
        return Finding("torch", False, f"{version}: {error}", "install a build of torch for this machine")
    if found and where == "cpu":
        return Finding("torch", False, f"{version} on cpu, though there is a GPU", "install torch's build for CUDA")
    return Finding("torch", True, f"{version} on {where}")


def _engines(cache: EngineCache, found: list[Gpu]) -> Finding:
    builds = f"ul-export BUNDLE --tensorrt{'' if found else ' --target sm89'} builds them ahead"
    if cache.folder.exists():
        try:
            cache.check_folder()
        except ULError as error:
            return Finding("engines", False, str(error))
    entries = list(cache.entries())
    if not entries:
        return Finding("engines", None, f"none in {cache.folder}", builds)
    foreign = [entry for entry in entries if not entry.trusted]
    damaged = [entry for entry in entries if entry.facts is None and entry.trusted]
    libraries = {name: open_library(name).version for name, kind in KINDS.items() if find_spec(kind.module) is not None}
    whole = [entry.facts for entry in entries if entry.facts is not None and entry.facts.is_engine]
    absent = [facts for facts in whole if facts.library not in libraries]
    stale = [facts for facts in whole if libraries.get(facts.library, facts.version) != facts.version]
    valid = [facts for facts in whole if facts not in absent and facts not in stale]
    built_for = ", ".join(dict.fromkeys(facts.targets or facts.gpu for facts in valid))
    counts = [f"{len(valid)} valid{f' (for {built_for})' if valid else ''}"]
    counts += [f"{len(stale)} of another version of their library"] if stale else []
    counts += [f"{len(absent)} of a library that is not installed"] if absent else []
    counts += [f"{len(damaged)} damaged"] if damaged else []
    counts += [f"{len(foreign)} that are not this user's alone"] if foreign else []
    megabytes = sum(entry.size for entry in entries) / 1e6
    advice = [f"remove {entry.path}; what is needed is built anew" for entry in (*damaged, *foreign)[:3]]
    advice += ["those that are not valid can be removed, or stay for their library's return"] if stale or absent else []
    return Finding(
        "engines",
        not (damaged or foreign),
        f"{', '.join(counts)}; {megabytes:.1f} MB in {cache.folder}",
        "; ".join(advice),
    )
