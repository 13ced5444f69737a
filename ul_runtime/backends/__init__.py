"""Backends run the graphs of a bundle: one file each, and this one protocol. They know nothing about models."""

import logging
import os
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from ul_runtime.errors import BadInputError, ULError, UsageError, require_packages

if TYPE_CHECKING:
    from ul_runtime.backends.on_a_card import CardOptions
    from ul_runtime.bundle import Bundle
    from ul_runtime.manifest import Described, GraphName

_LOG = logging.getLogger(__name__)
ON_A_CARD = ("tensorrt", "ort-cuda")  # the fastest first
TORCH = "torch"  # of runs, not of bundles
BACKENDS = ("auto", "ort-cpu", "openvino", *ON_A_CARD, TORCH)
PRECISIONS = ("fp32", "bf16")
ORT_GPU = "onnxruntime-gpu"
INSTALL_ORT_GPU = f"pip install '{ORT_GPU}[cuda,cudnn]' nvidia-cublas"
REINSTALL_ORT_GPU = f"pip install --force-reinstall --no-deps {ORT_GPU}"  # where onnxruntime has been over its files
NO_BF16 = "this processor has no bfloat16 (AVX512-BF16 or AMX)"
_THREADS_ANYWHERE = 8  # allowed on any machine, for jobs that were begun on a larger one


class Backend(Protocol):
    """What the pipeline needs of a backend."""

    @property
    def name(self) -> str:
        """Its name for --backend."""

    @property
    def precision(self) -> str:
        """What the networks compute in, for example fp32."""

    @property
    def threads(self) -> int | None:
        """How many threads compute, where the bytes of a picture depend on it; else None."""

    def run(self, graph_name: "GraphName", inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs of a graph by name; arrays cross the boundary in float32 (labels: int64)."""


@dataclass
class InFront:
    """A backend in front of another, which it passes for; subclasses run."""

    backend: Backend

    @property
    def name(self) -> str:
        """Of the backend behind."""
        return self.backend.name

    @property
    def precision(self) -> str:
        """Of the backend behind."""
        return self.backend.precision

    @property
    def threads(self) -> int | None:
        """Of the backend behind."""
        return self.backend.threads


def run_failed(engine: str, graph_name: str, inputs: dict[str, np.ndarray], error: Exception) -> ULError:
    """What a backend raises where `engine` fails on these inputs."""
    shapes = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in inputs.items())
    return ULError(f"{graph_name}: {engine} failed on {shapes}: {one_line(error)}")


def cannot_load(bundle: "Bundle", graph_name: str, error: Exception, advice: str) -> BadInputError:
    """What a backend raises where a graph of the bundle cannot be loaded."""
    return BadInputError(f"{bundle.path}: graph {graph_name} cannot be loaded: {one_line(error)}; {advice}")


def one_line(error: Exception, most: int = 300) -> str:
    """The start of an engine's message."""
    text = " ".join(str(error).split())
    return text if len(text) <= most else text[:most] + "..."


def check_threads(threads: int | None) -> None:
    """UsageError for a number of threads below 1, or so far above the processors' that all would stand still."""
    if threads is None:
        return
    if threads < 1:
        raise UsageError(f"the number of threads is {threads}; expected 1 or more")
    processors = os.cpu_count() or 1
    if threads > (most := max(_THREADS_ANYWHERE, 2 * processors)):
        raise UsageError(f"the number of threads is {threads}; expected at most {most}, for {processors} processors")


def bundle_precision(bundle: "Described") -> str:
    """Precision of the graphs that make images, in which ul-export proved them: one for both, or "prior+decoder"."""
    graphs = bundle.manifest.graphs
    return "+".join(dict.fromkeys(graphs[name].precision for name in ("prior_step", "decoder_step")))


def has_float32(bundle: "Described") -> bool:
    """Whether the bundle's images can be computed in float32."""
    graphs = bundle.manifest.graphs
    return all(graph.precision == "fp32" or graph.float32_file is not None for graph in graphs.values())


def cpu_precision(bundle: "Described") -> str:
    """What the bundle computes in on a CPU: its own precision, or float32 if it has graphs for that beside others."""
    precisions = {graph.precision for graph in bundle.manifest.graphs.values() if graph.float32_file is not None}
    return "fp32" if precisions - {"int8"} else bundle_precision(bundle)


class Choice(NamedTuple):
    """What `auto` stands for: a backend, the precision that it computes in (None = its own choice), and why."""

    name: str
    precision: str | None
    why: str


def choose_backend(bundle: "Described", precision: str | None) -> Choice:
    """The fastest on a processor that was proved; for a bundle in bf16 it depends on machine and installation."""
    typed = bundle_precision(bundle)
    if precision in (None, typed) and typed == cpu_precision(bundle):
        return Choice("ort-cpu", precision, f"computes in {typed} as ul-export proved the bundle")
    if precision is None and typed == "bf16":
        lacking = _lacks_bf16(bundle)
        if lacking is None:
            return Choice("openvino", "bf16", "computes in bf16 as ul-export proved the bundle")
        return Choice("ort-cpu", None, f"{in_another(bundle, 'fp32')}: {lacking}")
    if precision is None or (precision == "fp32" and has_float32(bundle)):
        return Choice("ort-cpu", precision, in_another(bundle, "fp32"))
    why = f"the one backend that computes in {precision} on a CPU; {in_another(bundle, precision)}"
    return Choice("openvino", precision, why)


def _lacks_bf16(bundle: "Described") -> str | None:
    """Why a bundle in bf16 is not computed in it on this machine; None if it can be."""
    proof = bundle.manifest.parity.get("bf16")
    if not (isinstance(proof, dict) and proof.get("openvino")):
        return "ul-export did not prove it on OpenVINO"
    if find_spec("openvino") is None:
        return "openvino is not installed; pip install 'unified-latents[openvino]' makes it faster"
    from ul_runtime.backends.openvino import has_bf16

    return None if has_bf16() else NO_BF16


def in_another(bundle: "Described", precision: str) -> str:
    """What to say where a backend computes in `precision` and the bundle is of another."""
    return f"computes in {precision} with the {bundle_precision(bundle)} bundle's weights"


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
        from ul_runtime.backends.on_a_card import CardOptions, card_memory, first_that_works, open_on_a_card

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
    own = cpu_precision(bundle)
    known = list(dict.fromkeys([*PRECISIONS, own]))
    if precision not in (None, *known):
        raise UsageError(f"no backend for processors computes in {precision!r}; expected one of {', '.join(known)}")
    check_threads(threads)
    if name == "auto":
        name, precision, _ = choose_backend(bundle, precision)
    if name == "openvino":
        require_packages("openvino", extras="openvino")
        from ul_runtime.backends.openvino import OpenVinoBackend

        return OpenVinoBackend(bundle, precision or own, threads=threads)
    if precision not in (None, own, *(["fp32"] if has_float32(bundle) else [])):
        raise UsageError(f"ort-cpu computes in the bundle's precision, {own}; for {precision} give --backend openvino")
    from ul_runtime.backends.ort_cpu import OrtCpuBackend

    return OrtCpuBackend(bundle, precision=precision, threads=threads, allow_spinning=allow_spinning)
