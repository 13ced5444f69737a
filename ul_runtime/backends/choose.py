"""The backends of an NVIDIA card: opened by name, and for `auto` tried against the processor before one is taken."""

import gc
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ul_runtime import noise
from ul_runtime.backends import (
    _LOG,
    BACKENDS,
    NO_BF16,
    ON_A_CARD,
    PRECISIONS,
    TORCH,
    Backend,
    bundle_precision,
    check_threads,
    cpu_precision,
    gpu_loop,
    has_float32,
)
from ul_runtime.backends.gpu_loop import DeviceBackend
from ul_runtime.diffusion import alpha, sigma
from ul_runtime.errors import ULError, UsageError, require_packages
from ul_runtime.loop import Inputs, unguided
from ul_runtime.machine import Card, cards, has_bindings
from ul_runtime.manifest import BundleInfo, GraphName

if TYPE_CHECKING:
    from ul_runtime.backends.gpu import CudaMemory
    from ul_runtime.bundle import Bundle
    from ul_runtime.manifest import GraphName
    from ul_runtime.pipeline import Pipeline


class Choice(NamedTuple):
    """What `auto` stands for: a backend, the precision that it computes in (None = its own choice), and why."""

    name: str
    precision: str | None
    why: str


def choose_backend(manifest: "BundleInfo", precision: str | None) -> Choice:
    """The fastest on a processor that was proved; for a bundle in bf16 it depends on machine and installation."""
    typed = bundle_precision(manifest)
    if precision in (None, typed) and typed == cpu_precision(manifest):
        return Choice("ort-cpu", precision, f"computes in {typed} as ul-export proved the bundle")
    if precision is None and typed == "bf16":
        lacking = _lacks_bf16(manifest)
        if lacking is None:
            return Choice("openvino", "bf16", "computes in bf16 as ul-export proved the bundle")
        return Choice("ort-cpu", None, f"{in_another(manifest, 'fp32')}: {lacking}")
    if precision is None or (precision == "fp32" and has_float32(manifest)):
        return Choice("ort-cpu", precision, in_another(manifest, "fp32"))
    why = f"the one backend that computes in {precision} on a CPU; {in_another(manifest, precision)}"
    return Choice("openvino", precision, why)


def _lacks_bf16(manifest: "BundleInfo") -> str | None:
    """Why a bundle in bf16 is not computed in it on this machine; None if it can be."""
    proof = manifest.parity.get("bf16")
    if not (isinstance(proof, dict) and proof.get("openvino")):
        return "ul-export did not prove it on OpenVINO"
    if find_spec("openvino") is None:
        return "openvino is not installed; pip install 'unified-latents[openvino]' makes it faster"
    from ul_runtime.backends.openvino import has_bf16

    return None if has_bf16() else NO_BF16


def in_another(manifest: "BundleInfo", precision: str) -> str:
    """What to say where a backend computes in `precision` and the bundle is of another."""
    return f"computes in {precision} with the {bundle_precision(manifest)} bundle's weights"


def open_backend(
    name: str,
    bundle: "Bundle",
    *,
    precision: str | None = None,
    threads: int | None = None,
    allow_spinning: bool = True,
    card: "CardOptions | None" = None,
    beside: Backend | None = None,
) -> Backend:
    """The backend `name` over a verified bundle, in `precision` (None = the bundle's own, float32 if that is half).

    `auto`: on an NVIDIA card if one works and no number of threads is given, else on the processor. `card` None = the
    first, with its defaults. On a card, `beside` is another backend whose work is to be in one order with this one's.
    UsageError: unknown, not installed, or not able to compute in that precision; no other backend takes its place.
    """
    if name not in BACKENDS:
        raise UsageError(f"backend {name!r} is not known; expected one of {', '.join(BACKENDS)}")
    if name == TORCH:
        raise UsageError(f"backend torch samples a run of ul-train as it is; {bundle.path} is a bundle: leave it out")
    if name in ON_A_CARD or name == "auto":
        options = replace(card or CardOptions(), memory=card_memory(beside))
        if name in ON_A_CARD:
            return open_on_a_card(name, bundle, precision, options, _LOG.warning)
        check_threads(threads)
        if threads is None and (found := first_that_works(bundle, precision, options, _LOG.warning)) is not None:
            return found
    if card is not None:
        why = "found no NVIDIA card that works (ul-doctor says more)" if name == "auto" else "runs on the processor"
        raise UsageError(f"backend {name} {why}; leave out --devices, --engines and --require-graphs")
    return _open_on_processor(name, bundle, precision, threads, allow_spinning)


