"""The images of a folder: which files are read, what is passed over and why, and of which class an image is."""

import errno
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ul_runtime.errors import BadInputError
from ul_runtime.images.convert import load_image
from ul_runtime.images.decode import SUFFIXES, ImageRejectedError, Rejected, check_regular, open_regular
from ul_runtime.images.kinds import HEAD_BYTES, is_image_kind, kind_of
from ul_runtime.images.png import is_contact_sheet

if TYPE_CHECKING:
    import numpy as np

    from ul_runtime.pipeline import Pipeline

_MAX_DEPTH = 32
# Images that their first bytes do not tell, or tell wrongly: a raw photograph begins as a TIFF of its preview.
_RAW = "dng cr2 cr3 crw nef nrw arw srf sr2 raf orf rw2 pef srw erf kdc 3fr iiq"
_UNREAD = frozenset(f".{ending}" for ending in f"tga pcx sgi pfm pam {_RAW}".split())
# captions and labels: not opened, as there may be one for each image
_NEVER_IMAGES = frozenset((".txt", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".npy"))
# Folders that an operating system or a file server makes, of thumbnails or of what was removed.
_SYSTEM = "__MACOSX/@eaDir/@Recycle/#recycle/#snapshot/$RECYCLE.BIN/lost+found/System Volume Information"
_OF_THE_SYSTEM = frozenset(_SYSTEM.split("/"))
# Each command of this program that writes pictures writes one of these beside them, with the name of the program in it.
_NEVER_A_SOURCE = ("run.json", "manifest.json", "results.json", "eval.json")
_OUR_FILES = (*_NEVER_A_SOURCE, "generate.json", "decode.json")
_OUR_NAME = b'"unified-latents'


def printable(name: str | Path) -> str:
    """`name` as it can be shown on one line and stored as UTF-8: other bytes and controls escaped."""
    text = str(name).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def class_name(name: str) -> str:
    """The one spelling of a class: printable, in Unicode's form NFC, where names that look the same are the same."""
    return unicodedata.normalize("NFC", printable(name))


def is_of_the_user(name: str) -> bool:
    """False for hidden files and folders, and for those that a system makes."""
    return not name.startswith(".") and name not in _OF_THE_SYSTEM


@dataclass(frozen=True)
class Found:
    """A file to read as an image; or, with a `problem`, what keeps one from being read.

    `relative`: below the folder that was looked through, printable. `folders`: between the two, the outermost first;
    to train, that one is the class.
    """

    relative: str
    path: Path
    folders: tuple[str, ...] = ()
    size: int = 0
    mtime_ns: int = 0
    problem: ImageRejectedError | None = None


class ImageSearch:
    """One pass over a tree, names sorted; holds one folder's listing per level, never the whole tree.

    Counted on the way: `ignored`, what is passed over, by ending or kind; `odd`, endings of images that were known by
    their first bytes alone; `folders`, those on the first level. BadInputError: a run, a bundle or the like.
    """

    def __init__(self, root: Path) -> None:
        if ours := next((name for name in _NEVER_A_SOURCE if _is_ours(root / name)), None):
            raise BadInputError(f"{printable(root)}: was written by this program ({ours}); expected a folder of images")
        self.root = root
        self.ignored: Counter[str] = Counter()
        self.odd: Counter[str] = Counter()
        self.folders: list[str] = []
        self._real_root = Path(os.path.realpath(root))
        self._linked: set[tuple[int, int]] = set()

    def __iter__(self) -> Iterator[Found]:
        """Every image file and every obstacle, in the order of their names."""
        return self._below(self.root, "", ())

    def _below(self, folder: Path, prefix: str, folders: tuple[str, ...]) -> Iterator[Found]:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            yield Found(prefix or ".", folder, problem=_unreadable(error))
            return
        for entry in entries:
            relative, path = f"{prefix}{printable(entry.name)}", Path(entry.path)
            try:
                if not is_of_the_user(entry.name):
                    self.ignored["hidden" if entry.name.startswith(".") else f"{entry.name}/"] += 1
                elif stat.S_ISDIR((status := entry.stat()).st_mode):
                    if self._is_entered(path, relative, entry.is_symlink(), status, len(folders)):
                        yield from self._below(path, f"{relative}/", (*folders, class_name(entry.name)))
                elif self._is_image(path, status.st_mode):
                    yield Found(relative, path, folders, status.st_size, status.st_mtime_ns)
            except OSError as error:
                yield Found(relative, path, folders, problem=_unreadable(error))
            except ImageRejectedError as problem:
                yield Found(relative, path, folders, problem=problem)

    def _is_entered(self, path: Path, relative: str, is_link: bool, status: os.stat_result, depth: int) -> bool:
        """False, and counted, for folders that hold no images of the user. ImageRejectedError: cannot be entered."""
        if ours := next((name for name in _OUR_FILES if _is_ours(path / name)), None):
            self.ignored[f"{relative}/ (has a {ours} of this program)"] += 1
            return False
        if depth >= _MAX_DEPTH:
            raise ImageRejectedError("nested too deep", f"more than {_MAX_DEPTH} folders")
        if is_link:
            key = (status.st_dev, status.st_ino)
            if Path(os.path.realpath(path)).is_relative_to(self._real_root) or key in self._linked:
                raise ImageRejectedError("symbolic link loop", "links to a folder that is read anyway")
            self._linked.add(key)
        if depth == 0:
            self.folders.append(class_name(path.name))
        return True

    def _is_image(self, path: Path, mode: int) -> bool:
        """False, and counted: no image. ImageRejectedError: an image that is not read."""
        ending = path.suffix.lower()
        if is_contact_sheet(path):
            self.ignored[path.name] += 1
            return False
        if ending in SUFFIXES:
            check_regular(mode)
            return True
        is_image = stat.S_ISREG(mode) and is_image_file(ending, lambda: _head(path))
        (self.odd if is_image else self.ignored)[printable(ending) or "no ending"] += 1
        return is_image


