"""Every durable write of the project: whole or absent after a kill, a power loss or a full disk.

The recipe (Pillai et al. 2014): write under a temporary name beside the target, fsync, close, rename,
fsync the directory. An error of any step is an error of the write, and the temporary name is removed.
System calls go through this module's `os` and `_renameat2`, where tests record, fail or drop them (tests/disk.py).
"""

import ctypes
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ul_runtime.errors import OutputError, ULError, UsageError

LOCK_NAME = ".lock"
_HOLDER = re.compile(rb"(pid \d+ on .+\n)?")
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
_AT_FDCWD = -100
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL  # an existing name, links included, is an error
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # never follows a link or waits for a pipe
_ADVICE = {
    errno.ENOSPC: "free space on this disk and run again",
    errno.EDQUOT: "free space in your quota and run again",
    errno.EFBIG: "raise the file size limit (ulimit -f)",
    errno.EACCES: "choose a folder you may write to",
    errno.EPERM: "choose a folder you may write to",
    errno.EROFS: "choose a folder on a writable disk",
    errno.EIO: "the disk reports an error; write to another one",
}


def _renameat2(a: Path, b: Path, flag: int) -> None:
    """Linux renameat2 (2)."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(b))
    if call(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), ctypes.c_uint(flag)) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(b))


@contextmanager
def as_output_error(path: Path) -> Iterator[None]:
    """Turn the OSErrors of a block into one OutputError that names `path` and says what to do."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "check the folder and its permissions")
        raise OutputError(f"{path}: cannot write: {error.strerror or error}; {advice}") from error


@contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _on_failure(undo: Callable[..., object], *arguments: object) -> Iterator[None]:
    with ExitStack() as stack:
        stack.callback(undo, *arguments)
        yield
        stack.pop_all()


def _temporary_name(final: Path) -> Path:
    return final.parent / f".{final.name}.{secrets.token_hex(8)}.tmp"


def _absolute(path: Path) -> Path:
    """Absolute, with links among its parents followed once; the last name is taken as it is."""
    path = Path(os.path.abspath(path))
    return Path(os.path.realpath(path.parent), path.name)


def _remove_quietly(path: Path) -> None:
    """Remove what a failed attempt left; `sweep` removes later what cannot be removed now."""
    with suppress(OSError):
        if stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path)
        else:
            os.unlink(path)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(fd, view) :]


def _sync(path: Path) -> None:
    with _closing(os.open(path, _READ)) as fd:
        os.fsync(fd)


def write_file(path: Path, chunks: Iterable[bytes]) -> None:
    """Create `path` with these bytes, synced and closed; its name is durable with its directory.

    For files inside a temporary directory. An existing `path` or any failure: OutputError, nothing left.
    """
    with as_output_error(path):
        _create(path, chunks)


def _create(path: Path, chunks: Iterable[bytes]) -> None:
    fd = os.open(path, _CREATE, 0o666)
    with _on_failure(_remove_quietly, path), _closing(fd):
        for chunk in chunks:
            _write_all(fd, chunk)
        os.fsync(fd)


def atomic_write(path: Path, data: bytes, *, overwrite: bool = True) -> None:
    """Put `data` at `path`, replacing a file there; at any crash, old or new, whole. OutputError.

    Without `overwrite`, a name that is taken is a UsageError, and what is there stays.
    """
    path = _absolute(path)
    temporary = _temporary_name(path)
    with as_output_error(path):
        with _on_failure(_remove_quietly, temporary):
            _create(temporary, [data])
            try:
                if overwrite:
                    os.rename(temporary, path)
                else:
                    _renameat2(temporary, path, _RENAME_NOREPLACE)
            except FileExistsError:
                raise UsageError(f"{path}: exists already; choose another name or remove it") from None
        _sync(path.parent)


def write_json(path: Path, record: Any) -> None:
    """`record` as indented JSON, whole or not at all."""
    atomic_write(path, (json.dumps(record, indent=1) + "\n").encode())


def append_line(path: Path, text: str, *, sync: bool = False) -> None:
    """Append `text` and a newline; a half line left by a crash is ended first, a failed append is undone.

    One writer at a time. With `sync`, the line survives a power loss. OutputError; ValueError on a newline.
    """
    if "\n" in text:
        raise ValueError(f"{path}: one line expected, got {text.count(chr(10)) + 1}")
    path = _absolute(path)
    with as_output_error(path):
        with _closing(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)) as fd:
            size = os.fstat(fd).st_size
            torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
            with _on_failure(os.ftruncate, fd, size):
                _write_all(fd, (("\n" if torn else "") + text + "\n").encode())
                if sync:
                    os.fsync(fd)
        if sync and size == 0:
            _sync(path.parent)


def make_directory(path: Path) -> None:
    """Make `path` and its missing parents, names durable; an existing directory is fine. OutputError."""
    path = _absolute(path)
    with as_output_error(path):
        for directory in [*reversed(path.parents), path]:
            if not directory.is_dir():
                with suppress(FileExistsError):
                    os.mkdir(directory)
                if not directory.is_dir():
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory))
                _sync(directory.parent)