def _open_on_processor(
    name: str, bundle: "Bundle", precision: str | None, threads: int | None, allow_spinning: bool
) -> Backend:
    own = cpu_precision(bundle.manifest)
    known = list(dict.fromkeys([*PRECISIONS, own]))
    if precision not in (None, *known):
        raise UsageError(f"no backend for processors computes in {precision!r}; expected one of {', '.join(known)}")
    check_threads(threads)
    if name == "auto":
        name, precision, _ = choose_backend(bundle.manifest, precision)
    if name == "openvino":
        require_packages("openvino", extras="openvino")
        from ul_runtime.backends.openvino import OpenVinoBackend

        return OpenVinoBackend(bundle, precision or own, threads=threads)
    if precision not in (None, own, *(["fp32"] if has_float32(bundle.manifest) else [])):
        raise UsageError(f"ort-cpu computes in the bundle's precision, {own}; for {precision} give --backend openvino")
    from ul_runtime.backends.ort_cpu import OrtCpuBackend

    return OrtCpuBackend(bundle, precision=precision, threads=threads, allow_spinning=allow_spinning)


# of a step, root mean square, relative: above all that precisions do to one, below what a wrong tensor does
MOST_DIFFERENCE = 0.1
_SEED = 0
_STEPS: dict[GraphName, str] = {"prior_step": "prior", "decoder_step": "decoder"}


@dataclass(frozen=True)
class CardOptions:
    """Which card, where its engines are kept (None = the user's cache), and whether an uncaptured step is an error."""

    number: int = 0
    engines: Path | None = None
    require_graphs: bool = False
    memory: "CudaMemory | None" = None  # of the guide's backend, whose work is to be in one order with this one's


def open_on_a_card(
    name: str, bundle: "Bundle", precision: str | None, options: CardOptions, say: Callable[[str], None]
) -> Backend:
    """The backend `name` on a card, in the bundle's precision or float32. UsageError: not installed, no such card."""
    own, others = bundle_precision(bundle.manifest), ["fp32"] if has_float32(bundle.manifest) else []
    known = list(dict.fromkeys([own, *others]))
    if precision not in (None, *known):
        raise UsageError(f"{name} computes in what the bundle's graphs are in, {' or '.join(known)}, not {precision!r}")
    if options.engines is not None and name != "tensorrt":
        raise UsageError(f"--engines is for backend tensorrt; {name} has none")
    from ul_runtime.backends.gpu import CudaMemory

    memory = options.memory or CudaMemory(options.number)
    if name == "ort-cuda":
        from ul_runtime.backends.ort_cuda import OrtDeviceBackend, cuda_providers

        return OrtDeviceBackend(
            bundle, memory, cuda_providers(memory), say, precision=precision, require_graphs=options.require_graphs
        )
    from ul_runtime.backends.tensorrt import TensorRtBackend
    from ul_runtime.backends.tensorrt_engines import engines_for_card

    engines = engines_for_card(options.number, options.engines)
    return TensorRtBackend(bundle, engines, memory, say, precision=precision, require_graphs=options.require_graphs)


def card_memory(backend: Backend | None) -> "CudaMemory | None":
    """The memory of a backend on a card."""
    from ul_runtime.backends.gpu import CudaMemory

    found = backend.loop.memory if isinstance(backend, DeviceBackend) else None
    return found if isinstance(found, CudaMemory) else None


