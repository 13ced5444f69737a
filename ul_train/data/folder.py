"""A folder of images; the first-level sub-folders are the classes."""

import errno
import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ul_runtime.errors import BadInputError
from ul_runtime.images import SUFFIXES, ImageRejectedError, Rejected, check_regular
from ul_train.data.records import Record, Source, printable

_MAX_DEPTH = 32


@dataclass(frozen=True)
class _Found:
    """A file named as an image, or a thing that cannot be entered; `problem` is None when it can be read."""

    relative: str
    path: Path
    size: int = 0
    mtime_ns: int = 0
    problem: ImageRejectedError | None = None


class _Walk:
    """One pass over a tree, names sorted; holds one folder's listing per level, never the whole tree."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ignored: Counter[str] = Counter()
        self._real_root = Path(os.path.realpath(root))
        self._linked: set[tuple[int, int]] = set()

    def __iter__(self) -> Iterator[_Found]:
        """Every image file and every obstacle, in the order of their names."""
        return self._folder(self.root, "", 0)

    def _folder(self, folder: Path, prefix: str, depth: int) -> Iterator[_Found]:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            yield _Found(prefix or ".", folder, problem=_unreadable(error))
            return
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            relative, path = f"{prefix}{printable(entry.name)}", Path(entry.path)
            try:
                status = entry.stat()
                if stat.S_ISDIR(status.st_mode):
                    self._check_may_enter(path, entry.is_symlink(), status, depth)
                    yield from self._folder(path, f"{relative}/", depth + 1)
                elif path.suffix.lower() in SUFFIXES:
                    check_regular(status.st_mode)
                    yield _Found(relative, path, status.st_size, status.st_mtime_ns)
                else:
                    self.ignored[path.suffix.lower() or "(no extension)"] += 1
            except OSError as error:
                yield _Found(relative, path, problem=_unreadable(error))
            except ImageRejectedError as problem:
                yield _Found(relative, path, problem=problem)

    def _check_may_enter(self, path: Path, is_link: bool, status: os.stat_result, depth: int) -> None:
        if depth >= _MAX_DEPTH:
            raise ImageRejectedError("nested too deep", f"more than {_MAX_DEPTH} folders")
        if is_link:
            key = (status.st_dev, status.st_ino)
            if Path(os.path.realpath(path)).is_relative_to(self._real_root) or key in self._linked:
                raise ImageRejectedError("symbolic link loop", "links to a folder that is read anyway")
            self._linked.add(key)


def _unreadable(error: OSError) -> ImageRejectedError:
    if error.errno == errno.ELOOP:
        return ImageRejectedError("symbolic link loop")
    return ImageRejectedError("not readable", error.strerror or "")


def folder_source(root: Path, labelled: bool) -> Source:
    """The images of a folder. BadInputError: no image file in it, or images beside class folders."""
    digest, count = hashlib.sha256(), 0
    beside: list[str] = []
    folders: set[str] = set()
    walk = _Walk(root)
    for found in walk:
        facts = [found.relative, found.size, found.mtime_ns, str(found.problem or "")]
        digest.update(json.dumps(facts).encode() + b"\n")
        if found.problem is not None:
            continue
        count += 1
        top, _, rest = found.relative.partition("/")
        if rest:
            folders.add(top)
        elif len(beside) < 3:
            beside.append(top)
    where = printable(root)
    if count == 0:
        others = ", ".join(f"{n} {suffix}" for suffix, n in walk.ignored.most_common(5)) or "nothing"
        raise BadInputError(
            f"{where}: no images in this folder (found {others}); expected files ending in {' '.join(sorted(SUFFIXES))}"
        )
    if beside and folders and labelled:
        raise BadInputError(
            f"{where}: images ({', '.join(beside)}) lie beside class folders ({', '.join(sorted(folders)[:3])}); "
            f"move them into a class folder, or train without classes: --set image.labels=false"
        )
    labelled = labelled and bool(folders)
    return Source(
        where=where,
        identity={
            "kind": "folder",
            "root": printable(root.resolve()),
            "labelled": labelled,
            "files": digest.hexdigest(),
        },
        records=lambda: _records(root, labelled),
        num_records=count,
        ignored=dict(walk.ignored),
    )


def _records(root: Path, labelled: bool) -> Iterator[Record | Rejected]:
    for found in _Walk(root):
        if found.problem is not None:
            yield found.problem.at(found.relative)
        else:
            yield Record(found.relative, found.relative.partition("/")[0] if labelled else None, found.path)
