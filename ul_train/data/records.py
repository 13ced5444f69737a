"""What every source of images hands over: records in a fixed order, each an image still to be decoded."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ul_runtime.images.decode import Rejected
from ul_runtime.images.find import printable

MAX_IMAGE_BYTES = 256 << 20  # of one encoded image in a shard or data set
LABEL_ALONE = "a label without an image"


@dataclass(frozen=True)
class Record:
    """One image: a name that stays when others are added, its class (None = none) and where its pixels are.

    `image` is a file, an encoded file's bytes, or uint8 pixels h w or h w c.
    """

    name: str
    label: str | None
    image: Path | bytes | np.ndarray


@dataclass(frozen=True)
class Ignored:
    """Something in a source that is no image: its ending, or what it is."""

    kind: str


@dataclass(frozen=True)
class Source:
    """Images in a fixed order, readable as often as needed in bounded memory.

    `identity` (JSON values) changes when the content changes. `class_names` None: those found, sorted; `folders`: those
    that are there to be found. `background` overrides the configured one; `enlarge` lets images smaller than the model
    be scaled up. `ignored` counts what is no image; None: the records say so.
    """

    where: str
    identity: Mapping[str, object]
    records: Callable[[], Iterator[Record | Rejected | Ignored]]
    num_records: int | None = None
    class_names: tuple[str, ...] | None = None
    background: str | None = None
    enlarge: bool = False
    folders: tuple[str, ...] = ()
    ignored: Mapping[str, int] | None = None
    notes: tuple[str, ...] = ()


def file_identity(path: Path) -> list[object]:
    """What tells one state of a file from another: resolved path, bytes, modification time in ns. OSError."""
    status = os.stat(path)
    return [printable(path.resolve()), status.st_size, status.st_mtime_ns]
