"""ONNX Runtime on an NVIDIA card: its tensors are bound to memory that the loop holds, and its steps are replayed.

It captures CUDA graphs itself, one for each graph number, and does not verify that a number keeps its shapes and
addresses: so a number is given to one binding and never to another.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from ul_runtime.backends import bundle_precision, one_line
from ul_runtime.backends.ort_cpu import ORT_ERRORS, load_session, session_options
from ul_runtime.device import pixels
from ul_runtime.device.backend import DeviceBackend
from ul_runtime.device.loop import DeviceLoop, Dims, Engine
from ul_runtime.device.memory import CudaMemory, Memory
from ul_runtime.device.pixels import graphs_of
from ul_runtime.errors import OutOfMemoryError, ULError, UsageError
from ul_runtime.manifest import GRAPH_NAMES

if TYPE_CHECKING:
    from collections.abc import Callable

    from ul_runtime.bundle import Bundle

_PROVIDER = "CUDAExecutionProvider"


def cuda_providers(memory: CudaMemory) -> list[Any]:
    """The provider on the memory's card and stream, capturing its runs, in full float32. UsageError: not there."""
    if _PROVIDER not in ort.get_available_providers():
        raise UsageError(
            f"onnxruntime {ort.__version__} has no {_PROVIDER}; pip uninstall onnxruntime, pip install onnxruntime-gpu"
        )
    ort.preload_dlls()  # CUDA and cuDNN of NVIDIA's Python packages, where these are installed
    options = {"device_id": memory.device, "user_compute_stream": str(memory.stream), "enable_cuda_graph": "1"}
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
        say: "Callable[[str], None]",
        *,
        precision: str | None = None,
    ) -> None:
        """`precision` None = the bundle's; `providers` as ONNX Runtime takes them, for `memory`."""
        self.precision = precision or bundle_precision(bundle)
        self._float32 = precision == "fp32"
        self._bundle, self._memory, self._providers = bundle, memory, providers
        self._sessions: dict[str, ort.InferenceSession] = {}
        self._values: list[ort.OrtValue] = []
        self._bindings = 0
        self._graphs = graphs_of(bundle.manifest)
        self.loop = DeviceLoop(memory, self._graphs, self._bind, say, captures=False)

    def _bind(self, graph: str, dims: Dims, addresses: dict[str, int]) -> Engine:
        session, entry, kind = self._session(graph), self._graphs[graph], self._memory.kind
        binding = session.io_binding()
        for tensors, bind in ((entry.inputs, binding.bind_input), (entry.outputs, binding.bind_output)):
            for tensor in tensors:
                shape = [d if isinstance(d, int) else dims[d] for d in tensor.shape]
                bind(tensor.name, kind, 0, np.dtype(tensor.dtype).type, shape, addresses[tensor.name])
        self._bindings += 1
        return _BoundSession(session, binding, self._bindings, f"{graph} {dims}")

    def _session(self, graph: str) -> ort.InferenceSession:
        if graph not in self._sessions:
            options = session_options(None)
            wanted = self._providers[0] if isinstance(self._providers[0], str) else self._providers[0][0]
            if wanted == _PROVIDER:
                options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            session = self._load(graph, options)
            if (given := session.get_providers()[0]) != wanted:
                raise ULError(f"{graph}: ONNX Runtime took {given} in place of {wanted}; ul-doctor says why")
            self._sessions[graph] = session
        return self._sessions[graph]

    def _load(self, graph: str, options: ort.SessionOptions) -> ort.InferenceSession:
        for name in GRAPH_NAMES:
            if name == graph:
                session, values = load_session(self._bundle, name, self._float32, options, self._providers)
                self._values += values
                return session
        return ort.InferenceSession(pixels.ONNX, options, providers=self._providers)


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
        except (*ORT_ERRORS, ValueError) as error:
            text = one_line(error)
            kind = OutOfMemoryError if "out of memory" in text or "Failed to allocate" in text else ULError
            raise kind(f"{self._what}: ONNX Runtime failed: {text}") from error
