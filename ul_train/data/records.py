"""What every source of images hands over: records in a fixed order, each an image still to be decoded."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ul_runtime.images import Rejected

MAX_IMAGE_BYTES = 256 << 20  # of one encoded image in a shard or data set


@dataclass(frozen=True)
class Record:
    """One image: a name that stays when others are added, its class (None = none) and where its pixels are.

    `image` is a file, an encoded file's bytes, or uint8 pixels h w or h w c.
    """

    name: str
    label: str | None
    image: Path | bytes | np.ndarray


@dataclass(frozen=True)
class Source:
    """Images in a fixed order, readable as often as needed in bounded memory.

    `identity` (JSON values) changes when the content changes. `class_names` None: those found, sorted.
    `background` overrides the configured one; `enlarge` lets images smaller than the model be scaled up.
    """

    where: str
    identity: Mapping[str, object]
    records: Callable[[], Iterator[Record | Rejected]]
    num_records: int | None = None
    class_names: tuple[str, ...] | None = None
    background: str | None = None
    enlarge: bool = False
    ignored: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def printable(name: str | Path) -> str:
    """`name` as it can be shown on one line and stored as UTF-8: other bytes and controls escaped."""
    text = str(name).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def file_identity(path: Path) -> list[object]:
    """What tells one state of a file from another: resolved path, bytes, modification time in ns. OSError."""
    status = os.stat(path)
    return [printable(path.resolve()), status.st_size, status.st_mtime_ns]
