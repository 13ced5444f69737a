"""IDX files (MNIST, Fashion-MNIST, EMNIST), gzip or plain, read as a stream."""

import gzip
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, Self, cast

import numpy as np

from ul_runtime.errors import BadInputError
from ul_runtime.image_conversion import ImageRejectedError, open_regular
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
        records=lambda: _records(files, class_names),
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


def _records(files: _Files, class_names: tuple[str, ...]) -> Iterator[Record]:
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
