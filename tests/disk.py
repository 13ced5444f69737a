"""The system calls of ul_runtime.files.durable in a test's hands: recorded, failed or dropped."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import pytest

from ul_runtime.files import durable

_APPEND = os.O_RDWR | os.O_APPEND | os.O_CREAT
_real_renameat2 = durable._renameat2


class Disk:
    """Does the real calls; a test overrides those that it is about."""

    @contextmanager
    def in_use(self) -> Iterator[Self]:
        """Within the block, durable writes go through this object."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(durable, "os", _Os(self))
            patch.setattr(durable, "_renameat2", self._renameat2)
            yield self

    def _renameat2(self, a: Path, b: Path, flag: int) -> None:
        (self.rename_to_free if flag == durable._RENAME_NOREPLACE else self.exchange)(a, b)

    def create(self, path: Path) -> int:
        return os.open(path, durable._CREATE, 0o666)

    def open(self, path: Path) -> int:
        return os.open(path, durable._READ)

    def open_to_append(self, path: Path) -> int:
        return os.open(path, _APPEND, 0o666)

    def write(self, fd: int, data: memoryview) -> int:
        return os.write(fd, data)

    def sync(self, fd: int) -> None:
        os.fsync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def make_directory(self, path: Path) -> None:
        os.mkdir(path)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def rename_to_free(self, source: Path, target: Path) -> None:
        _real_renameat2(source, target, durable._RENAME_NOREPLACE)

    def exchange(self, a: Path, b: Path) -> None:
        _real_renameat2(a, b, durable._RENAME_EXCHANGE)

    def remove(self, path: Path) -> None:
        os.unlink(path)


class _Os:
    """The module `os` as durable sees it. Descriptors that only hold a lock are none of the disk's."""

    def __init__(self, disk: Disk) -> None:
        self.fsync, self.mkdir, self.rename, self.unlink = disk.sync, disk.make_directory, disk.rename, disk.remove
        self.write = disk.write
        self._opens = {durable._CREATE: disk.create, durable._READ: disk.open, _APPEND: disk.open_to_append}
        self._close = disk.close
        self._opened: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        if flags not in self._opens:
            return os.open(path, flags, mode)
        fd = self._opens[flags](path)
        self._opened.add(fd)
        return fd

    def close(self, fd: int) -> None:
        known = fd in self._opened
        self._opened.discard(fd)
        (self._close if known else os.close)(fd)
