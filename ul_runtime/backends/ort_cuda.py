"""ONNX Runtime on an NVIDIA GPU: its tensors are bound to memory that the loop holds, and its steps are replayed.

It captures CUDA graphs itself, one for each graph number, and does not verify that a number keeps its shapes and
addresses: so a number is given to one binding and never to another.
"""

import logging
import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from ul_runtime.backends import INSTALL_ORT_GPU, bundle_precision
from ul_runtime.backends.gpu import CudaMemory, Memory
from ul_runtime.backends.gpu_loop import DeviceBackend, DeviceLoop, Dims, Engine
from ul_runtime.backends.ort_cpu import ORT_ERRORS, load_session, session_options
from ul_runtime.errors import BadInputError, OutOfMemoryError, ULError, UsageError, is_out_of_memory, one_line

if TYPE_CHECKING:
    from ul_runtime.bundle import Bundle
    from ul_runtime.manifest import GraphName


_LOG = logging.getLogger(__name__)
_PROVIDER = "CUDAExecutionProvider"
_CAPTURES = "enable_cuda_graph"


def cuda_providers(memory: CudaMemory) -> list[Any]:
    """The provider on the memory's GPU and stream, capturing its runs, in full float32. UsageError: not there."""
    if _PROVIDER not in ort.get_available_providers():
        raise UsageError(
            f"onnxruntime {ort.__version__} has no {_PROVIDER}; pip uninstall onnxruntime, {INSTALL_ORT_GPU}"
        )
    ort.set_default_logger_severity(3)  # it warns of every session
    with redirect_stdout(sys.stderr):
        ort.preload_dlls()  # CUDA and cuDNN of NVIDIA's Python packages, where these are installed
    options = {"device_id": memory.number, "user_compute_stream": str(memory.stream), _CAPTURES: "1"}
    return [(_PROVIDER, options | {"use_tf32": "0"})]


class OrtDeviceBackend(DeviceBackend):
    """Runs a bundle's graphs in a device's memory. A session is built when its graph is first run."""

    name = "ort-cuda"
    threads = None

    def __init__(
        self,
        bundle: "Bundle",
        memory: Memory,
        providers: list[Any],
        *,
        precision: str | None = None,
        require_graphs: bool = False,
    ) -> None:
        """`precision` None = the bundle's; `providers` as ONNX Runtime takes them, for `memory`.

        `require_graphs`: a graph that it cannot capture is an error, and not run node by node.
        """
        self.precision = precision or bundle_precision(bundle.manifest)
        self._float32 = precision == "fp32"
        self._bundle, self._memory, self._providers = bundle, memory, providers
        self._require_graphs = require_graphs
        self._sessions: dict[GraphName, ort.InferenceSession] = {}
        self._values: list[ort.OrtValue] = []
        self._bindings = 0
        self._graphs = bundle.manifest.all_graphs
        self.loop = DeviceLoop(memory, self._graphs, self._bind, captures=False, on_release=self._close)

    def _close(self) -> None:
        """Sessions hold the memory of what they ran and captured as long as they live."""
        self._sessions.clear()
        self._values.clear()

    def _bind(self, graph: "GraphName", dims: Dims, addresses: dict[str, int]) -> Engine:
        session, entry, kind = self._session(graph), self._graphs[graph], self._memory.kind
        number = self._memory.number  # of another, ONNX Runtime would copy the inputs once, and later ones never
        binding = session.io_binding()
        for tensors, bind in ((entry.inputs, binding.bind_input), (entry.outputs, binding.bind_output)):
            for tensor in tensors:
                shape = [d if isinstance(d, int) else dims[d] for d in tensor.shape]
                bind(tensor.name, kind, number, np.dtype(tensor.dtype).type, shape, addresses[tensor.name])
        self._bindings += 1
        return _BoundSession(session, binding, self._bindings, f"{graph} {dims}")

    def _session(self, graph: "GraphName") -> ort.InferenceSession:
        if graph not in self._sessions:
            options = session_options(None)
            wanted = self._providers[0] if isinstance(self._providers[0], str) else self._providers[0][0]
            # A few int64 nodes compute sizes on the CPU; enable_cuda_graph refuses all others there.
            session = self._load(graph, options, self._providers)
            if (given := session.get_providers()[0]) != wanted:
                raise ULError(f"{graph}: ONNX Runtime took {given} in place of {wanted}: {INSTALL_ORT_GPU}")
            self._sessions[graph] = session
        return self._sessions[graph]

    def _load(self, graph: "GraphName", options: ort.SessionOptions, providers: list[Any]) -> ort.InferenceSession:
        try:
            session, values = load_session(self._bundle, graph, self._float32, options, providers)
        except BadInputError as error:
            if (uncaptured := _without_graphs(providers)) is None or self._require_graphs:
                raise
            session = self._load(graph, session_options(None), uncaptured)
            _LOG.warning("%s is run node by node, ONNX Runtime does not capture it: %s", graph, error)
            return session
        self._values += values
        return session


def _without_graphs(providers: list[Any]) -> list[Any] | None:
    """These providers without captures; None: they capture nothing."""
    first = providers[0]
    if isinstance(first, str) or first[1].get(_CAPTURES) != "1":
        return None
    return [(first[0], first[1] | {_CAPTURES: "0"}), *providers[1:]]


class _BoundSession:
    """A session bound to addresses, with a graph number of its own."""

    def __init__(self, session: ort.InferenceSession, binding: ort.IOBinding, number: int, what: str) -> None:
        self._session, self._binding, self._what = session, binding, what
        self._options = ort.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(number))
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def enqueue(self) -> None:
        """See Engine."""
        try:
            self._session.run_with_iobinding(self._binding, self._options)
        except (*ORT_ERRORS, ValueError, RuntimeError) as error:  # RuntimeError: what a bound run raises
            raise _failed(f"{self._what}: ONNX Runtime failed", error) from error


def _failed(what: str, error: Exception) -> ULError:
    kind = OutOfMemoryError if is_out_of_memory(error) else ULError
    return kind(f"{what}: {one_line(error)}")
