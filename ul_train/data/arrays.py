"""Images in arrays, read whole: IDX files (MNIST, Fashion-MNIST, EMNIST), .npz, and scikit-learn's digits."""

import gzip
import math
import os
import re
import struct
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from ul_runtime.errors import BadInputError, UsageError
from ul_runtime.files.npz import DAMAGED, check_expanded, npz_array, npz_header
from ul_runtime.images.decode import MAX_PIXELS, ImageRejectedError, open_regular
from ul_runtime.images.find import printable
from ul_runtime.install import install
from ul_train.data.records import Record, Source, file_identity

_FASHION = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
FASHION_NAMES = tuple(_FASHION.split(","))
DIGITS = "sklearn-digits"
_IDX_IMAGES = re.compile(r"(.*[-_])?(train|t10k|test)-images[-.]idx3-ubyte(\.gz)?")
_MAX_SIDE = 8192
_MEMBERS = ("images.npy", "labels.npy", "class_names.npy")
_MAX_NAMES_BYTES = 16 << 20


@contextmanager
def _reading(path: Path, kind: str) -> Iterator[BinaryIO]:
    """The open file; damage, at any point of reading it, is a BadInputError that names it."""
    shown = printable(path)
    try:
        with open_regular(path) as file:
            yield file
    except (*DAMAGED, gzip.BadGzipFile) as error:
        raise BadInputError(f"{shown}: not a readable {kind} ({error}); get it again or save it again") from error
    except (OSError, ImageRejectedError) as error:
        raise BadInputError(f"{shown}: cannot be read ({error})") from error


def _records(images: np.ndarray, labels: Iterable[str | None]) -> Iterator[Record]:
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield Record(f"{index:08d}", label, np.ascontiguousarray(image))


def find_idx(folder: Path) -> dict[str, list[Path]]:
    """Image files of each split ("train", "t10k") directly in `folder`."""
    found: dict[str, list[Path]] = {"train": [], "t10k": []}
    for path in sorted(folder.iterdir()):
        match = _IDX_IMAGES.fullmatch(path.name)
        if match and not path.name.startswith("."):
            found["train" if match[2] == "train" else "t10k"].append(path)
    return found


def idx_sources(folder: Path, labelled: bool) -> tuple[Source, Source | None]:
    """Training and, if there is a t10k pair, held-out images. BadInputError on missing or damaged files."""
    pairs = {}
    for split, paths in find_idx(folder).items():
        names = ", ".join(path.name for path in paths)
        if len(paths) > 1:
            raise BadInputError(f"{folder}: several IDX files for {split} ({names}); keep one in the folder")
        if paths:
            labels = _labels_beside(paths[0])
            pairs[split] = (paths[0], labels, _idx_array(labels, 1))
    if "train" not in pairs:
        raise BadInputError(f"{folder}: no train-images-idx3-ubyte[.gz], only t10k; add the training files")
    class_names: tuple[str, ...] = ()
    if labelled:
        largest = max(int(numbers.max(initial=0)) for _, _, numbers in pairs.values())
        class_names = tuple(str(label) for label in range(max(10, largest + 1)))
        if "fashion" in str(folder.resolve()).lower() and largest < 10:
            class_names = FASHION_NAMES
    sources = {split: _idx_source(*pair, class_names) for split, pair in pairs.items()}
    return sources["train"], sources.get("t10k")


def _labels_beside(images: Path) -> Path:
    name = re.sub(r"images([-.])idx3", r"labels\1idx1", images.name)
    plain = name.removesuffix(".gz")
    for each in (name, plain, plain + ".gz"):
        if (images.parent / each).exists():
            return images.parent / each
    raise BadInputError(f"{printable(images)}: its labels {name} are missing; put them beside it")


