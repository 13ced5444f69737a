"""A device for tests that is the host's own memory: same loop, same engines, real bytes, and what it did is counted."""

import ctypes
import threading
from collections.abc import Callable

import numpy as np

from ul_runtime import noise
from ul_runtime.backends.gpu_loop import Bind, Engine
from ul_runtime.errors import OutOfMemoryError, ULError


class HostMemory:
    """Memory whose work is done at once, or recorded while it is captured. `limit` in bytes, None = none."""

    kind = "cpu"
    number = 0

    def __init__(self, *, limit: int | None = None, refuses_capture: bool = False) -> None:
        self.held: dict[int, np.ndarray] = {}
        self.lock = threading.RLock()
        self.limit, self.refuses_capture = limit, refuses_capture
        self.uses = self.allocations = self.waits = self.replays = self.largest_download = self.largest_upload = 0
        self._recorded: list[Callable[[], None]] | None = None

    def use(self) -> None:
        self.uses += 1

    def allocate(self, size: int) -> int:
        used = sum(array.nbytes for array in self.held.values())
        if self.limit is not None and used + size > self.limit:
            raise OutOfMemoryError(f"{size} bytes are not left")
        array = np.full(size, 0xFF, np.uint8)  # NaN, where nothing is written
        self.held[array.ctypes.data] = array
        self.allocations += 1
        return array.ctypes.data

    def free(self, address: int) -> None:
        del self.held[address]

    def submit(self, work: Callable[[], None]) -> None:
        if self._recorded is None:
            work()
        else:
            self._recorded.append(work)

    def upload(self, address: int, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        self.largest_upload = max(self.largest_upload, array.nbytes)
        self.submit(lambda: ctypes.memmove(address, array.ctypes.data, array.nbytes))  # type: ignore[arg-type, return-value]

    def download(self, address: int, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        self.largest_download = max(self.largest_download, array.nbytes)
        self.submit(lambda: ctypes.memmove(array.ctypes.data, address, array.nbytes))  # type: ignore[arg-type, return-value]

    def copy(self, to: int, source: int, size: int) -> None:
        self.submit(lambda: ctypes.memmove(to, source, size))  # type: ignore[arg-type, return-value]

    def array(self, address: int, size: int) -> np.ndarray:
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def clear(self, address: int, size: int) -> None:
        self.submit(lambda: ctypes.memset(address, 0, size))  # type: ignore[arg-type, return-value]

    def normals(self, to: int, seed: int, indices: int, rows: int, stream: int, size: int) -> None:
        def work() -> None:
            numbers = np.ctypeslib.as_array((ctypes.c_int64 * rows).from_address(indices))
            made = np.ascontiguousarray(noise.normals(seed, numbers, stream, (size,)))
            ctypes.memmove(to, made.ctypes.data, made.nbytes)

        self.submit(work)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        if self.refuses_capture:
            raise ULError("this operation is not permitted when stream is capturing")
        self._recorded = recorded = []
        try:
            work()
        finally:
            self._recorded = None

        def replay() -> None:
            self.replays += 1
            for each in recorded:
                each()

        return replay

    def wait(self) -> None:
        self.waits += 1

    def recording(self, bind: Bind) -> Bind:
        """Engines of `bind`, which run at once, as ones that can be captured."""
        memory = self

        class Recorded:
            def __init__(self, engine: Engine) -> None:
                self.engine = engine

            def enqueue(self) -> None:
                memory.submit(self.engine.enqueue)

        return lambda graph, dims, addresses: Recorded(bind(graph, dims, addresses))