def is_image_file(ending: str, read_head: Callable[[], bytes]) -> bool:
    """Whether the first bytes of a file are those of an image, where its ending does not say so.

    ImageRejectedError: the ending is of images that are not read.
    """
    if ending in _UNREAD:
        raise ImageRejectedError("unsupported", f"{ending}; convert it to PNG")
    return ending not in _NEVER_IMAGES and is_image_kind(kind_of(read_head()))


def _is_ours(file: Path) -> bool:
    """Whether this program wrote a file of JSON."""
    try:
        with open_regular(file) as stream:
            return _OUR_NAME in stream.read(1 << 20)
    except (OSError, ImageRejectedError):
        return False


def _head(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.read(HEAD_BYTES)


def _unreadable(error: OSError) -> ImageRejectedError:
    if error.errno == errno.ELOOP:
        return ImageRejectedError("symbolic link loop")
    return ImageRejectedError("not readable", error.strerror or "")


def first_three(rejected: Sequence[Rejected]) -> str:
    """The first three of them, for a message."""
    return "; ".join(map(str, rejected[:3])) + ("; ..." if len(rejected) > 3 else "")


def in_words(counts: Counter[str], most: int = 10) -> str:
    """What was counted, the most frequent first: `30 .txt, 2 hidden`."""
    words = [f"{count:,} {what}" for what, count in counts.most_common(most)]
    return ", ".join(words + ["..."] * (len(counts) > most))


def find_images(paths: Sequence[Path]) -> tuple[list[Found], Counter[str]]:
    """The files given and the image files of the folders given, in order; and what was passed over in the folders.

    BadInputError: no such file, or a folder without images.
    """
    found: list[Found] = []
    ignored: Counter[str] = Counter()
    for path in paths:
        if path.is_dir():
            search = ImageSearch(path)
            inside = list(search)
            if not inside:
                others, endings = in_words(search.ignored) or "nothing", " ".join(sorted(SUFFIXES))
                raise BadInputError(f"{path}: the folder holds no images (found {others}); expected {endings}")
            found += inside
            ignored += search.ignored
        elif path.is_file():
            found.append(Found(printable(path), path))
        else:
            raise BadInputError(f"{path}: no such file or folder; expected images or folders of them")
    return found, ignored


def class_of(found: Found, names: Collection[str]) -> str | None:
    """The outermost of the folders of an image that is a class of these `names` (in one spelling), if one is."""
    around = class_name(found.path.absolute().parent.name)
    return next((folder for folder in (*found.folders, around) if folder in names), None)


def read_images(paths: "str | Path | Iterable[str | Path]", pipeline: "Pipeline") -> "np.ndarray":
    """Image files, or all images of folders in order, as x float32 `b c h w` in [-1, 1], as `pipeline` takes them.

    They are converted to its size and channels, as in training. BadInputError: no such file, or one that cannot be
    read; it says which.
    """
    import numpy as np

    given = [paths] if isinstance(paths, str | Path) else paths
    images = []
    for file in find_images([Path(path) for path in given])[0]:
        try:
            if file.problem is not None:
                raise file.problem
            images.append(load_image(file.path, pipeline.manifest.image)[0])
        except ImageRejectedError as problem:
            raise BadInputError(f"{problem.at(printable(file.path))}") from None
    if not images:
        raise BadInputError("no images are given; expected paths of images, or of folders of them")
    return np.stack(images)
