"""What the loop needs of a device, and the CUDA device, by NVIDIA's own cuda.core."""

import ctypes
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
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

    def copy(self, to: int, source: int, size: int) -> None:
        """So many bytes, within the device."""

    def array(self, address: int, size: int) -> Any:
        """So many bytes there, as what torch.from_dlpack takes."""

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
        from cuda import core

        self._core, self.number, self.lock = core, device, threading.RLock()
        self._noise: Any = None  # the kernel, and its table
        self._held: dict[int, Any] = {}
        with self._errors():
            self.use()
            mine = core.Device(device)
            self._queue = mine.create_stream(options=core.StreamOptions(nonblocking=True))
            # of its own: the device's pool would keep what is freed from engines, which allocate otherwise
            self._pool = core.DeviceMemoryResource(mine, options=core.DeviceMemoryResourceOptions())
        self.stream = int(self._queue.handle)

    def use(self) -> None:
        """See Memory. The current device is a thread's own, and other pipelines and libraries change it."""
        with self._errors():
            self._core.Device(self.number).set_current()

    def allocate(self, size: int) -> int:
        """See Memory."""
        with self._errors():
            buffer = self._pool.allocate(size, stream=self._queue)
        self._held[int(buffer.handle)] = buffer
        return int(buffer.handle)

    def free(self, address: int) -> None:
        """See Memory."""
        with self._errors():
            self._held.pop(address).close()

    def array(self, address: int, size: int) -> Any:
        """See Memory."""
        return self._core.Buffer.from_handle(address, size)

    def upload(self, address: int, array: np.ndarray) -> None:
        """See Memory."""
        self.copy(address, array.ctypes.data, array.nbytes)

    def download(self, address: int, array: np.ndarray) -> None:
        """See Memory."""
        self.copy(array.ctypes.data, address, array.nbytes)

    def copy(self, to: int, source: int, size: int) -> None:
        """See Memory."""
        with self._errors():
            self.array(to, size).copy_from(self.array(source, size), stream=self._queue)

    def clear(self, address: int, size: int) -> None:
        """See Memory."""
        with self._errors():
            self.array(address, size).fill(0, stream=self._queue)

    def normals(self, to: int, seed: int, indices: int, rows: int, stream: int, size: int) -> None:
        """See Memory. ULError: the driver does not take the kernel."""
        blocks = -(-size // (4 * _THREADS))
        if blocks > _MOST_BLOCKS:
            raise ULError(f"noise of {size} values an image; a GPU makes at most {4 * _THREADS * _MOST_BLOCKS}")
        with self._errors():
            if self._noise is None:
                self._noise = self._load_noise()
            kernel, table = self._noise
            config = self._core.LaunchConfig(grid=(rows, blocks), block=_THREADS)
            words = map(ctypes.c_uint, (seed & _WORD, seed >> 32, stream, size))  # an int would be an address
            self._core.launch(self._queue, config, kernel, to, table, indices, *words)

    def _load_noise(self) -> tuple[Any, int]:
        """The kernel, and the address of noise.quantile_table(), both as long as this memory."""
        kernel = self._core.ObjectCode.from_ptx(PTX_FILE.read_bytes()).get_kernel(KERNEL)
        table = np.stack(quantile_table())
        at = self.allocate(table.nbytes)
        self.upload(at, table)
        self.wait()
        return kernel, at

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """See Memory. ULError: something that `work` does cannot be captured."""
        with self._errors():
            builder, failed = self._queue.create_graph_builder(), True
            builder.begin_building("thread_local")
            try:
                with no_collection():
                    work()
                failed = False
            finally:  # or the stream takes no work any more
                with suppress(_cuda_error()) if failed else nullcontext():
                    builder.end_building()
            graph = builder.complete()

        def replay() -> None:
            with self._errors():
                graph.launch(self._queue)

        return replay

    def wait(self) -> None:
        """See Memory."""
        with self._errors():
            self._queue.sync()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """CUDA's errors as ours."""
        try:
            yield
        except _cuda_error() as error:
            if "OUT_OF_MEMORY" in str(error):
                what = f"NVIDIA GPU {self.number} has no memory left; give a smaller --batch-size"
                raise OutOfMemoryError(what) from error
            why = str(error).partition(":")[0]
            raise ULError(f"NVIDIA GPU {self.number}: {why}; ul-doctor says what works here") from error


def _cuda_error() -> type[Exception]:
    from cuda.core._utils.cuda_utils import CUDAError  # which has no public name

    return CUDAError


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
