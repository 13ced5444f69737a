"""Which backend runs a bundle: the one that is named, or the fastest here, tried before it is taken; and why."""

import gc
import logging
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ul_runtime import noise
from ul_runtime.backends import (
    BACKENDS,
    NO_BF16,
    ON_GPU,
    PRECISIONS,
    TORCH,
    Backend,
    bundle_precision,
    check_threads,
    cpu_precision,
    has_float32,
)
from ul_runtime.backends.gpu_loop import DeviceBackend
from ul_runtime.diffusion import alpha, sigma
from ul_runtime.errors import ULError, UsageError
from ul_runtime.install import install, require_packages
from ul_runtime.loop import Inputs, unguided
from ul_runtime.machine import Gpu, MachineOptions, gpus, has_bindings
from ul_runtime.manifest import BundleInfo, GraphName

if TYPE_CHECKING:
    from ul_runtime.backends.gpu import CudaMemory
    from ul_runtime.bundle import Bundle

_LOG = logging.getLogger(__name__)
# relative RMS error of one step: above any precision's rounding, below a wrong tensor's
MOST_DIFFERENCE = 0.1
STEPS: dict[GraphName, str] = {"prior_step": "prior", "decoder_step": "decoder"}
_SEED = 0


class Opened(NamedTuple):
    """A backend, and what to say of it: why it was taken, or what it does unlike the bundle; empty = nothing."""

    backend: Backend
    why: str


def choose_backend(bundle: "Bundle", options: MachineOptions, beside: Backend | None = None) -> Opened:
    """The backend that `options` name over a verified bundle, and why.

    `auto`: on an NVIDIA GPU if one works and no number of threads is given, else on the CPU. On a GPU, the work is in
    one order with that of the backend `beside`.
    UsageError: unknown, not installed, or not able to compute in that precision; no other backend takes its place.
    """
    name, precision = options.backend, options.precision
    if name not in BACKENDS:
        raise UsageError(f"backend {name!r} is not known; expected one of {', '.join(BACKENDS)}")
    if name == TORCH:
        raise UsageError(f"backend torch samples a run of ul-train as it is; {bundle.path} is a bundle: leave it out")
    if name in ON_GPU:
        return _as_named(open_on_gpu(bundle, options, _memory_of(beside)), bundle)
    check_threads(options.threads)
    if name == "auto" and options.threads is None:
        found = _first_that_works(bundle, options, _memory_of(beside))
        if found is not None:
            return Opened(found, f"{found.name}, whose step equals the CPU's")
    if options.wants_gpu:
        why = "found no NVIDIA GPU that works (ul-doctor says more)" if name == "auto" else "runs on the CPU"
        raise UsageError(f"backend {name} {why}; leave out --devices, --engines and --require-graphs")
    known = list(dict.fromkeys([*PRECISIONS, cpu_precision(bundle.manifest)]))
    if precision not in (None, *known):
        raise UsageError(f"no CPU backend computes in {precision!r}; expected one of {', '.join(known)}")
    if name != "auto":
        return _as_named(_open_on_cpu(name, bundle, precision, options), bundle)
    chosen = choose_on_cpu(bundle.manifest, precision)
    return Opened(_open_on_cpu(chosen.name, bundle, chosen.precision, options), f"{chosen.name}, {chosen.why}")


def open_backend(name: str, bundle: "Bundle", *, beside: Backend | None = None, **machine: Any) -> Backend:
    """As `choose_backend`, with the other fields of MachineOptions as keywords."""
    return choose_backend(bundle, MachineOptions(name, **machine), beside).backend


def _as_named(backend: Backend, bundle: "Bundle") -> Opened:
    same = backend.precision == bundle_precision(bundle.manifest)
    return Opened(backend, "" if same else in_another(bundle.manifest, backend.precision))


def in_another(manifest: BundleInfo, precision: str) -> str:
    """What to say where a backend computes in `precision` and the bundle is of another."""
    return f"computes in {precision} with the {bundle_precision(manifest)} bundle's weights"


class CpuChoice(NamedTuple):
    """What `auto` stands for on a CPU: a backend, the precision that it computes in (None = its own), and why."""

    name: str
    precision: str | None
    why: str


