"""Arrays in an .npz from others: no pickle, no array larger than its member, no bomb."""

import math
import zipfile
import zlib

import numpy as np
from numpy.lib import format as npy

from ul_runtime.errors import BadInputError
from ul_runtime.machine import in_units, memory_bytes

MAX_RATIO = 200  # decompressed to compressed; real images stay far below, a bomb is near 1,000
MAX_EXPANDED = 64 << 20  # bytes that may be expanded at any ratio
_MAX_HEADER = 10_000
# All that zipfile and numpy raise on a damaged .npz.
DAMAGED = (EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError)


def check_expanded(where: str, packed: int, expanded: int) -> None:
    """BadInputError, before memory is taken, for a bomb or for more than this machine has."""
    if expanded > MAX_EXPANDED and expanded > MAX_RATIO * max(1, packed):
        raise BadInputError(
            f"{where} would expand {packed:,} bytes to {expanded:,}; "
            f"more than {MAX_RATIO} times is refused above {MAX_EXPANDED:,} bytes; save it uncompressed"
        )
    if expanded > memory_bytes():
        raise BadInputError(
            f"{where} takes {in_units(expanded)} of memory, this machine has {in_units(memory_bytes())}; "
            "save it in several files, images as a folder or as .tar shards"
        )


def npz_header(archive: zipfile.ZipFile, name: str, where: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array that can be read as safely. BadInputError: pickles, lies, bombs. And DAMAGED."""
    where = f"{where}: {name}"
    info = archive.getinfo(f"{name}.npy")
    check_expanded(where, info.compress_size, info.file_size)
    with archive.open(info) as stream:
        version = npy.read_magic(stream)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
        if read is None:
            raise BadInputError(f"{where}: .npy version {version}, 1.0 or 2.0 is expected; save it again")
        shape, fortran_order, dtype = read(stream, max_header_size=_MAX_HEADER)
        declared = stream.tell() + math.prod(shape) * dtype.itemsize
    if dtype.hasobject:
        raise BadInputError(f"{where} holds Python objects, which are never unpickled; save plain arrays")
    if fortran_order and len(shape) > 1:
        raise BadInputError(f"{where} is in Fortran order; save numpy.ascontiguousarray of it")
    if declared != info.file_size:
        raise BadInputError(f"{where} declares {shape} ({declared:,} bytes) but holds {info.file_size:,} bytes")
    return shape, dtype


def npz_array(archive: zipfile.ZipFile, name: str, where: str) -> np.ndarray:
    """An array whose header was looked at first. Errors as `npz_header`."""
    npz_header(archive, name, where)
    with archive.open(f"{name}.npy") as stream:
        array: np.ndarray = npy.read_array(stream, allow_pickle=False, max_header_size=_MAX_HEADER)
        stream.read(1)  # at the end, zipfile compares the checksum
    return array
