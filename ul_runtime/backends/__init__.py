"""Backends run the graphs of a bundle: one file each, and this one protocol. They know nothing about models."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ul_runtime.errors import BadInputError, OutOfMemoryError, ULError, UsageError, is_out_of_memory, one_line
from ul_runtime.loop import Inputs, run_on_host

if TYPE_CHECKING:
    from ul_runtime.bundle import Bundle
    from ul_runtime.loop import Loop
    from ul_runtime.manifest import BundleInfo, GraphName
    from ul_runtime.progress import Tick


_LOG = logging.getLogger(__name__)
ON_GPU = ("tensorrt", "ort-cuda")  # the fastest first
TORCH = "torch"  # of runs, not of bundles
BACKENDS = ("auto", "ort-cpu", "openvino", *ON_GPU, TORCH)
PRECISIONS = ("fp32", "bf16")
ORT_GPU = "onnxruntime-gpu"
INSTALL_ORT_GPU = f"pip install '{ORT_GPU}[cuda,cudnn]' nvidia-cublas"
REINSTALL_ORT_GPU = f"pip install --force-reinstall --no-deps {ORT_GPU}"  # where onnxruntime has been over its files
NO_BF16 = "this CPU has no bfloat16 (AVX512-BF16 or AMX)"
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
        """How many threads compute, where the bytes of an image depend on it; else None."""

    @property
    def likely_batch(self) -> int | None:
        """How many images at once suit the device; None: as many as a CPU."""

    def computed_as(self, count: int) -> int | None:
        """How many images a batch of `count` is computed as, where images depend on it; None: they do not."""

    def run(self, graph_name: "GraphName", inputs: Inputs) -> Inputs:
        """The outputs of a graph by name; arrays cross the boundary in float32 (labels: int64)."""

    def run_loops(self, loops: "Sequence[Loop]", tick: "Tick", *, pixels: bool = False) -> list[np.ndarray]:
        """The last states `b c h w` float32 of loops of the same images, run one after the other.

        With `pixels`, the last one is replaced by two: images uint8 `b h w c`, and the sums `b` of the magnitudes of
        x, finite where x is. `tick` gets 0 before each call of a graph and the number of images after it.
        """


class HostBackend:
    """What backends have in common whose loops run on the host; subclasses run single graphs."""

    likely_batch: int | None = None

    def computed_as(self, count: int) -> int | None:
        """See Backend.computed_as: images do not depend on their batch."""
        return None

    def run(self, graph_name: "GraphName", inputs: Inputs) -> Inputs:
        """See Backend.run."""
        raise NotImplementedError

    def run_loops(self, loops: "Sequence[Loop]", tick: "Tick", *, pixels: bool = False) -> list[np.ndarray]:
        """See Backend.run_loops."""
        return run_on_host(self, loops, tick, pixels=pixels)


@dataclass
class WrappedBackend(HostBackend):
    """A backend around another, which it passes for; subclasses run single graphs."""

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


def checked(bundle: "Bundle", graph_name: "GraphName", inputs: Inputs, outputs: Inputs) -> Inputs:
    """These outputs of a graph. BadInputError: one has another shape or type than the manifest says."""
    batch = len(next(iter(inputs.values())))
    for tensor in bundle.manifest.all_graphs[graph_name].outputs:
        made = outputs[tensor.name]
        shape = tuple(size if isinstance(size, int) else batch for size in tensor.shape)
        if (made.shape, made.dtype) != (shape, tensor.dtype):
            given, wanted = f"{made.dtype} {list(made.shape)}", f"{tensor.dtype} {list(shape)}"
            where = f"{bundle.path}: graph {graph_name}"
            raise BadInputError(f"{where} made {tensor.name} {given}, the manifest says {wanted}; export it again")
    return outputs


def run_failed(engine: str, graph_name: str, inputs: dict[str, np.ndarray], error: Exception) -> ULError:
    """What a backend raises where `engine` fails on these inputs."""
    if is_out_of_memory(error):
        batch = len(next(iter(inputs.values())))
        return OutOfMemoryError(f"{graph_name}: no memory is left for a batch of {batch}; give a smaller --batch-size")
    shapes = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in inputs.items())
    return ULError(f"{graph_name}: {engine} failed on {shapes}: {one_line(error)}")


def cannot_load(bundle: "Bundle", graph_name: str, error: Exception, advice: str) -> ULError:
    """What a backend raises where a graph of the bundle cannot be loaded."""
    if is_out_of_memory(error):
        return OutOfMemoryError(f"{bundle.path}: no memory is left to load graph {graph_name}; free memory")
    return BadInputError(f"{bundle.path}: graph {graph_name} cannot be loaded: {one_line(error)}; {advice}")


def check_threads(threads: int | None) -> None:
    """UsageError for a number of threads below 1, or so far above the cores' that all would stand still."""
    if threads is None:
        return
    if threads < 1:
        raise UsageError(f"the number of threads is {threads}; expected 1 or more")
    cores = os.cpu_count() or 1
    if threads > (most := max(_THREADS_ANYWHERE, 2 * cores)):
        raise UsageError(f"the number of threads is {threads}; expected at most {most}, for {cores} cores")


def bundle_precision(manifest: "BundleInfo") -> str:
    """Precision of the graphs that make images, as ul-export verified them: one for both, or "prior+decoder"."""
    return "+".join(dict.fromkeys(manifest.graphs[name].precision for name in ("prior_step", "decoder_step")))


def has_float32(manifest: "BundleInfo") -> bool:
    """Whether the bundle's images can be computed in float32."""
    return all(graph.precision == "fp32" or graph.float32_file is not None for graph in manifest.all_graphs.values())


def cpu_precision(manifest: "BundleInfo") -> str:
    """What the bundle computes in on a CPU: its own precision, or float32 if it has graphs for that beside others."""
    precisions = {graph.precision for graph in manifest.all_graphs.values() if graph.float32_file is not None}
    return "fp32" if precisions - {"int8"} else bundle_precision(manifest)
