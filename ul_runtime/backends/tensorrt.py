"""TensorRT and TensorRT-RTX on an NVIDIA GPU: engines of the bundle's own graphs, from the user's cache or built."""

import logging
from typing import TYPE_CHECKING, Any

from ul_runtime.backends import bundle_precision
from ul_runtime.backends.gpu import CudaMemory
from ul_runtime.backends.gpu_loop import DeviceBackend, DeviceLoop, Dims, Engine
from ul_runtime.backends.tensorrt_build import Library
from ul_runtime.backends.tensorrt_engines import Engines
from ul_runtime.errors import BadInputError, OutOfMemoryError, ULError

if TYPE_CHECKING:
    from ul_runtime.bundle import Bundle
    from ul_runtime.manifest import GraphName


_LOG = logging.getLogger(__name__)
_COMPILED = "kernels"  # of the graphs that were run, in the cache of engines


class TensorRtBackend(DeviceBackend):
    """Runs a bundle's graphs as engines. An engine is loaded, or built, when its graph is first run."""

    name = "tensorrt"
    threads = None

    def __init__(
        self,
        bundle: "Bundle",
        engines: Engines,
        memory: CudaMemory,
        *,
        precision: str | None = None,
        require_graphs: bool = False,
    ) -> None:
        """`precision` None = the bundle's, else fp32; `require_graphs`: a capture that fails is an error."""
        self.precision = precision or bundle_precision(bundle.manifest)
        self._float32 = precision == "fp32"
        self._bundle, self._engines, self._memory = bundle, engines, memory
        try:
            self._runtime = engines.library.api.Runtime(engines.library.logger)
        except TypeError as error:  # its factory gave nothing
            raise ULError(f"{engines.library.title} does not run here: {engines.library.last}") from error
        self._loaded: dict[str, Any] = {}
        self._compiled: Any = None  # the library's cache of kernels, where it compiles late
        self._graphs = bundle.manifest.all_graphs
        self.loop = DeviceLoop(memory, self._graphs, self._bind, require_graphs=require_graphs)

    def _bind(self, graph: "GraphName", dims: Dims, addresses: dict[str, int]) -> Engine:
        engine = self._engine(graph, dims["b"])
        context = self._context(engine)
        if context is None:
            raise OutOfMemoryError(f"{graph}: no memory for a batch of {dims['b']}: {self._engines.library.last}")
        for tensor in self._graphs[graph].inputs:
            shape = tuple(d if isinstance(d, int) else dims[d] for d in tensor.shape)
            if not context.set_input_shape(tensor.name, shape):
                raise ULError(f"{graph}: {tensor.name} cannot be of shape {list(shape)}: {self._engines.library.last}")
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise ULError(f"{graph}: {name} cannot be bound: {self._engines.library.last}")
        for tensor in self._graphs[graph].outputs:  # or it would write past the memory that the manifest asks for
            expected = tuple(d if isinstance(d, int) else dims[d] for d in tensor.shape)
            if (given := tuple(context.get_tensor_shape(tensor.name))) != expected:
                where, made = self._bundle.path, f"makes {tensor.name} {list(given)}"
                raise BadInputError(f"{where}: graph {graph} {made}, the manifest says {list(expected)}; export again")
        size = int(context.update_device_memory_size_for_shapes())
        context.set_device_memory(self.loop.scratch.at_least(size), size)
        return _BoundContext(context, self._memory.stream, graph, self._engines.library)

    def _context(self, engine: Any) -> Any:
        """An execution context that is given its memory; None: there is not enough."""
        strategy = self._engines.library.api.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self._engines.library.kind.compiles_late:
            return engine.create_execution_context(strategy)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        eager = self._engines.library.api.DynamicShapesKernelSpecializationStrategy.EAGER
        config.dynamic_shapes_kernel_specialization_strategy = eager  # later ones would not get into a captured step
        if self._compiled is None:
            self._compiled = config.create_runtime_cache()
            kept = self._engines.cache.load(self._engines.kept(_COMPILED))
            if kept is not None and not self._compiled.deserialize(kept):
                _LOG.warning(
                    "kernels are compiled anew, those that were kept do not fit: %s", self._engines.library.last
                )
        config.set_runtime_cache(self._compiled)
        return engine.create_execution_context(config)

    def _ran(self, bound_more: bool) -> None:
        """Keep the kernels that were compiled for it, for the next process."""
        if bound_more and self._compiled is not None:
            facts, now = self._engines.kept(_COMPILED), bytes(self._compiled.serialize())
            if now != self._engines.cache.load(facts):
                self._engines.cache.store(facts, now)

    def _engine(self, graph: "GraphName", batch: int) -> Any:
        """The engine of a graph that takes such a batch; one that takes less stays with the contexts that it has."""
        loaded, batched = self._loaded.get(graph), self._graphs[graph].inputs[0].name
        if loaded is None or loaded.get_tensor_profile_shape(batched, 0)[2][0] < batch:
            prepared = self._engines.engine(self._bundle, graph, float32=self._float32, batch=batch)
            loaded = self._runtime.deserialize_cuda_engine(prepared.engine)
            if loaded is None:
                raise ULError(
                    f"{graph}: {self._engines.library.title} cannot load its engine: {self._engines.library.last}"
                )
            self._loaded[graph] = loaded
        return loaded


class _BoundContext:
    """An execution context whose shapes and addresses are set."""

    def __init__(self, context: Any, stream: int, graph: str, library: Library) -> None:
        self._context, self._stream, self._graph, self._library = context, stream, graph, library

    def enqueue(self) -> None:
        """See Engine. A refusal records nothing in a capture, so it must never pass unseen."""
        if not self._context.execute_async_v3(self._stream):
            raise ULError(f"{self._graph}: the engine refused to run: {self._library.last}")
