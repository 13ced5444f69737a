"""What every source of images hands over: records in a fixed order, each an image still to be decoded."""

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


@dataclass(frozen=True)
class Rejected:
    """An image (or a file that should hold some) that was set aside: where, why, and what was seen."""

    path: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


class ImageRejectedError(Exception):
    """Says why one image cannot be used; caught where images are counted, it never ends a run."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def at(self, path: str) -> Rejected:
        """This refusal as an entry of the list of rejected images."""
        return Rejected(path, self.reason, self.detail)


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


def printable(text: str) -> str:
    """`text` as it can be shown on one line and stored as UTF-8: other bytes and controls escaped."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def check_regular(mode: int) -> None:
    """ImageRejectedError unless the st_mode is that of a regular file."""
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "of unknown kind")
        raise ImageRejectedError("not a regular file", kind)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file, never waiting for a pipe or touching a device. OSError, ImageRejectedError."""
    check_regular(os.stat(path).st_mode)
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        check_regular(os.fstat(fd).st_mode)
        return os.fdopen(fd, "rb")
    except ImageRejectedError:
        os.close(fd)
        raise


def file_identity(path: Path) -> list[object]:
    """What tells one state of a file from another: resolved path, bytes, modification time in ns. OSError."""
    status = os.stat(path)
    return [printable(str(path.resolve())), status.st_size, status.st_mtime_ns]
