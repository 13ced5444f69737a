"""A .npz file with `images` and optional `labels` and `class_names`, read row by row, never unpickled."""

import math
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
from numpy.lib import format as npy

from ul_runtime.errors import BadInputError
from ul_runtime.image_conversion import MAX_PIXELS, ImageRejectedError, open_regular
from ul_train.data.records import Record, Source, file_identity, printable

MAX_RATIO = 200  # decompressed to compressed; real images stay far below, a zip bomb is near 1,000
MAX_EXPANDED = 64 << 20  # bytes that may be expanded at any ratio
_MAX_NAMES_BYTES = 16 << 20
_MAX_HEADER = 10_000


@dataclass(frozen=True)
class _Member:
    shape: tuple[int, ...]
    dtype: np.dtype


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """The open zip file; damage, at any point of reading it, is a BadInputError."""
    shown = printable(str(path))
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise BadInputError(f"{shown}: not a readable .npz ({error}); save it again with numpy.savez") from error
    except (OSError, ImageRejectedError) as error:
        raise BadInputError(f"{shown}: cannot be read ({error})") from error


def _open_member(archive: zipfile.ZipFile, name: str, path: Path) -> tuple[_Member, IO[bytes]]:
    """Checked header and the stream behind it, at the first row. BadInputError: pickles, lies, bombs."""
    where = f"{printable(str(path))}: {name}"
    info = archive.getinfo(f"{name}.npy")
    if info.file_size > MAX_EXPANDED and info.file_size > MAX_RATIO * max(1, info.compress_size):
        raise BadInputError(
            f"{where} would expand {info.compress_size:,} bytes to {info.file_size:,}; "
            f"more than {MAX_RATIO} times is refused above {MAX_EXPANDED:,} bytes; save it uncompressed"
        )
    stream = archive.open(info)
    version = npy.read_magic(stream)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise BadInputError(f"{where}: .npy version {version}, 1.0 or 2.0 is expected; save it again")
    shape, fortran_order, dtype = read(stream, max_header_size=_MAX_HEADER)
    if dtype.hasobject:
        raise BadInputError(f"{where} holds Python objects, which are never unpickled; save plain arrays")
    if fortran_order and len(shape) > 1:
        raise BadInputError(f"{where} is in Fortran order; save numpy.ascontiguousarray of it")
    declared = stream.tell() + math.prod(shape) * dtype.itemsize
    if declared != info.file_size:
        raise BadInputError(f"{where} declares {shape} ({declared:,} bytes) but holds {info.file_size:,} bytes")
    return _Member(shape, dtype), stream


def _layout(shape: tuple[int, ...]) -> str | None:
    """Where the channels are; None if this cannot be images."""
    if len(shape) == 3:
        return "n h w"
    if len(shape) == 4 and shape[3] in (1, 3, 4):
        return "n h w c"
    if len(shape) == 4 and shape[1] in (1, 3, 4):
        return "n c h w"
    return None


def npz_source(path: Path, classes: Literal["auto", "none"]) -> Source:
    """The images of a .npz. BadInputError on anything that is not what it says."""
    shown = printable(str(path))
    with _archive(path) as archive:
        names = Counter(archive.namelist())
        twice = [name for name, times in names.items() if times > 1]
        if twice:
            raise BadInputError(f"{shown}: {printable(twice[0])} occurs twice; save it again")
        if "images.npy" not in names:
            found = ", ".join(printable(name).removesuffix(".npy") for name in list(names)[:5]) or "nothing"
            raise BadInputError(f"{shown}: has {found}; an array named images is expected (uint8, n h w [c])")
        images, _ = _open_member(archive, "images", path)
        layout = _layout(images.shape)
        if images.dtype != np.uint8 or layout is None or not 0 < math.prod(images.shape[1:]) <= 4 * MAX_PIXELS:
            raise BadInputError(
                f"{shown}: images is {images.dtype} {images.shape}; "
                f"expected uint8 n h w, n h w c or n c h w with c = 1, 3 or 4"
            )
        labelled = "labels.npy" in names and classes == "auto"
        class_names = None
        if labelled:
            labels, _ = _open_member(archive, "labels", path)
            if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
                raise BadInputError(
                    f"{shown}: labels is {labels.dtype} {labels.shape}; expected {images.shape[0]} integers"
                )
            class_names = _class_names(archive, path) if "class_names.npy" in names else None
    return Source(
        where=shown,
        identity={"kind": "npz", "file": file_identity(path), "labelled": labelled},
        records=lambda: _records(path, layout, labelled, class_names),
        num_records=images.shape[0],
        class_names=class_names,
    )


def _class_names(archive: zipfile.ZipFile, path: Path) -> tuple[str, ...]:
    member, stream = _open_member(archive, "class_names", path)
    size = math.prod(member.shape) * member.dtype.itemsize
    if member.dtype.kind != "U" or len(member.shape) != 1 or size > _MAX_NAMES_BYTES:
        message = f"class_names is {member.dtype} {member.shape}; expected one row of text"
        raise BadInputError(f"{printable(str(path))}: {message}")
    names = tuple(str(name) for name in np.frombuffer(stream.read(size), member.dtype))
    if len(set(names)) != len(names):
        raise BadInputError(f"{printable(str(path))}: class_names has the same name twice")
    return names


def _records(path: Path, layout: str, labelled: bool, class_names: tuple[str, ...] | None) -> Iterator[Record]:
    with _archive(path) as archive:
        images, pixels = _open_member(archive, "images", path)
        labels, values = _open_member(archive, "labels", path) if labelled else (None, None)
        row = math.prod(images.shape[1:])
        for index in range(images.shape[0]):
            image = np.frombuffer(_exactly(pixels, row), np.uint8).reshape(images.shape[1:])
            if layout == "n c h w":
                image = image.transpose(1, 2, 0)
            if image.ndim == 3 and image.shape[2] == 1:
                image = image[:, :, 0]
            label = None
            if labels is not None and values is not None:
                value = int(np.frombuffer(_exactly(values, labels.dtype.itemsize), labels.dtype)[0])
                if class_names is not None and not 0 <= value < len(class_names):
                    message = f"label {value} of image {index}, but class_names has {len(class_names)} names"
                    raise BadInputError(f"{printable(str(path))}: {message}")
                label = class_names[value] if class_names is not None else str(value)
            yield Record(f"{index:08d}", label, np.ascontiguousarray(image))
        if pixels.read(1):  # also makes zipfile compare the checksum of the last block
            raise BadInputError(f"{printable(str(path))}: images has more data than it declares")


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise EOFError("truncated")
    return data