def choose_on_cpu(manifest: BundleInfo, precision: str | None) -> CpuChoice:
    """The fastest CPU backend that was verified; for a bundle in bf16 it depends on machine and installation."""
    typed = bundle_precision(manifest)
    if precision in (None, typed) and typed == cpu_precision(manifest):
        return CpuChoice("ort-cpu", precision, f"computes in {typed} as ul-export verified the bundle")
    if precision is None and typed == "bf16":
        lacking = _lacks_bf16(manifest)
        if lacking is None:
            return CpuChoice("openvino", "bf16", "computes in bf16 as ul-export verified the bundle")
        return CpuChoice("ort-cpu", None, f"{in_another(manifest, 'fp32')}: {lacking}")
    if precision is None or (precision == "fp32" and has_float32(manifest)):
        return CpuChoice("ort-cpu", precision, in_another(manifest, "fp32"))
    why = f"the one backend that computes in {precision} on a CPU; {in_another(manifest, precision)}"
    return CpuChoice("openvino", precision, why)


def _lacks_bf16(manifest: BundleInfo) -> str | None:
    """Why a bundle in bf16 is not computed in it on this machine; None if it can be."""
    verified = manifest.parity.get("bf16")
    if not (isinstance(verified, dict) and verified.get("openvino")):
        return "ul-export did not verify it on OpenVINO"
    if find_spec("openvino") is None:
        return f"openvino is not installed; {install('openvino')} makes it faster"
    from ul_runtime.backends.openvino import has_bf16

    return None if has_bf16() else NO_BF16


def _open_on_cpu(name: str, bundle: "Bundle", precision: str | None, options: MachineOptions) -> Backend:
    own = cpu_precision(bundle.manifest)
    if name == "openvino":
        require_packages("openvino", "onnx", extras="openvino")
        from ul_runtime.backends.openvino import OpenVinoBackend

        return OpenVinoBackend(bundle, precision or own, threads=options.threads)
    if precision not in (None, own, *(["fp32"] if has_float32(bundle.manifest) else [])):
        raise UsageError(f"ort-cpu computes in the bundle's precision, {own}; for {precision} give --backend openvino")
    from ul_runtime.backends.ort_cpu import OrtCpuBackend

    return OrtCpuBackend(bundle, precision=precision, threads=options.threads, allow_spinning=options.spinning)


def open_on_gpu(bundle: "Bundle", options: MachineOptions, memory: "CudaMemory | None" = None) -> Backend:
    """A backend of ON_GPU, in the bundle's precision or float32. UsageError: not installed, no such GPU."""
    name, precision, required = options.backend, options.precision, options.require_graphs
    known = list(
        dict.fromkeys([bundle_precision(bundle.manifest), *(["fp32"] if has_float32(bundle.manifest) else [])])
    )
    if precision not in (None, *known):
        raise UsageError(f"{name} computes in what the bundle's graphs are in, {' or '.join(known)}, not {precision!r}")
    if options.engines is not None and name != "tensorrt":
        raise UsageError(f"--engines is for backend tensorrt; {name} has none")
    from ul_runtime.backends.gpu import CudaMemory

    memory = memory or CudaMemory(options.gpu)
    if name == "ort-cuda":
        from ul_runtime.backends.ort_cuda import OrtDeviceBackend, cuda_providers

        providers = cuda_providers(memory)
        return OrtDeviceBackend(bundle, memory, providers, precision=precision, require_graphs=required)
    from ul_runtime.backends.tensorrt import TensorRtBackend
    from ul_runtime.backends.tensorrt_engines import engines_for_gpu

    engines = engines_for_gpu(options.gpu, options.engines)
    return TensorRtBackend(bundle, engines, memory, precision=precision, require_graphs=required)


def _memory_of(backend: Backend | None) -> "CudaMemory | None":
    """The GPU memory that a backend works in."""
    from ul_runtime.backends.gpu import CudaMemory

    found = backend.loop.memory if isinstance(backend, DeviceBackend) else None
    return found if isinstance(found, CudaMemory) else None


def _first_that_works(bundle: "Bundle", options: MachineOptions, memory: "CudaMemory | None") -> Backend | None:
    """The fastest backend on the GPU whose step is the CPU's; None, with every reason logged, if there is none.

    Fastest by design: TensorRT, if its engines are there already, which `auto` does not take minutes to build, then
    ONNX Runtime. Nothing is logged on a machine without a GPU.
    """
    gpu = _gpu(options.gpu)
    if gpu is None:
        return None
    for name in ON_GPU:
        of_backend = options.of_backend(name)
        try:
            if name == "tensorrt":
                _require_engines(bundle, of_backend)
            return try_on_gpu(bundle, of_backend, memory)[0]
        except ULError as error:
            _LOG.warning("backend auto: not %s on GPU %d (%s): %s", name, gpu.number, gpu.name, error)
        gc.collect()  # its engines' weights; now, and not while the next one captures
    return None


