"""Which kind of source a `--data` string names."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from ul_runtime.errors import BadInputError, UsageError
from ul_runtime.image_conversion import SUFFIXES
from ul_train.data.folder import folder_source
from ul_train.data.huggingface import huggingface_sources
from ul_train.data.idx import find_idx, idx_sources
from ul_train.data.npz import npz_source
from ul_train.data.records import Record, Source, printable
from ul_train.data.shards import SHARD_SUFFIXES, expand_braces, find_shards, shard_source

DIGITS = "sklearn-digits"
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


def _digits(classes: Literal["auto", "none"]) -> Source:
    """scikit-learn's 1,797 hand-written digits, 8x8, values 0 to 16, scaled up to the model."""
    try:
        import sklearn
        from sklearn.datasets import load_digits
    except ImportError as error:
        message = f"{DIGITS}: needs scikit-learn; pip install 'unified-latents[quickstart]'"
        raise UsageError(message) from error

    def records() -> Iterator[Record]:
        digits = load_digits()
        pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        for index, (image, digit) in enumerate(zip(pixels, digits.target, strict=True)):
            yield Record(f"{index:08d}", str(digit) if classes == "auto" else None, image)

    return Source(
        where=DIGITS,
        identity={"kind": DIGITS, "version": sklearn.__version__, "labelled": classes == "auto"},
        records=records,
        num_records=1797,
        class_names=tuple("0123456789") if classes == "auto" else None,
        background="black",
        enlarge=True,
    )
