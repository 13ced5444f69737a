"""IDX files (MNIST, Fashion-MNIST, EMNIST), gzip or plain, read as a stream."""

import gzip
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

import numpy as np

from ul_runtime.errors import BadInputError
from ul_train.data.records import ImageRejectedError, Record, Source, file_identity, open_regular, printable

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
        records=lambda: _records(files, class_names),
        num_records=files.num_images,
        class_names=class_names or None,
        background="black",
    )


@contextmanager
def _stream(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed on the way; every damage is a BadInputError."""
    try:
        with open_regular(path) as raw:
            stream = gzip.GzipFile(fileobj=raw) if path.name.endswith(".gz") else raw
            yield cast(BinaryIO, stream)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadInputError(f"{printable(str(path))}: damaged or truncated ({error}); get it again") from error
    except (OSError, ImageRejectedError) as error:
        raise BadInputError(f"{printable(str(path))}: cannot be read ({error})") from error


def _read(stream: BinaryIO, size: int, path: Path) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise BadInputError(f"{printable(str(path))}: truncated, it declares more than it holds; get it again")
    return data


def _header(stream: BinaryIO, path: Path, magic: int, num_sizes: int) -> tuple[int, ...]:
    found, *sizes = struct.unpack(f">{1 + num_sizes}I", _read(stream, 4 + 4 * num_sizes, path))
    if found != magic:
        message = f"{printable(str(path))}: starts with {found:#010x}, an IDX file of this name with {magic:#010x}"
        raise BadInputError(message)
    return tuple(sizes)


def _check(images: Path) -> _Files:
    stem = re.sub(r"images([-.])idx3", r"labels\1idx1", images.name)
    plain = stem.removesuffix(".gz")
    labels = next((path for name in (stem, plain, plain + ".gz") if (path := images.parent / name).exists()), None)
    if labels is None:
        raise BadInputError(f"{printable(str(images))}: its labels {stem} are missing; put them beside it")
    with _stream(images) as stream:
        count, height, width = _header(stream, images, _IMAGES_MAGIC, 3)
    if not (0 < height <= _MAX_SIDE and 0 < width <= _MAX_SIDE):
        raise BadInputError(f"{printable(str(images))}: declares {width}x{height} px, 1 to {_MAX_SIDE} is expected")
    with _stream(labels) as stream:
        (num_labels,) = _header(stream, labels, _LABELS_MAGIC, 1)
    if count != num_labels:
        raise BadInputError(f"{printable(str(images))}: {count} images, but {labels.name} has {num_labels} labels")
    return _Files(images, labels, count, height, width)


def _largest_label(files: _Files) -> int:
    largest, left = 0, files.num_images
    with _stream(files.labels) as stream:
        _header(stream, files.labels, _LABELS_MAGIC, 1)
        while left:
            data = _read(stream, min(left, _CHUNK), files.labels)
            largest, left = max(largest, max(data)), left - len(data)
    return largest


def _records(files: _Files, class_names: tuple[str, ...]) -> Iterator[Record]:
    with _stream(files.images) as images, _stream(files.labels) as labels:
        _header(images, files.images, _IMAGES_MAGIC, 3)
        _header(labels, files.labels, _LABELS_MAGIC, 1)
        for index in range(files.num_images):
            pixels = np.frombuffer(_read(images, files.height * files.width, files.images), np.uint8)
            label = _read(labels, 1, files.labels)[0]
            name = class_names[label] if class_names else None
            yield Record(f"{index:08d}", name, pixels.reshape(files.height, files.width))
        if images.read(1) or labels.read(1):
            raise BadInputError(f"{printable(str(files.images))}: more data than it declares; get it again")