def _gpu(number: int) -> Gpu | None:
    """The GPU, if there is one that can be used."""
    if not has_bindings():
        return None
    try:
        found = gpus()
    except UsageError:  # no driver: a machine without GPUs; ul-doctor says more
        return None
    return found[number] if number < len(found) else None


def _require_engines(bundle: "Bundle", options: MachineOptions) -> None:
    """UsageError unless the engines that make images are in the cache."""
    from ul_runtime.backends.tensorrt_engines import engines_for_gpu

    engines = engines_for_gpu(options.gpu, options.engines)
    for graph in filter(bundle.holds, STEPS):
        facts = engines.facts(bundle, graph, float32=options.precision == "fp32")
        if engines.cache.find(facts) is None:
            raise UsageError(
                f"{graph} has no engine ({engines.cache.why(facts)}); ul-export BUNDLE --tensorrt builds them"
            )


def try_on_gpu(bundle: "Bundle", options: MachineOptions, memory: "CudaMemory | None" = None) -> tuple[Backend, float]:
    """A backend of ON_GPU, and what `check_step` finds; where that is an error, its memory is given back."""
    opened = open_on_gpu(bundle, options, memory)
    try:
        return opened, check_step(opened, bundle)
    except ULError:
        close(opened)
        raise


def close(backend: Backend) -> None:
    """Give back the memory that its loop holds."""
    if isinstance(backend, DeviceBackend):
        with suppress(ULError):  # it may be why the backend was refused
            backend.loop.release()


def check_step(backend: Backend, bundle: "Bundle") -> float:
    """Largest relative difference of a step from the CPU's. ULError: it fails, or no precision explains it.

    It tells a backend that works from one that does not; how exact a precision is, ul-export verifies.
    """
    from ul_runtime.backends.ort_cpu import OrtCpuBackend

    cpu, worst = OrtCpuBackend(bundle), 0.0
    for graph, inputs in step_inputs(bundle):
        expected, given = (each.run(graph, dict(inputs)) for each in (cpu, backend))
        difference = max(_relative(expected[name], given[name]) for name in expected)
        if not difference <= MOST_DIFFERENCE:
            what = f"a step of the {STEPS[graph]} differs from the CPU's by {100 * difference:.3g} %"
            raise ULError(f"{what}; it is not used")
        worst = max(worst, difference)
    if isinstance(backend, DeviceBackend) and bundle.holds("decoder_step"):
        image = bundle.manifest.image
        backend.loop.run("pixels", {"x": np.zeros((2, image.channels, image.size, image.size), np.float32)})
    return worst


def step_inputs(bundle: "Bundle") -> Iterator[tuple[GraphName, Inputs]]:
    """For each step graph that is there (of a guide, the prior alone): a step amid its noise levels, two images."""
    for graph in filter(bundle.holds, STEPS):
        yield graph, _inputs(bundle.manifest, graph)


def _inputs(manifest: BundleInfo, graph: GraphName) -> Inputs:
    state, levels = ("z", manifest.logsnr_z) if graph == "prior_step" else ("x", manifest.logsnr_x)
    shapes = {tensor.name: tensor.shape[1:] for tensor in manifest.graphs[graph].inputs}

    def normals(name: str) -> np.ndarray:
        sizes = tuple(int(size) for size in shapes[name])
        return noise.normals(_SEED, np.arange(2), noise.PRIOR_START, sizes)

    logsnr = (levels.min + levels.max) / 2
    row = np.array([[logsnr, alpha(logsnr), sigma(logsnr), 0.5, 0.5, 0.25, 0.125, 0.0]], np.float32)
    x = normals(state)
    inputs = {state: x, "history": np.stack([x, -x], axis=1), "noise": np.zeros_like(x), "row": row.repeat(2, axis=0)}
    if graph == "prior_step":
        return inputs | unguided(np.arange(2) % (len(manifest.classes) + 1), x.shape[1:])
    return inputs | {"z_0": normals("z_0")}


def _relative(expected: np.ndarray, given: np.ndarray) -> float:
    exact = expected.astype(np.float64)
    return float(np.sqrt(np.square(given - exact).mean() / np.square(exact).mean()))
