"""Which kind of source a `--data` string names."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from ul_runtime.errors import BadInputError
from ul_runtime.images import SUFFIXES
from ul_train.data.arrays import DIGITS, _digits, find_idx, idx_sources, npz_source
from ul_train.data.folder import folder_source
from ul_train.data.huggingface import huggingface_sources
from ul_train.data.records import Source, printable
from ul_train.data.shards import SHARD_SUFFIXES, expand_braces, find_shards, shard_source

_HELDOUT_FOLDERS = ("heldout", "val", "valid", "validation", "test")
_KINDS = (
    f"a folder of images, a folder of IDX files, a .npz, WebDataset shards (.tar), hf:NAME_OR_PATH[:split] or {DIGITS}"
)


def recognise(text: str, classes: Literal["auto", "none"]) -> tuple[Source, Source | None]:
    """The training images that `text` names and the held-out ones, if it separates them.

    BadInputError: missing, of no known kind, or damaged where that shows at once.
    """
    if text == DIGITS:
        return _digits(classes), None
    if text.startswith("hf:"):
        return huggingface_sources(text, classes)
    if "{" in text and text.lower().endswith(SHARD_SUFFIXES):
        return shard_source(printable(text), [Path(name) for name in expand_braces(text)], classes), None
    path = Path(text).expanduser()
    if path.is_dir():
        return _in_folder(path, classes)
    if not path.exists():
        raise BadInputError(f"{printable(text)}: does not exist; expected {_KINDS}")
    if path.suffix.lower() == ".npz":
        return npz_source(path, classes), None
    if path.name.lower().endswith(SHARD_SUFFIXES):
        return shard_source(printable(text), [path], classes), None
    hint = f"; try hf:{text}" if path.suffix.lower() in (".parquet", ".arrow") else ""
    raise BadInputError(f"{printable(text)}: a file of no known kind; expected {_KINDS}{hint}")


def _in_folder(path: Path, classes: Literal["auto", "none"]) -> tuple[Source, Source | None]:
    try:
        folders = {entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
        has_images = any(entry.suffix.lower() in SUFFIXES for entry in path.iterdir())
        if any(find_idx(path).values()):
            return idx_sources(path, classes)
        shards = find_shards(path)
    except OSError as error:
        raise BadInputError(f"{printable(str(path))}: cannot be read ({error.strerror})") from error
    heldout = next((name for name in _HELDOUT_FOLDERS if name in folders), None)
    if "train" in folders and not has_images and not shards and (heldout or folders == {"train"}):
        train = _without_splits(path / "train", classes)
        unused = sorted(folders - {"train", heldout})
        if unused:
            note = f"{printable(str(path))}: held out is {heldout}/; not used: {', '.join(map(printable, unused))}"
            train = _with_note(train, note)
        return train, _without_splits(path / heldout, classes) if heldout else None
    return _without_splits(path, classes), None


def _without_splits(path: Path, classes: Literal["auto", "none"]) -> Source:
    shards = find_shards(path)
    if not shards:
        return folder_source(path, classes)
    if any(entry.suffix.lower() in SUFFIXES for entry in path.iterdir()):
        raise BadInputError(f"{printable(str(path))}: images and .tar shards in one folder; separate them")
    return shard_source(printable(str(path)), shards, classes)


def _with_note(source: Source, note: str) -> Source:
    return replace(source, notes=(*source.notes, note))