def first_that_works(
    bundle: "Bundle", precision: str | None, options: CardOptions, say: Callable[[str], None]
) -> Backend | None:
    """The fastest backend on the card whose step is the processor's; None, with every reason said, if there is none.

    Fastest by design: TensorRT, if its engines are there already, which `auto` does not take minutes to build, then
    ONNX Runtime. Nothing is said on a machine without a card.
    """
    card = _card(options.number)
    if card is None:
        return None
    for name in ON_A_CARD:
        opened: Backend | None = None
        try:
            if name == "tensorrt":
                _require_engines(bundle, precision, options)
            opened = open_on_a_card(
                name, bundle, precision, options if name == "tensorrt" else _no_engines(options), say
            )
            check_step(opened, bundle)
        except ULError as error:
            say(f"backend auto: not {name} on card {card.number} ({card.name}): {error}")
            close(opened)
            opened = None
            gc.collect()  # its engines' weights; now, and not while the next one captures
        else:
            return opened
    return None


def close(backend: Backend | None) -> None:
    """Give back the memory that its loop holds."""
    if isinstance(backend, DeviceBackend):
        with suppress(ULError):  # it may be why the backend was refused
            backend.loop.release()


def _card(number: int) -> Card | None:
    """The card, if there is one that can be used."""
    if not has_bindings():
        return None
    try:
        found = cards()
    except UsageError:  # no driver: a machine without cards; ul-doctor says more
        return None
    return found[number] if number < len(found) else None


def _no_engines(options: CardOptions) -> CardOptions:
    return replace(options, engines=None)


def _require_engines(bundle: "Bundle", precision: str | None, options: CardOptions) -> None:
    """UsageError unless the engines that make images are in the cache."""
    from ul_runtime.backends.tensorrt_engines import engines_for_card

    engines = engines_for_card(options.number, options.engines)
    for graph in filter(bundle.holds, _STEPS):
        facts = engines.facts(bundle, graph, float32=precision == "fp32")
        if engines.cache.find(facts) is None:
            raise UsageError(
                f"{graph} has no engine ({engines.cache.why(facts)}); ul-export BUNDLE --tensorrt builds them"
            )


def check_step(backend: Backend, bundle: "Bundle") -> float:
    """Largest relative difference of a step from the processor's. ULError: it fails, or no precision explains it.

    It tells a backend that works from one that does not; how exact a precision is, ul-export proves.
    """
    from ul_runtime.backends.ort_cpu import OrtCpuBackend

    processor, worst = OrtCpuBackend(bundle), 0.0
    for graph in filter(bundle.holds, _STEPS):  # of a guide, the prior alone
        inputs = _inputs(bundle.manifest, graph)
        expected, given = (each.run(graph, dict(inputs)) for each in (processor, backend))
        difference = max(_relative(expected[name], given[name]) for name in expected)
        if not difference <= MOST_DIFFERENCE:
            what = f"a step of the {_STEPS[graph]} differs from the processor's by {100 * difference:.3g} %"
            raise ULError(f"{what}; it is not used")
        worst = max(worst, difference)
    if isinstance(backend, DeviceBackend) and bundle.holds("decoder_step"):
        image = bundle.manifest.image
        backend.loop.run(gpu_loop.PIXELS, {"x": np.zeros((2, image.channels, image.size, image.size), np.float32)})
    return worst


def _inputs(manifest: BundleInfo, graph: GraphName) -> Inputs:
    """Of a step in the middle of its noise levels, for two images; of the prior, not guided."""
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


def say_choice(backend: str, precision: str | None, pipeline: "Pipeline") -> None:
    """One line on stderr: what `--backend auto` chose and why; of another, if it computes unlike the bundle."""
    from ul_runtime.backends import ON_A_CARD, TORCH, bundle_precision

    computed = pipeline.backend.precision
    if backend == "auto" and pipeline.backend.name in ON_A_CARD:
        print(f"backend auto: {pipeline.backend.name}, whose step equals the processor's", file=sys.stderr, flush=True)
    elif backend == "auto":
        why = choose_backend(pipeline.manifest, precision).why
        print(f"backend auto: {pipeline.backend.name}, {why}", file=sys.stderr, flush=True)
    elif backend == TORCH and computed != bundle_precision(pipeline.manifest):
        print(f"backend torch: computes in {computed}", file=sys.stderr, flush=True)
    elif computed != bundle_precision(pipeline.manifest):
        print(
            f"backend {pipeline.backend.name}: {in_another(pipeline.manifest, computed)}", file=sys.stderr, flush=True
        )
