"""A folder that must hold certain files and nothing else: bundles and checkpoints.

Regular files only, each with one name, opened once by the folder's descriptor, so what is parsed is what was hashed.
"""

import hashlib
import logging
import os
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ul_runtime.errors import BadInputError, UntrustedError
from ul_runtime.machine import in_units, memory_bytes
from ul_runtime.manifest import MAX_FILES, FileEntry

_LOG = logging.getLogger(__name__)
# What file managers leave in any folder that is looked at; nothing here reads them. Also `._NAME` beside a file NAME.
LITTER = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})


@dataclass(frozen=True)
class Kind:
    """Words for messages."""

    name: str  # bundle
    made: str  # what was expected: the folder that ul-export wrote
    index: str  # the manifest
    again: str  # how to get it anew


@dataclass(frozen=True)
class ClosedFolder:
    """The open folder at `path`."""

    path: Path
    kind: Kind
    folder: int
    allow_hard_links: bool = False

    def names(self) -> set[str]:
        """Names in the directory, refused as soon as there are too many."""
        most = MAX_FILES + len(LITTER) + 1
        with os.scandir(self.folder) as entries:
            names = [entry.name for entry in islice(entries, most + 1)]
        if len(names) > most:
            raise BadInputError(f"{self.path}: not a {self.kind.name}: more than {most} files in it")
        return set(names)

    def check_closed(self, names: set[str], listed: Collection[str]) -> None:
        """Every listed file is there, and nothing else but LITTER, which is said."""
        if missing := sorted(set(listed) - names):
            raise BadInputError(f"{self.path / missing[0]}: missing; {self.kind.again}")
        extra = names.difference(listed)
        if litter := sorted(extra & {*LITTER, *(f"._{name}" for name in listed)}):
            _LOG.info("%s: %s is no part of the %s and is not read", self.path, ", ".join(litter), self.kind.name)
        if extra := extra.difference(litter):
            raise BadInputError(f"{self.path}: {min(extra)!a} is no part of the {self.kind.name}; remove it")

    def _open(self, name: str) -> int:
        """A descriptor of a regular file with no other name."""
        where = self.path / name
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            if not stat.S_ISREG(os.stat(name, dir_fd=self.folder, follow_symlinks=False).st_mode):
                raise UntrustedError(
                    f"{where}: a link, pipe, device or folder; a {self.kind.name} holds plain files only"
                )
            fd = os.open(name, flags, dir_fd=self.folder)
        except FileNotFoundError:
            raise BadInputError(f"{where}: missing; {self.kind.again}") from None
        except OSError as error:
            raise BadInputError(f"{where}: cannot open: {error.strerror}") from error
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode) and (status.st_nlink <= 1 or self.allow_hard_links):
            return fd
        os.close(fd)
        advice = f"copy the {self.kind.name} with cp -r first"
        raise UntrustedError(f"{where}: has {status.st_nlink} names (hard links); {advice}")

    def check_memory(self, size: int) -> None:
        """BadInputError for more bytes than this machine has memory."""
        if size > (memory := memory_bytes()):
            raise BadInputError(
                f"{self.path}: {in_units(size)} are to be read, this machine has {in_units(memory)} of memory"
            )

    def read(self, name: str, limit: int) -> bytes:
        """All bytes of a file that must not be larger than `limit`."""
        with os.fdopen(self._open(name), "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > limit:
                raise BadInputError(f"{self.path / name}: {size} bytes; at most {limit} are allowed")
            return stream.read(size)

    def read_entry(self, name: str, entry: FileEntry, *, skip: bool = False) -> bytes | None:
        """Bytes of a listed file, equal to its entry in size and SHA-256; with `skip`, only kind and size."""
        where = self.path / name
        with os.fdopen(self._open(name), "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            data = b"" if skip or size != entry.size else stream.read(entry.size)
        if size != entry.size:
            raise BadInputError(f"{where}: {size} bytes, {self.kind.index} says {entry.size}; {self.kind.again}")
        if skip:
            return None
        if (found := hashlib.sha256(data).hexdigest()) != entry.sha256:
            raise BadInputError(
                f"{where}: SHA-256 is {found}, {self.kind.index} says {entry.sha256}; {self.kind.again}"
            )
        return data


@contextmanager
def closed_folder(
    path: Path, kind: Kind, *, allow_hard_links: bool = False, follow: bool = True
) -> Iterator[ClosedFolder]:
    """The folder at `path`, open; `follow`: it may be reached by a link. BadInputError: it is none."""
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    except OSError as error:
        raise BadInputError(f"{path}: cannot open: {error.strerror}; expected {kind.made}") from error
    try:
        yield ClosedFolder(path, kind, folder, allow_hard_links)
    finally:
        os.close(folder)
