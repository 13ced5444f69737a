"""The sources of images that `--data` and `--heldout` name."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ul_runtime.errors import BadInputError, UsageError
from ul_runtime.images.decode import SUFFIXES
from ul_runtime.images.find import is_of_the_user, printable
from ul_train.data.arrays import DIGITS, digits_source, find_idx, idx_sources, npz_source
from ul_train.data.folder import HELDOUT_FOLDERS, TRAIN_FOLDERS, folder_source
from ul_train.data.huggingface import huggingface_sources
from ul_train.data.records import Source
from ul_train.data.shards import SHARD_SUFFIXES, expand_braces, find_shards, shard_source

_KINDS = (
    f"a folder of images, a folder of IDX files, a .npz, WebDataset shards (.tar), hf:NAME_OR_PATH[:split] or {DIGITS}"
)


@dataclass(frozen=True)
class Sources:
    """Images to train on, and those to hold out; None: some of the former, chosen by name."""

    train: Source
    heldout: Source | None
    notes: tuple[str, ...] = ()

    @property
    def all_notes(self) -> tuple[str, ...]:
        """On the sources themselves, and on how they are used."""
        return (*self.train.notes, *(self.heldout.notes if self.heldout else ()), *self.notes)

    @property
    def num_records(self) -> int | None:
        """Of both together, where both know it."""
        if self.heldout is None or self.train.num_records is None:
            return self.train.num_records
        return None if self.heldout.num_records is None else self.train.num_records + self.heldout.num_records


def find_sources(data: str, heldout_data: str | None, labelled: bool) -> Sources:
    """What `data` and, if given, `heldout_data` name; without classes unless `labelled`. BadInputError, UsageError."""
    train, heldout = _recognise(data, labelled)
    notes: tuple[str, ...] = ()
    if heldout_data is not None:
        if heldout is not None:
            notes = (f"{data}: its own held-out images are not used; {heldout_data} is",)
        heldout, second = _recognise(heldout_data, labelled)
        if second is not None:
            raise UsageError(f"{heldout_data}: has splits of its own; name the one to hold out")
    if heldout is not None and heldout.identity == train.identity:
        raise UsageError(f"{heldout_data}: is the training set; name other images to hold out")
    return Sources(train, heldout, notes)


def user_path(text: str) -> Path:
    """A path with `~` put in place; where there is no such user or home, as it was given."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def _recognise(text: str, labelled: bool) -> tuple[Source, Source | None]:
    """The training images that `text` names and the held-out ones, if it separates them.

    BadInputError: missing, of no known kind, or damaged where that shows at once.
    """
    if text == DIGITS:
        return digits_source(labelled), None
    if text.startswith("hf:"):
        return huggingface_sources(text, labelled)
    if "{" in text and text.lower().endswith(SHARD_SUFFIXES):
        return shard_source(printable(text), [Path(name) for name in expand_braces(text)], labelled), None
    path = user_path(text)
    if path.is_dir():
        return _in_folder(path, labelled)
    if not path.exists():
        raise BadInputError(f"{printable(text)}: does not exist; expected {_KINDS}")
    if path.suffix.lower() == ".npz":
        return npz_source(path, labelled), None
    if path.name.lower().endswith(SHARD_SUFFIXES):
        return shard_source(printable(text), [path], labelled), None
    hint = f"; try hf:{text}" if path.suffix.lower() in (".parquet", ".arrow") else ""
    raise BadInputError(f"{printable(text)}: a file of no known kind; expected {_KINDS}{hint}")


def _in_folder(path: Path, labelled: bool) -> tuple[Source, Source | None]:
    try:
        folders = {entry.name for entry in path.iterdir() if entry.is_dir() and is_of_the_user(entry.name)}
        has_images = _has_images(path)
        if any(find_idx(path).values()):
            return idx_sources(path, labelled)
        shards = find_shards(path)
    except OSError as error:
        raise BadInputError(f"{printable(path)}: cannot be read ({error.strerror})") from error
    train, heldout = (_split(path, folders, names) for names in (TRAIN_FOLDERS, HELDOUT_FOLDERS))
    if has_images or shards or not (train or heldout):
        return _without_splits(path, labelled), None
    if train and (heldout or len(folders) == 1):
        source = _without_splits(path / train, labelled)
        unused = sorted(folders - {train, heldout})
        if unused:
            note = f"{printable(path)}: held out is {heldout}/; not used: {', '.join(map(printable, unused))}"
            source = replace(source, notes=(*source.notes, note))
        return source, _without_splits(path / heldout, labelled) if heldout else None
    if len(folders) > 1 and all(name.casefold() in HELDOUT_FOLDERS for name in folders):
        found = ", ".join(f"{printable(name)}/" for name in sorted(folders))
        raise BadInputError(
            f"{printable(path)}: has {found}, and no train/; name the folder to train on, such as "
            f"--data {printable(path / sorted(folders)[0])}, and perhaps another with --heldout"
        )
    return _without_splits(path, labelled), None


def _split(path: Path, folders: set[str], names: Sequence[str]) -> str | None:
    """The first folder of these names, in capitals or not. BadInputError: two differ by capitals alone."""
    for name in names:
        found = sorted(folder for folder in folders if folder.casefold() == name)
        if len(found) > 1:
            raise BadInputError(f"{printable(path)}: has {'/ and '.join(found)}/; join or rename them")
        if found:
            return found[0]
    return None


def _without_splits(path: Path, labelled: bool) -> Source:
    shards = find_shards(path)
    if not shards:
        return folder_source(path, labelled)
    if _has_images(path):
        raise BadInputError(f"{printable(path)}: images and .tar shards in one folder; separate them")
    return shard_source(printable(path), shards, labelled)


def _has_images(folder: Path) -> bool:
    names = (entry.name for entry in folder.iterdir())
    return any(is_of_the_user(name) and Path(name).suffix.lower() in SUFFIXES for name in names)