def _idx_source(path: Path, labels: Path, numbers: np.ndarray, class_names: tuple[str, ...]) -> Source:
    def records() -> Iterator[Record]:
        images = _idx_array(path, 3)
        if len(images) != len(numbers):
            message = f"{len(images)} images, but {labels.name} has {len(numbers)} labels"
            raise BadInputError(f"{printable(path)}: {message}")
        return _records(images, [class_names[number] if class_names else None for number in numbers.tolist()])

    return Source(
        where=printable(path),
        identity={"kind": "idx", "files": [file_identity(path), file_identity(labels)], "class_names": class_names},
        records=records,
        num_records=len(numbers),
        class_names=class_names or None,
        background="black",
    )


def _idx_array(path: Path, num_sizes: int) -> np.ndarray:
    """The whole array, uint8 n [h w]. BadInputError if the file is damaged or does not hold what it declares."""
    where = printable(path)
    with _reading(path, "IDX file") as file:
        packed = os.fstat(file.fileno()).st_size
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if path.name.endswith(".gz") else file
        header = stream.read(4 + 4 * num_sizes)
        if len(header) < 4 + 4 * num_sizes:
            raise EOFError("its header is cut")
        found, *shape = struct.unpack(f">{1 + num_sizes}I", header)
        magic = 0x0800 + num_sizes  # uint8
        if found != magic:
            raise BadInputError(f"{where}: starts with {found:#010x}, an IDX file of this name with {magic:#010x}")
        if not all(0 < side <= _MAX_SIDE for side in shape[1:]):
            raise BadInputError(f"{where}: declares {shape[2]}x{shape[1]} px, 1 to {_MAX_SIDE} is expected")
        size = math.prod(shape)
        check_expanded(where, packed, size)
        held = packed - len(header)
        if stream is not file or held == size:
            data = stream.read(size + 1)  # one byte more than declared: at the end gzip compares its checksum
            held = len(data)
    if held != size:
        difference = "more data than it declares" if held > size else "truncated, it declares more than it holds"
        raise BadInputError(f"{where}: {difference}; get it again")
    return np.frombuffer(data, np.uint8).reshape(shape)


def npz_source(path: Path, labelled: bool) -> Source:
    """The images of a .npz. BadInputError on anything that is not what it says."""
    where = printable(path)
    with _reading(path, ".npz") as file, zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        twice = [name for name, times in Counter(names).items() if times > 1]
        if twice:
            raise BadInputError(f"{where}: {printable(twice[0])} occurs twice; save it again")
        if "images.npy" not in names:
            found = ", ".join(printable(name).removesuffix(".npy") for name in names[:5]) or "nothing"
            raise BadInputError(f"{where}: has {found}; an array named images is expected (uint8, n h w [c])")
        shape, dtype = npz_header(archive, "images", where)
        possible = len(shape) == 3 or (len(shape) == 4 and {shape[1], shape[3]} & {1, 3, 4})
        if dtype != np.uint8 or not possible or not 0 < math.prod(shape[1:]) <= 4 * MAX_PIXELS:
            expected = "expected uint8 n h w, n h w c or n c h w with c = 1, 3 or 4"
            raise BadInputError(f"{where}: images is {dtype} {shape}; {expected}{_as_uint8(dtype)}")
        labelled = labelled and "labels.npy" in names
        if labelled:
            label_shape, label_dtype = npz_header(archive, "labels", where)
            if label_dtype.kind not in "iu" or label_shape not in (shape[:1], (shape[0], 1)):
                expected = f"expected {shape[0]} integers{_as_integers(label_shape, label_dtype, shape[0])}"
                raise BadInputError(f"{where}: labels is {label_dtype} {label_shape}; {expected}")
        class_names = _class_names(archive, path) if labelled and "class_names.npy" in names else None
    return Source(
        where=where,
        identity={"kind": "npz", "file": file_identity(path), "labelled": labelled},
        records=lambda: _npz_records(path, labelled, class_names),
        num_records=shape[0],
        class_names=class_names,
        notes=_note_unused(where, names),
    )


