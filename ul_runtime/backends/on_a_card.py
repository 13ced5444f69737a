"""The backends of an NVIDIA card: opened by name, and for `auto` tried against the processor before one is taken."""

import gc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ul_runtime import noise
from ul_runtime.backends import ON_A_CARD, Backend, bundle_precision, has_float32
from ul_runtime.cards import Card, cards, has_bindings
from ul_runtime.device import pixels
from ul_runtime.device.backend import DeviceBackend
from ul_runtime.errors import ULError, UsageError
from ul_runtime.guidance import Inputs, unguided
from ul_runtime.manifest import BundleInfo, GraphName
from ul_runtime.noise_process import alpha, sigma

if TYPE_CHECKING:
    from ul_runtime.bundle import Bundle
    from ul_runtime.device.memory import CudaMemory

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
    known = list(dict.fromkeys([bundle_precision(bundle), *(["fp32"] if has_float32(bundle) else [])]))
    if precision not in (None, *known):
        raise UsageError(f"{name} computes in what the bundle's graphs are in, {' or '.join(known)}, not {precision!r}")
    if options.engines is not None and name != "tensorrt":
        raise UsageError(f"--engines is for backend tensorrt; {name} has none")
    from ul_runtime.device.memory import CudaMemory

    memory = options.memory or CudaMemory(options.number)
    if name == "ort-cuda":
        from ul_runtime.backends.ort_cuda import OrtDeviceBackend, cuda_providers

        return OrtDeviceBackend(
            bundle, memory, cuda_providers(memory), say, precision=precision, require_graphs=options.require_graphs
        )
    from ul_runtime.backends.tensorrt import TensorRtBackend
    from ul_runtime.tensorrt.prepare import engines_for_card

    engines = engines_for_card(options.number, options.engines)
    return TensorRtBackend(bundle, engines, memory, say, precision=precision, require_graphs=options.require_graphs)


def card_memory(backend: Backend | None) -> "CudaMemory | None":
    """The memory of a backend on a card."""
    from ul_runtime.device.memory import CudaMemory

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
    from ul_runtime.tensorrt.prepare import engines_for_card

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
        backend.loop.run(pixels.NAME, {"x": np.zeros((2, image.channels, image.size, image.size), np.float32)})
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
        return inputs | unguided(np.arange(2) % (len(manifest.classes) + 1), x)
    return inputs | {"z_0": normals("z_0")}


def _relative(expected: np.ndarray, given: np.ndarray) -> float:
    exact = expected.astype(np.float64)
    return float(np.sqrt(np.square(given - exact).mean() / np.square(exact).mean()))
