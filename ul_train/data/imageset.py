"""A prepared image set: .npy files of images, labels and the ids of each part, memory-mapped, and index.json."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from pydantic import BaseModel, ConfigDict

from ul_runtime.images.decode import Rejected
from ul_runtime.progress import Tick, silent

SCHEMA = 3  # of the files and of the code: raise it when the same source would give other bytes
MAX_COMPARED = 8 << 30  # bytes of images: half a minute or less
INDEX_NAME = "index.json"
IMAGES_NAME = "images.npy"  # uint8 n c h w, all images in the source's order
LABELS_NAME = "labels.npy"  # int64 n
IDS_NAMES = ("train_ids.npy", "heldout_ids.npy")  # int64, rows of images.npy in the part's order


class PartIndex(BaseModel):
    """What is known of one part (train or heldout), counted while it is prepared.

    `fingerprint` is the SHA-256 over image bytes, labels and class names; `converted` counts what was changed;
    `reasons` counts all rejected images, `rejected` lists the first 10,000.
    """

    model_config = ConfigDict(extra="forbid")
    num_images: int
    fingerprint: str
    class_counts: dict[str, int]
    num_rejected: int
    reasons: dict[str, int]
    rejected: list[Rejected]
    converted: dict[str, int]
    ignored: dict[str, int]

    @classmethod
    def empty(cls, ignored: Mapping[str, int]) -> "PartIndex":
        """Before its first image; `ignored` counts the files that are none, by suffix."""
        return cls(
            num_images=0, fingerprint="", class_counts={}, num_rejected=0, reasons={}, rejected=[], converted={},
            ignored=dict(ignored),
        )  # fmt: skip


class Index(BaseModel):
    """index.json of a prepared set."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal["unified-latents-images"]
    schema_number: int
    key: str
    source: str
    heldout_source: str
    channels: int
    size: int
    background: str
    fit: str
    class_names: list[str]
    notes: list[str]
    train: PartIndex
    heldout: PartIndex


@dataclass(frozen=True)
class Rows:
    """The rows `ids` of a memory-mapped array; indexing copies some of them, as indexing an array does."""

    array: np.ndarray
    ids: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """As of an array."""
        return (len(self.ids), *self.array.shape[1:])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Any) -> np.ndarray:
        return np.asarray(self.array[self.ids[rows]])


Images: TypeAlias = np.ndarray | Rows  # uint8 n c h w


