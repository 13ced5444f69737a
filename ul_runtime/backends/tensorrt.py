"""TensorRT and TensorRT-RTX on an NVIDIA card: engines of the bundle's own graphs, from the user's cache or built."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ul_runtime.backends import bundle_precision
from ul_runtime.device.loop import DeviceLoop, Dims, Engine
from ul_runtime.device.memory import CudaMemory
from ul_runtime.errors import OutOfMemoryError, ULError, UsageError
from ul_runtime.tensorrt.prepare import Engines

if TYPE_CHECKING:
    from ul_runtime.bundle import Bundle
    from ul_runtime.guidance import Inputs
    from ul_runtime.manifest import GraphName
    from ul_runtime.walk import Walk


class TensorRtBackend:
    """Runs a bundle's graphs as engines. An engine is loaded, or built, when its graph is first run."""

    name = "tensorrt"
    threads = None

    def __init__(
        self,
        bundle: "Bundle",
        engines: Engines,
        memory: CudaMemory,
        say: Callable[[str], None],
        *,
        precision: str | None = None,
        require_graphs: bool = False,
    ) -> None:
        """`precision` None = the bundle's, else fp32; `require_graphs`: a capture that fails is an error."""
        self.precision = precision or bundle_precision(bundle)
        self._float32 = precision == "fp32"
        self._bundle, self._engines, self._memory, self._say = bundle, engines, memory, say
        self._runtime = engines.library.api.Runtime(engines.library.logger)
        self._loaded: dict[GraphName, Any] = {}
        self.loop = DeviceLoop(memory, bundle.manifest.graphs, self._bind, say, require_graphs=require_graphs)

    def run(self, graph_name: "GraphName", inputs: "Inputs") -> "Inputs":
        """See Backend.run. BadInputError: the library cannot build the graph. ULError: it fails."""
        return self.loop.run(graph_name, inputs)

    def walk(self, walk: "Walk", stop: Callable[[], bool], advance: Callable[[int], None]) -> np.ndarray:
        """See Walker.walk. Errors as for `run`."""
        return self.loop.walk(walk, stop, advance)

    def _bind(self, graph: "GraphName", dims: Dims, addresses: dict[str, int]) -> Engine:
        most = self._engines.profile.most
        if dims["b"] > most:
            raise UsageError(f"{graph}: engines take batches up to {most}, this one is of {dims['b']}; give less")
        context = self._engine(graph).create_execution_context()
        if context is None:
            raise OutOfMemoryError(f"{graph}: no memory for a batch of {dims['b']}: {self._last()}")
        for tensor in self._bundle.manifest.graphs[graph].inputs:
            shape = tuple(d if isinstance(d, int) else dims[d] for d in tensor.shape)
            if not context.set_input_shape(tensor.name, shape):
                raise ULError(f"{graph}: {tensor.name} cannot be of shape {list(shape)}: {self._last()}")
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise ULError(f"{graph}: {name} cannot be bound: {self._last()}")
        return _BoundContext(context, self._memory.stream, graph, self._last)

    def _engine(self, graph: "GraphName") -> Any:
        if graph not in self._loaded:
            data = self._engines.engine(self._bundle, graph, self._say, float32=self._float32).engine
            self._loaded[graph] = self._runtime.deserialize_cuda_engine(data)
            if self._loaded[graph] is None:
                del self._loaded[graph]
                raise ULError(f"{graph}: {self._engines.library.title} cannot load its engine: {self._last()}")
        return self._loaded[graph]

    def _last(self) -> str:
        log = self._engines.library.log
        return log[-1] if log else "no reason given"


class _BoundContext:
    """An execution context whose shapes and addresses are set."""

    def __init__(self, context: Any, stream: int, graph: str, last: Callable[[], str]) -> None:
        self._context, self._stream, self._graph, self._last = context, stream, graph, last

    def enqueue(self) -> None:
        """See Engine. A refusal records nothing in a capture, so it must never pass unseen."""
        if not self._context.execute_async_v3(self._stream):
            raise ULError(f"{self._graph}: the engine refused to run: {self._last()}")
