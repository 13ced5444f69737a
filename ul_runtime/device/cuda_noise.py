"""Noise made on an NVIDIA card, byte for byte that of ul_runtime.noise: no image's noise has to travel there.

noise.cu is the source; noise.ptx, made of it by tools/compile_noise.py, is what the driver takes, whatever the card.
"""

import ctypes
from pathlib import Path
from typing import Any

from ul_runtime.errors import ULError

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
            raise ULError(f"noise of {size} values an image; a card makes at most {4 * _THREADS * _MOST_BLOCKS}")
        values = (to, self._table, indices, seed & _WORD, seed >> 32, stream, size)
        self._do(
            self._driver.cuLaunchKernel(self._kernel, rows, blocks, 1, _THREADS, 1, 1, 0, order, (values, _TYPES), 0)
        )

    def _do(self, result: tuple[Any, ...]) -> Any:
        error, *values = result
        if error != self._driver.CUresult.CUDA_SUCCESS:
            raise ULError(f"noise on an NVIDIA card: {error.name}; ul-doctor says what works here")
        return values[0] if values else None