@dataclass(frozen=True)
class ImageSet:
    """Images for training: `images` uint8 n c h w, `labels` int64 n in 0..num_classes-1, all -1 without classes."""

    images: Images
    labels: np.ndarray
    class_names: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, ids: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Copies: images uint8 b c h w and labels int64 b of these images. IndexError."""
        return np.asarray(self.images[ids]), np.asarray(self.labels[ids])


@dataclass(frozen=True)
class Splits:
    """Images to train on and images held out, no image is in both; and what was found when they were prepared."""

    train: ImageSet
    heldout: ImageSet
    index: Index


def read_index(folder: Path, key: str, tick: Tick = silent) -> Index | str:
    """The index of a prepared set that is as it was written, or what is wrong with it. StoppedError.

    Images of more than MAX_COMPARED bytes are not compared with their fingerprint.
    """
    try:
        index = Index.model_validate_json((folder / INDEX_NAME).read_bytes())
    except OSError as error:
        return f"{INDEX_NAME}: {error.strerror}"
    except ValueError:
        return f"{INDEX_NAME} is damaged"
    if index.key != key or index.schema_number != SCHEMA:
        return f"{INDEX_NAME} belongs to another set"
    sizes = (index.train.num_images, index.heldout.num_images)
    expected = {
        IMAGES_NAME: ((sum(sizes), index.channels, index.size, index.size), "uint8"),
        LABELS_NAME: ((sum(sizes),), "int64"),
    } | {name: ((size,), "int64") for name, size in zip(IDS_NAMES, sizes, strict=True)}
    for name, (shape, dtype) in expected.items():
        path = folder / name
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, EOFError, ValueError) as error:
            return f"{name}: {getattr(error, 'strerror', None) or error}"
        if array.shape != shape or array.dtype != dtype or path.stat().st_size != array.offset + array.nbytes:
            return f"{name} has {path.stat().st_size:,} bytes, {dtype} {array.shape}; {dtype} {shape} is expected"
    return _changed(folder, index, tick) or index


def fingerprint(images: Path, ids: np.ndarray, labels: np.ndarray, names: Sequence[str], tick: Tick) -> str:
    """SHA-256 over these rows of images.npy in this order, their labels and the class names. OSError, StoppedError."""
    array, digest = np.load(images, mmap_mode="r", allow_pickle=False), hashlib.sha256()
    size = array[:1].nbytes
    with open(images, "rb") as file:  # memory-mapped, it would fill the memory
        for number in ids.tolist():
            file.seek(array.offset + number * size)
            digest.update(file.read(size))
            tick(0)
    facts = [digest.hexdigest(), hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest(), names]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _changed(folder: Path, index: Index, tick: Tick) -> str | None:
    images, num_classes = folder / IMAGES_NAME, len(index.class_names)
    labels = np.load(folder / LABELS_NAME, allow_pickle=False)
    for name, part in zip(IDS_NAMES, (index.train, index.heldout), strict=True):
        ids = np.load(folder / name, allow_pickle=False)
        if not _within(ids, 0, len(labels)) or not _within(labels, 0 if num_classes else -1, num_classes):
            return f"{name} or {LABELS_NAME} is out of range"
        small = images.stat().st_size <= MAX_COMPARED
        if small and fingerprint(images, ids, labels[ids], index.class_names, tick) != part.fingerprint:
            return "its content is not that of its fingerprint"
    return None


def _within(values: np.ndarray, low: int, high: int) -> bool:
    return bool((values >= low).all() and (values < high).all())


def load(folder: Path, index: Index) -> Splits:
    """Map both parts of a set that `read_index` accepted."""
    images = np.load(folder / IMAGES_NAME, mmap_mode="r", allow_pickle=False)
    labels = np.load(folder / LABELS_NAME, allow_pickle=False)
    train, heldout = (np.load(folder / name, allow_pickle=False) for name in IDS_NAMES)
    names = tuple(index.class_names)
    return Splits(
        ImageSet(Rows(images, train), labels[train], names, index.train.fingerprint),
        ImageSet(Rows(images, heldout), labels[heldout], names, index.heldout.fingerprint),
        index,
    )


@lru_cache(maxsize=2)
def epoch_order(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """Order of epoch `epoch` (0-based): a permutation, int64 n, read-only.

    Sorts raw Philox words keyed by (seed, epoch): the generator's words are fixed over numpy versions,
    its `permutation` is not. `seed` and `epoch` are 0 to 2^64 - 1, else ValueError.
    """
    if num_images < 1:
        raise ValueError(f"num_images {num_images}: at least 1 is expected")
    if not (0 <= seed < 2**64 and 0 <= epoch < 2**64):
        raise ValueError(f"seed {seed}, epoch {epoch}: 0 to 2^64 - 1 is expected")
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(num_images)
    order = np.argsort(words, kind="stable").astype(np.int64)
    order.setflags(write=False)
    return order


def sample_ids(num_images: int, seed: int, step: int, batch_size: int) -> np.ndarray:
    """Images of global training step `step` (0-based), int64 b: the epochs' orders laid end to end,
    cut into batches. A batch may span epochs; every epoch holds every image exactly once. ValueError."""
    if step < 0 or batch_size < 1:
        raise ValueError(f"step {step}, batch_size {batch_size}: step >= 0 and batch_size >= 1 are expected")
    epoch, position = divmod(step * batch_size, num_images)
    pieces = []
    while batch_size > 0:
        piece = epoch_order(num_images, seed, epoch)[position : position + batch_size]
        pieces.append(piece)
        batch_size -= len(piece)
        epoch, position = epoch + 1, 0
    return np.concatenate(pieces)