def _as_uint8(dtype: np.dtype) -> str:
    """Advice to make uint8 of numbers of another type."""
    advice = {
        "b": "save images.astype(numpy.uint8) * 255",
        "u": f"save (images // {256 ** max(dtype.itemsize - 1, 0)}).astype(numpy.uint8) if its values fill the type",
        "f": "save (images * 255).round().astype(numpy.uint8) of values in [0, 1], or "
        "((images + 1) * 127.5).round().astype(numpy.uint8) of values in [-1, 1]",
    }.get(dtype.kind)
    return "" if dtype == np.uint8 else f"; {advice or 'save images.astype(numpy.uint8) of values from 0 to 255'}"


def _as_integers(shape: tuple[int, ...], dtype: np.dtype, count: int) -> str:
    """Advice to make class numbers of labels of another kind."""
    if len(shape) == 2 and shape[0] == count and shape[1] > 1:
        return "; of one column for each class, save labels.argmax(1)"
    if dtype.kind in "US":
        return "; of names, save class_names, labels = numpy.unique(labels, return_inverse=True)"
    return "; save labels.astype(numpy.int64)" if shape == (count,) else ""


def _note_unused(where: str, members: Sequence[str]) -> tuple[str, ...]:
    unused = [printable(name.removesuffix(".npy")) for name in members if name not in _MEMBERS]
    shown = ", ".join(unused[:8]) + (", ..." if len(unused) > 8 else "")
    return (f"{where}: arrays that are not used: {shown}; labels are in an array called labels",) if unused else ()


def _class_names(archive: zipfile.ZipFile, path: Path) -> tuple[str, ...]:
    shape, dtype = npz_header(archive, "class_names", printable(path))
    if dtype.kind != "U" or len(shape) != 1 or math.prod(shape) * dtype.itemsize > _MAX_NAMES_BYTES:
        raise BadInputError(f"{printable(path)}: class_names is {dtype} {shape}; expected one row of text")
    names = tuple(str(name) for name in npz_array(archive, "class_names", printable(path)))
    if len(set(names)) != len(names):
        raise BadInputError(f"{printable(path)}: class_names has the same name twice")
    return names


def _npz_records(path: Path, labelled: bool, class_names: tuple[str, ...] | None) -> Iterator[Record]:
    with _reading(path, ".npz") as file, zipfile.ZipFile(file) as archive:
        images = npz_array(archive, "images", printable(path))
        numbers: list[int] = npz_array(archive, "labels", printable(path)).reshape(-1).tolist() if labelled else []
    if images.ndim == 4 and images.shape[3] not in (1, 3, 4):
        images = images.transpose(0, 2, 3, 1)  # n c h w
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    if class_names is None:
        return _records(images, map(str, numbers) if labelled else [None] * len(images))
    for index, number in enumerate(numbers):
        if not 0 <= number < len(class_names):
            message = f"label {number} of image {index}, but class_names has {len(class_names)} names"
            raise BadInputError(f"{printable(path)}: {message}")
    return _records(images, [class_names[number] for number in numbers])


def digits_source(labelled: bool) -> Source:
    """scikit-learn's 1,797 hand-written digits, 8x8, values 0 to 16, scaled up to the model."""
    try:
        import sklearn
        from sklearn.datasets import load_digits
    except ImportError as error:
        message = f"{DIGITS}: needs scikit-learn; {install('quickstart')}"
        raise UsageError(message) from error

    def records() -> Iterator[Record]:
        digits = load_digits()
        pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        return _records(pixels, [str(digit) if labelled else None for digit in digits.target])

    return Source(
        where=DIGITS,
        identity={"kind": DIGITS, "version": sklearn.__version__, "labelled": labelled},
        records=records,
        num_records=1797,
        class_names=tuple("0123456789") if labelled else None,
        background="black",
        enlarge=True,
    )
