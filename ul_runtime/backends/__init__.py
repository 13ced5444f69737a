"""Backends run the graphs of a bundle: one file each, and this one protocol. They know nothing about models."""

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ul_runtime.errors import BadInputError, ULError, UsageError

if TYPE_CHECKING:
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
class WrappedBackend:
    """A backend around another, which it passes for; subclasses run."""

    backend: Backend

    @property
    def name(self) -> str:
        """Of the wrapped backend."""
        return self.backend.name

    @property
    def precision(self) -> str:
        """Of the wrapped backend."""
        return self.backend.precision

    @property
    def threads(self) -> int | None:
        """Of the wrapped backend."""
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
