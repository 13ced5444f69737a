"""Backends run the graphs of a bundle: one file each, and this one protocol. They know nothing about models."""

from typing import TYPE_CHECKING, Protocol

import numpy as np

from ul_runtime.errors import UsageError

if TYPE_CHECKING:
    from ul_runtime.bundle import Bundle
    from ul_runtime.manifest import GraphName

BACKENDS = ("auto", "ort-cpu")


class Backend(Protocol):
    """What the pipeline needs of a backend."""

    @property
    def name(self) -> str:
        """The backend's class, part of what a picture depends on."""

    @property
    def precision(self) -> str:
        """What the networks compute in, for example fp32."""

    def run(self, graph_name: "GraphName", inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs of a graph by name; arrays cross the boundary in float32 (labels: int64)."""


def open_backend(name: str, bundle: "Bundle", *, threads: int | None = None, allow_spinning: bool = True) -> Backend:
    """The backend `name` over a verified bundle; `auto` is the best that runs here. UsageError if unknown."""
    if name not in BACKENDS:
        raise UsageError(f"backend {name!r} is not known; expected one of {', '.join(BACKENDS)}")
    from ul_runtime.backends.ort_cpu import OrtCpuBackend

    return OrtCpuBackend(bundle, threads=threads, allow_spinning=allow_spinning)
