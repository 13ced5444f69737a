"""What the loop needs of a device, and the CUDA device, by NVIDIA's own bindings."""

import ctypes
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

from ul_runtime.errors import OutOfMemoryError, ULError, UsageError
from ul_runtime.machine import gpus
from ul_runtime.noise import quantile_table

SOURCE_FILE = Path(__file__).with_name("noise.cu")
PTX_FILE = SOURCE_FILE.with_suffix(".ptx")
KERNEL = "normals"
_THREADS = 256  # of a block, four values each
_MOST_BLOCKS = 65535  # in the second dimension of a grid
_WORD = 0xFFFFFFFF
_TYPES = (*[ctypes.c_void_p] * 3, *[ctypes.c_uint] * 4)


class NoiseKernel:
    """The kernel on the current device. `table` is the address there of noise.quantile_table()."""

    def __init__(self, table: int) -> None:
        """ULError: the driver does not take it."""
        from cuda.bindings import driver

        self._driver, self._table = driver, table
        module = self._do(driver.cuModuleLoadData(PTX_FILE.read_bytes() + b"\0"))
        self._kernel = self._do(driver.cuModuleGetFunction(module, KERNEL.encode()))

    def enqueue(self, to: int, seed: int, indices: int, rows: int, stream: int, size: int, order: int) -> None:
        """See Memory.normals; `order` is the CUDA stream. ULError."""
        blocks = -(-size // (4 * _THREADS))
        if blocks > _MOST_BLOCKS:
            raise ULError(f"noise of {size} values an image; a GPU makes at most {4 * _THREADS * _MOST_BLOCKS}")
        values = (to, self._table, indices, seed & _WORD, seed >> 32, stream, size)
        self._do(
            self._driver.cuLaunchKernel(self._kernel, rows, blocks, 1, _THREADS, 1, 1, 0, order, (values, _TYPES), 0)
        )

    def _do(self, result: tuple[Any, ...]) -> Any:
        error, *values = result
        if error != self._driver.CUresult.CUDA_SUCCESS:
            raise ULError(f"noise on an NVIDIA GPU: {error.name}; ul-doctor says what works here")
        return values[0] if values else None


RLock: TypeAlias = AbstractContextManager[bool]  # of threading.RLock()
_CAPTURING = threading.RLock()


class Memory(Protocol):
    """A device's memory and the one order in which all work on it happens; addresses are in bytes."""

    @property
    def kind(self) -> str:
        """What engines call the device, for example cuda."""

    @property
    def number(self) -> int:
        """Which device of its kind, from 0."""

    @property
    def lock(self) -> RLock:
        """Held by the one thread whose work is on its way: tensors are shared by all loops."""

    def use(self) -> None:
        """Make it the calling thread's current device, in which libraries allocate and run. ULError."""

    def allocate(self, size: int) -> int:
        """Address of `size` bytes. OutOfMemoryError."""

    def free(self, address: int) -> None:
        """Give them back."""

    def upload(self, address: int, array: np.ndarray) -> None:
        """From an array, which must not change before `wait`."""

    def download(self, address: int, array: np.ndarray) -> None:
        """Into an array, which is ready after `wait`."""

    def copy(self, to: int, source: int, size: int, *, rows: int = 1, to_pitch: int = 0, pitch: int = 0) -> None:
        """`rows` pieces of `size` bytes each, `to_pitch` and `pitch` bytes apart, within the device."""

    def clear(self, address: int, size: int) -> None:
        """Make so many bytes zero."""

    def normals(self, to: int, seed: int, indices: int, rows: int, stream: int, size: int) -> None:
        """Noise `rows size` float32 to there, the bytes of noise.normals; `indices` int64 `rows` are there as well."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """What repeats all that `work` enqueues, addresses and sizes as they are; nothing is run. ULError."""

    def wait(self) -> None:
        """Until all work so far is done."""


class Scratch:
    """Memory for what engines compute on their way, shared by all that run one after the other.

    What was once given out stays where it is, for captured steps hold its address; a larger request gets a new piece.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._pieces: list[tuple[int, int]] = []  # address, size; ascending

    def at_least(self, size: int) -> int:
        """Address of so many bytes, of which nothing lasts from one run to the next. OutOfMemoryError."""
        if not self._pieces or self._pieces[-1][1] < size:
            self._pieces.append((self._memory.allocate(max(1, size)), size))
        return self._pieces[-1][0]

    def release(self) -> None:
        """Give all back; nothing may run any more that was given some."""
        for address, _ in self._pieces:
            self._memory.free(address)
        self._pieces.clear()


class CudaMemory:
    """One NVIDIA GPU, and a stream of its own. What it allocated is given back with it."""

    kind = "cuda"

    def __init__(self, device: int = 0) -> None:
        """UsageError: no bindings, or no such GPU."""
        if device >= (found := len(gpus())):
            raise UsageError(f"there is no NVIDIA GPU {device} here, but {found}, counted from 0; ul-doctor lists them")
        from cuda.bindings import runtime

        self._cuda = runtime
        self.number = device
        self.use()
        self.stream = int(self._do(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking)))
        self.lock = threading.RLock()
        self._noise: NoiseKernel | None = None
        self._held: set[int] = set()
        weakref.finalize(self, _give_back, runtime, device, self.stream, self._held).atexit = False

    def use(self) -> None:
        """See Memory. The current device is a thread's own, and other pipelines and libraries change it."""
        self._do(self._cuda.cudaSetDevice(self.number))

    def allocate(self, size: int) -> int:
        """See Memory."""
        address = int(self._do(self._cuda.cudaMalloc(size)))
        self._held.add(address)
        return address

    def free(self, address: int) -> None:
        """See Memory."""
        self._held.discard(address)
        self._do(self._cuda.cudaFree(address))

    def upload(self, address: int, array: np.ndarray) -> None:
        """See Memory."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._do(self._cuda.cudaMemcpyAsync(address, array.ctypes.data, array.nbytes, kind, self.stream))

    def download(self, address: int, array: np.ndarray) -> None:
        """See Memory."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._do(self._cuda.cudaMemcpyAsync(array.ctypes.data, address, array.nbytes, kind, self.stream))

    def copy(self, to: int, source: int, size: int, *, rows: int = 1, to_pitch: int = 0, pitch: int = 0) -> None:
        """See Memory."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        if rows == 1:
            self._do(self._cuda.cudaMemcpyAsync(to, source, size, kind, self.stream))
        else:
            self._do(self._cuda.cudaMemcpy2DAsync(to, to_pitch, source, pitch, size, rows, kind, self.stream))

    def clear(self, address: int, size: int) -> None:
        """See Memory."""
        self._do(self._cuda.cudaMemsetAsync(address, 0, size, self.stream))

    def normals(self, to: int, seed: int, indices: int, rows: int, stream: int, size: int) -> None:
        """See Memory. ULError: the driver does not take the kernel."""
        if self._noise is None:
            table = np.stack(quantile_table())
            at = self.allocate(table.nbytes)  # as long as this memory
            self.upload(at, table)
            self.wait()
            self._noise = NoiseKernel(at)
        self._noise.enqueue(to, seed, indices, rows, stream, size, self.stream)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """See Memory. ULError: something that `work` does cannot be captured."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._do(self._cuda.cudaStreamBeginCapture(self.stream, mode))
        try:
            with no_collection():
                work()
        finally:
            ended = self._cuda.cudaStreamEndCapture(self.stream)  # or the stream takes no work any more
        graph = self._do(ended)
        executable = self._do(self._cuda.cudaGraphInstantiate(graph, 0))
        self._do(self._cuda.cudaGraphDestroy(graph))

        def replay() -> None:
            self._do(self._cuda.cudaGraphLaunch(executable, self.stream))

        weakref.finalize(replay, self._cuda.cudaGraphExecDestroy, executable)
        return replay

    def wait(self) -> None:
        """See Memory."""
        self._do(self._cuda.cudaStreamSynchronize(self.stream))

    def _do(self, result: tuple[Any, ...]) -> Any:
        """The value of a call of the runtime; its error as ours."""
        error, *values = result
        if error == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
            raise OutOfMemoryError(f"NVIDIA GPU {self.number} has no memory left; give a smaller --batch-size")
        if error != self._cuda.cudaError_t.cudaSuccess:
            raise ULError(f"NVIDIA GPU {self.number}: {error.name}; ul-doctor says what works here")
        return values[0] if values else None


def _give_back(runtime: Any, device: int, stream: int, held: set[int]) -> None:
    """Of a memory that nobody uses any more; wherever that is noticed, the current device stays what it is.

    The stream stays: what is torn down after this may still name it.
    """
    _, current = runtime.cudaGetDevice()
    runtime.cudaSetDevice(device)
    runtime.cudaStreamSynchronize(stream)
    for address in held:
        runtime.cudaFree(address)
    runtime.cudaSetDevice(current)


@contextmanager
def no_collection() -> Iterator[None]:
    """For one thread at a time: no garbage is collected, as what frees a GPU's memory would end a capture."""
    with _CAPTURING:
        enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if enabled:
                gc.enable()