@contextmanager
def temporary_directory_beside(final: Path) -> Iterator[Path]:
    """A new directory `.<final>.<random>.tmp` on the disk of `final`, to fill and `commit_directory`.

    Removed at the end unless committed. Locked while in use: `sweep` leaves a living attempt. OutputError; errors
    within name `final`, for nobody knows the other name.
    """
    final = _absolute(final)
    make_directory(final.parent)
    temporary = _temporary_name(final)
    with ExitStack() as at_end:
        with as_output_error(final):
            os.mkdir(temporary)
            at_end.callback(_remove_quietly, temporary)
            fd = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY)
            at_end.callback(os.close, fd)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield temporary
        except ULError as error:
            if str(temporary) not in str(error):
                raise
            raise type(error)(str(error).replace(str(temporary), str(final))) from error


def _sync_tree(directory: Path) -> None:
    """Sync every file, then every directory above it; a link or a pipe in it is an error."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            _sync(Path(folder, name))
        _sync(Path(folder))


def commit_directory(temporary: Path, final: Path) -> None:
    """Give a filled temporary directory its final name, whole and durable.

    `final` must be free or an empty directory: UsageError; the first of two attempts wins. OutputError.
    """
    temporary, final = _absolute(temporary), _absolute(final)
    with as_output_error(final):
        if final.is_symlink() or (final.exists() and not (final.is_dir() and not any(final.iterdir()))):
            raise UsageError(f"{final}: exists already; choose another name or remove it")
        _sync_tree(temporary)
        os.rename(temporary, final)
        _sync(final.parent)


def replace_directory(temporary: Path, final: Path) -> None:
    """As `commit_directory`, over the directory there; at any crash, old or new, whole. OutputError."""
    temporary, final = _absolute(temporary), _absolute(final)
    with as_output_error(final):
        _sync_tree(temporary)
        try:
            _renameat2(temporary, final, _RENAME_EXCHANGE)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.EOPNOTSUPP):
                raise
            message = f"{final}: this file system cannot replace a directory in one step; remove it first"
            raise OutputError(message) from error
        _sync(final.parent)
    _remove_quietly(temporary)


def _in_use(path: Path) -> bool:
    """Whether a living process holds this temporary directory."""
    with _closing(os.open(path, _READ)) as fd:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def sweep(parent: Path, name: str | None = None) -> list[str]:
    """Remove the temporary files and directories of dead attempts at `parent/name`; returns their names.

    None = at any name in `parent`. Directories of living attempts stay. For files, hold the directory lock.
    OutputError.
    """
    pattern = re.compile(rf"\.{'.+' if name is None else re.escape(name)}\.[0-9a-f]{{16}}\.tmp")
    removed = []
    with as_output_error(parent):
        names = sorted(os.listdir(parent)) if parent.is_dir() else []
        for path in (parent / name for name in names if pattern.fullmatch(name)):
            if not path.is_symlink() and not (path.is_dir() and _in_use(path)):
                _remove_quietly(path)
                removed.append(path.name)
    return removed


def check_output_directory(path: Path, allowed: Sequence[str] = ()) -> None:
    """Refuse, before any work, a folder that is not writable or holds names that no pattern allows.

    Our temporary names and lock are allowed; a missing folder is fine if it can be made (not made here).
    UsageError: not a folder, or other things in it. OutputError: not writable.
    """
    path = _absolute(path)
    with as_output_error(path):
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path}: is a file, a folder is expected; choose another name")
        ours = [*allowed, LOCK_NAME, ".*.tmp"]
        names = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
        foreign = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in ours)]
        if foreign:
            shown = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
            raise UsageError(f"{path}: holds other things ({shown}); choose an empty folder or remove them")
        existing = next(folder for folder in (path, *path.parents) if folder.exists())
        sweep(existing, "probe")  # of processes that were killed here
        probe = _temporary_name(existing / "probe")
        os.close(os.open(probe, _CREATE, 0o666))
        with suppress(FileNotFoundError):  # swept by another process
            os.unlink(probe)


def _claim_lock(file: Path) -> int:
    """An fd that holds the lock of `file`. BlockingIOError: another process has it. UsageError: it is not a lock."""
    while True:
        fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        with _on_failure(os.close, fd):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            status = os.fstat(fd)
            with suppress(FileNotFoundError):
                if os.path.samestat(status, os.stat(file)):  # not just removed by its holder
                    if status.st_nlink > 1 or not _HOLDER.fullmatch(os.pread(fd, 400, 0)):
                        raise UsageError(f"{file}: was not written by this toolkit; move it or choose another folder")
                    return fd
        os.close(fd)


@contextmanager
def lock_directory(path: Path) -> Iterator[None]:
    """Hold `path` (made if missing) for this process until the block ends or the process dies.

    A second holder gets UsageError with pid and host of the first; the lock of a dead one is taken over.
    """
    path = _absolute(path)
    make_directory(path)
    file = path / LOCK_NAME
    with ExitStack() as at_end:
        with as_output_error(path):
            try:
                fd = _claim_lock(file)
            except BlockingIOError:
                holder = ""
                with suppress(OSError):
                    holder = file.read_text(errors="replace").strip()
                message = f"in use by {holder or 'another process'}; wait or choose another folder"
                raise UsageError(f"{path}: {message}") from None
            at_end.callback(os.close, fd)
            at_end.callback(_remove_quietly, file)
            os.ftruncate(fd, 0)
            _write_all(fd, f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
