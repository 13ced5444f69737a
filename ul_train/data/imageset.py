"""A prepared image set: raw uint8 images and int64 labels on disk, memory-mapped, described by index.json."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from ul_runtime.images import Rejected

SCHEMA = 1  # of the code: raise it when the same source would give other bytes
INDEX_NAME = "index.json"


class RejectedEntry(BaseModel):
    """One line of the list of rejected images."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str
    reason: str
    detail: str


class PartIndex(BaseModel):
    """What is known of one part (train or heldout); `reasons` counts all rejected, `rejected` lists the first."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    num_images: int
    fingerprint: str
    class_counts: dict[str, int]
    num_rejected: int
    reasons: dict[str, int]
    rejected: list[RejectedEntry]
    converted: dict[str, int]
    ignored: dict[str, int]


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
class ImageSet:
    """Images for training: `images` uint8 n c h w, `labels` int64 n in 0..num_classes-1, all -1 without classes.

    `fingerprint` is the SHA-256 over image bytes, labels and class names. What was set aside is in
    `rejected` (at most the first 10,000; `num_rejected` counts all), what was changed in `converted`.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    fingerprint: str
    rejected: tuple[Rejected, ...]
    num_rejected: int
    converted: dict[str, int]
    ignored: dict[str, int]
    source: str
    notes: tuple[str, ...]
    index_path: Path

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, ids: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Copies: images uint8 b c h w and labels int64 b of these images. IndexError."""
        return np.asarray(self.images[ids]), np.asarray(self.labels[ids])


@dataclass(frozen=True)
class Splits:
    """Images to train on and images held out; no image is in both."""

    train: ImageSet
    heldout: ImageSet


def images_path(folder: Path, part: str) -> Path:
    """Raw uint8 n c h w."""
    return folder / f"{part}-images.u8"


def labels_path(folder: Path, part: str) -> Path:
    """Raw int64 n."""
    return folder / f"{part}-labels.i64"


def read_index(folder: Path, key: str) -> Index | str:
    """The index of a whole prepared set, or what is wrong with it. Sizes are checked, not contents."""
    try:
        index = Index.model_validate_json((folder / INDEX_NAME).read_bytes())
    except OSError as error:
        return f"{INDEX_NAME}: {error.strerror}"
    except ValueError:
        return f"{INDEX_NAME} is damaged"
    if index.key != key or index.schema_number != SCHEMA:
        return f"{INDEX_NAME} belongs to another set"
    row = index.channels * index.size * index.size
    for name, part in (("train", index.train), ("heldout", index.heldout)):
        for path, expected in (
            (images_path(folder, name), part.num_images * row),
            (labels_path(folder, name), part.num_images * 8),
        ):
            actual = path.stat().st_size if path.is_file() else 0
            if actual != expected or expected == 0:
                return f"{path.name} has {actual:,} bytes, {expected:,} are expected"
    return index


def load(folder: Path, index: Index, source: str, notes: tuple[str, ...]) -> Splits:
    """Map both parts of a set that `read_index` accepted."""
    return Splits(
        _load(folder, index, "train", index.train, source, notes),
        _load(folder, index, "heldout", index.heldout, index.heldout_source, notes),
    )


def _load(folder: Path, index: Index, name: str, part: PartIndex, source: str, notes: tuple[str, ...]) -> ImageSet:
    shape = (part.num_images, index.channels, index.size, index.size)
    return ImageSet(
        images=np.memmap(images_path(folder, name), np.uint8, "r", shape=shape),
        labels=np.memmap(labels_path(folder, name), np.int64, "r", shape=shape[:1]),
        class_names=tuple(index.class_names),
        fingerprint=part.fingerprint,
        rejected=tuple(Rejected(entry.path, entry.reason, entry.detail) for entry in part.rejected),
        num_rejected=part.num_rejected,
        converted=part.converted,
        ignored=part.ignored,
        source=source,
        notes=(*index.notes, *notes),
        index_path=folder / INDEX_NAME,
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
