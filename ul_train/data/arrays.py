"""IDX files (MNIST, Fashion-MNIST, EMNIST), gzip or plain, read as a stream."""

import gzip
import math
import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, Literal, Self, cast

import numpy as np
from numpy.lib import format as npy

from ul_runtime.errors import BadInputError, UsageError
from ul_runtime.images import MAX_PIXELS, ImageRejectedError, open_regular
from ul_train.data.records import Record, Source, file_identity, printable

FASHION_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_IMAGES = re.compile(r"(.*[-_])?(train|t10k|test)-images[-.]idx3-ubyte(\.gz)?")
_IMAGES_MAGIC, _LABELS_MAGIC = 0x0803, 0x0801
_MAX_SIDE = 8192
_CHUNK = 1 << 20


@dataclass(frozen=True)
class _Files:
    images: Path
    labels: Path
    num_images: int
    height: int
    width: int


def find_idx(folder: Path) -> dict[str, list[Path]]:
    """Image files of each split ("train", "t10k") directly in `folder`."""
    found: dict[str, list[Path]] = {"train": [], "t10k": []}
    for path in sorted(folder.iterdir()):
        match = _IMAGES.fullmatch(path.name)
        if match:
            found["train" if match[2] == "train" else "t10k"].append(path)
    return found


def idx_sources(folder: Path, classes: Literal["auto", "none"]) -> tuple[Source, Source | None]:
    """Training and, if there is a t10k pair, held-out images. BadInputError on missing or damaged files."""
    pairs = {}
    for split, paths in find_idx(folder).items():
        names = ", ".join(path.name for path in paths)
        if len(paths) > 1:
            raise BadInputError(f"{folder}: several IDX files for {split} ({names}); keep one in the folder")
        if paths:
            pairs[split] = _check(paths[0])
    if "train" not in pairs:
        raise BadInputError(f"{folder}: no train-images-idx3-ubyte[.gz], only t10k; add the training files")
    class_names: tuple[str, ...] = ()
    if classes == "auto":
        largest = max(_largest_label(pair) for pair in pairs.values())
        class_names = tuple(str(label) for label in range(max(10, largest + 1)))
        if "fashion" in str(folder.resolve()).lower() and largest < 10:
            class_names = FASHION_NAMES
    sources = {split: _source(pair, class_names) for split, pair in pairs.items()}
    return sources["train"], sources.get("t10k")


def _source(files: _Files, class_names: tuple[str, ...]) -> Source:
    return Source(
        where=printable(str(files.images)),
        identity={
            "kind": "idx",
            "files": [file_identity(files.images), file_identity(files.labels)],
            "class_names": class_names,
        },
        records=lambda: _idx_records(files, class_names),
        num_records=files.num_images,
        class_names=class_names or None,
        background="black",
    )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Damage met in reading `path` is a BadInputError that names it."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadInputError(f"{printable(str(path))}: damaged or truncated ({error}); get it again") from error
    except (OSError, ImageRejectedError) as error:
        raise BadInputError(f"{printable(str(path))}: cannot be read ({error})") from error


class _Stream:
    """An IDX file's bytes, decompressed on the way; damage is a BadInputError that names this file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _reading(path):
            self._raw = open_regular(path)
        compressed = path.name.endswith(".gz")
        self._stream = cast(BinaryIO, gzip.GzipFile(fileobj=self._raw)) if compressed else self._raw

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes."""
        with _reading(self.path):
            data = self._stream.read(size)
        if len(data) != size:
            raise BadInputError(f"{printable(str(self.path))}: truncated, it declares more than it holds; get it again")
        return data

    def expect_end(self) -> None:
        """BadInputError if there is more; also compares gzip's checksum."""
        with _reading(self.path):
            more = self._stream.read(1)
        if more:
            raise BadInputError(f"{printable(str(self.path))}: more data than it declares; get it again")


def _header(stream: _Stream, magic: int, num_sizes: int) -> tuple[int, ...]:
    found, *sizes = struct.unpack(f">{1 + num_sizes}I", stream.read(4 + 4 * num_sizes))
    if found != magic:
        message = (
            f"{printable(str(stream.path))}: starts with {found:#010x}, an IDX file of this name with {magic:#010x}"
        )
        raise BadInputError(message)
    return tuple(sizes)


def _check(images: Path) -> _Files:
    stem = re.sub(r"images([-.])idx3", r"labels\1idx1", images.name)
    plain = stem.removesuffix(".gz")
    labels = next((path for name in (stem, plain, plain + ".gz") if (path := images.parent / name).exists()), None)
    if labels is None:
        raise BadInputError(f"{printable(str(images))}: its labels {stem} are missing; put them beside it")
    with _Stream(images) as stream:
        count, height, width = _header(stream, _IMAGES_MAGIC, 3)
    if not (0 < height <= _MAX_SIDE and 0 < width <= _MAX_SIDE):
        raise BadInputError(f"{printable(str(images))}: declares {width}x{height} px, 1 to {_MAX_SIDE} is expected")
    with _Stream(labels) as stream:
        (num_labels,) = _header(stream, _LABELS_MAGIC, 1)
    if count != num_labels:
        raise BadInputError(f"{printable(str(images))}: {count} images, but {labels.name} has {num_labels} labels")
    return _Files(images, labels, count, height, width)


def _largest_label(files: _Files) -> int:
    largest, left = 0, files.num_images
    with _Stream(files.labels) as stream:
        _header(stream, _LABELS_MAGIC, 1)
        while left:
            data = stream.read(min(left, _CHUNK))
            largest, left = max(largest, max(data)), left - len(data)
    return largest


def _idx_records(files: _Files, class_names: tuple[str, ...]) -> Iterator[Record]:
    with _Stream(files.images) as images, _Stream(files.labels) as labels:
        _header(images, _IMAGES_MAGIC, 3)
        _header(labels, _LABELS_MAGIC, 1)
        for index in range(files.num_images):
            pixels = np.frombuffer(images.read(files.height * files.width), np.uint8)
            label = labels.read(1)[0]
            name = class_names[label] if class_names else None
            yield Record(f"{index:08d}", name, pixels.reshape(files.height, files.width))
        images.expect_end()
        labels.expect_end()


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
        records=lambda: _npz_records(path, layout, labelled, class_names),
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


def _npz_records(path: Path, layout: str, labelled: bool, class_names: tuple[str, ...] | None) -> Iterator[Record]:
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


DIGITS = "sklearn-digits"


def _digits(classes: Literal["auto", "none"]) -> Source:
    """scikit-learn's 1,797 hand-written digits, 8x8, values 0 to 16, scaled up to the model."""
    try:
        import sklearn
        from sklearn.datasets import load_digits
    except ImportError as error:
        message = f"{DIGITS}: needs scikit-learn; pip install 'unified-latents[quickstart]'"
        raise UsageError(message) from error

    def records() -> Iterator[Record]:
        digits = load_digits()
        pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        for index, (image, digit) in enumerate(zip(pixels, digits.target, strict=True)):
            yield Record(f"{index:08d}", str(digit) if classes == "auto" else None, image)

    return Source(
        where=DIGITS,
        identity={"kind": DIGITS, "version": sklearn.__version__, "labelled": classes == "auto"},
        records=records,
        num_records=1797,
        class_names=tuple("0123456789") if classes == "auto" else None,
        background="black",
        enlarge=True,
    )
