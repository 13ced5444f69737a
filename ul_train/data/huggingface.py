"""Hugging Face data sets, on the hub or on this disk, streamed; the images are decoded by `convert`, not there."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ul_runtime.errors import BadInputError, UsageError
from ul_runtime.images.decode import ImageRejectedError, Rejected
from ul_runtime.images.find import printable
from ul_runtime.install import install
from ul_train.data.records import MAX_IMAGE_BYTES, Record, Source, file_identity

HELDOUT_SPLITS = ("test", "validation", "valid", "val", "heldout")
_ERRORS = (OSError, ValueError, LookupError, TypeError, RuntimeError)
_LABEL_COLUMNS = ("label", "labels", "class", "fine_label")


@contextmanager
def _reading(where: str) -> Iterator[None]:
    """Errors of the library, the network and damaged files as one BadInputError."""
    import datasets

    try:
        yield
    except (*_ERRORS, datasets.exceptions.DatasetsError) as error:
        text = (str(error) or type(error).__name__).splitlines()[0]
        raise BadInputError(f"{where}: cannot be read as a Hugging Face data set: {text}") from error


def huggingface_sources(source: str, labelled: bool) -> tuple[Source, Source | None]:
    """`hf:NAME_OR_PATH[:split]` -> training and, unless a split is named, held-out images.

    UsageError without the `datasets` package; BadInputError for what cannot be found or read.
    """
    try:
        import datasets
    except ImportError as error:
        raise UsageError(f"{source}: needs the package datasets; {install('train')}") from error
    text = source.removeprefix("hf:")
    if not text.strip():
        raise UsageError(f"{source}: names no data set; expected hf:NAME, hf:NAME:SPLIT or hf:FOLDER")
    name, colon, wanted = text.rpartition(":")
    is_split = bool(colon) and "/" not in wanted and not Path(text).exists()
    name = name if is_split else text
    had_progress_bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with _reading(source):
            if Path(name).is_file() and Path(name).suffix == ".parquet":
                builder = datasets.load_dataset_builder("parquet", data_files=str(Path(name)))
            else:
                builder = datasets.load_dataset_builder(name)
            splits = builder.as_streaming_dataset()
    finally:
        if had_progress_bars:
            datasets.enable_progress_bars()
    names = list(splits)
    part = partial(_part, source, builder, splits, labelled)
    if is_split:
        if wanted not in names:
            raise BadInputError(f"{source}: no split {wanted!r}; it has {', '.join(names)}")
        return part(wanted), None
    if len(names) == 1:
        return part(names[0]), None
    if "train" not in names:
        raise BadInputError(f"{source}: has the splits {', '.join(names)}; name one: {source}:{names[0]}")
    heldout = next((split for split in HELDOUT_SPLITS if split in names), None)
    return part("train"), part(heldout) if heldout else None


def _part(source: str, builder: Any, splits: Any, labelled: bool, split: str) -> Source:
    features = splits[split].features or {}
    image, label, class_names = _columns(f"{source} {split}", features, labelled)
    # the state of files on this disk; addresses on the hub contain the commit
    files = [str(file) for part in (builder.config.data_files or {}).values() for file in part]
    return Source(
        where=f"{source} ({split})",
        identity={
            "kind": "huggingface",
            "split": split,
            "labelled": label is not None,
            "builder": type(builder).__name__,
            "config": str(builder.config.name),
            "files": [file_identity(Path(file)) if Path(file).exists() else file for file in files],
        },
        records=lambda: _records(source, splits[split], image, label, class_names),
        class_names=class_names,
        notes=_note_unused(source, features, image, label) if labelled else (),
    )


def _columns(where: str, features: Any, labelled: bool) -> tuple[str, str | None, tuple[str, ...] | None]:
    """Names of the columns of images and labels, and the class names if the data set has them."""
    import datasets

    image = _image_column(where, features)
    if not labelled:
        return image, None, None
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    labels = [name for name in _LABEL_COLUMNS if name in labels] or labels
    if labels:
        return image, labels[0], tuple(printable(name) for name in features[labels[0]].names)
    named = [name for name in _LABEL_COLUMNS if isinstance(features.get(name), datasets.Value)]
    return image, named[0] if named else None, None


def _image_column(where: str, features: Any) -> str:
    """The one column of images, or of their bytes; of several, the one called image."""
    import datasets

    declared = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    found = declared or [name for name, feature in features.items() if _holds_bytes(feature)]
    if len(found) == 1 or "image" in found:
        return "image" if "image" in found else found[0]
    columns = ", ".join(f"{printable(name)} ({_type_name(feature)})" for name, feature in features.items())
    advice = "load_dataset(NAME).rename_column(COLUMN, 'image').save_to_disk(FOLDER), and then hf:FOLDER"
    raise BadInputError(
        f"{where}: {len(found)} image columns, and none called image; columns: {columns or 'none'}; "
        f"choose one with the package datasets: {advice}"
    )


def _holds_bytes(feature: Any) -> bool:
    """Whether a column that is not declared as images may hold the bytes of their files."""
    return getattr(feature, "dtype", None) == "binary" or (
        isinstance(feature, dict) and {"bytes", "path"} == set(feature)
    )


def _type_name(feature: Any) -> str:
    return str(getattr(feature, "dtype", type(feature).__name__))


def _note_unused(source: str, features: Any, image: str, label: str | None) -> tuple[str, ...]:
    """What is said of a data set with more columns than are used, or with labels that are not found."""
    unused = [f"{printable(name)} ({_type_name(feature)})" for name, feature in features.items()]
    unused = [text for text, name in zip(unused, features, strict=True) if name not in (image, label)]
    if not unused:
        return ()
    classes = f"column {label}" if label else f"a column called {', '.join(_LABEL_COLUMNS)}, which it has not"
    shown = ", ".join(unused[:8]) + (", ..." if len(unused) > 8 else "")
    return (f"{source}: classes come from {classes}; columns that are not used: {shown}",)


def _records(
    where: str, split: Any, image: str, label: str | None, class_names: tuple[str, ...] | None
) -> Iterator[Record | Rejected]:
    import datasets

    rows = iter(split.cast_column(image, datasets.Image(decode=False)))
    index = 0
    while True:
        with _reading(f"{where}, after {index} images"):
            row = next(rows, None)
        if row is None:
            return
        name = f"{index:08d}"
        try:
            yield Record(name, _label(row[label] if label else None, class_names), _image(row[image]))
        except ImageRejectedError as problem:
            yield problem.at(name)
        index += 1


def _label(value: Any, class_names: tuple[str, ...] | None) -> str | None:
    if value is None or (class_names is not None and value == -1):
        return None
    if class_names is None:
        return printable(str(value))
    if not 0 <= value < len(class_names):
        raise ImageRejectedError("label out of range", f"{value} of {len(class_names)} classes")
    return class_names[value]


def _image(cell: Any) -> bytes | Path:
    """An undecoded image: bytes in the row, a file here, or an address that is read now, at most 256 MiB."""
    if cell is not None and cell.get("bytes") is not None:
        return bytes(cell["bytes"])
    path = cell and cell.get("path")
    if not path:
        raise ImageRejectedError("no image in this row")
    if "://" not in path:
        return Path(path)
    base = path.rpartition("::")[2]  # "zip://a.png::hf://..." lies in an archive
    if "://" in base and not base.startswith("hf://"):
        raise ImageRejectedError("an address outside the data set", printable(base))
    import fsspec  # type: ignore[import-untyped]

    try:
        with fsspec.open(path, "rb") as file:
            data: bytes = file.read(MAX_IMAGE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ImageRejectedError("not readable", str(error)) from error
    if len(data) > MAX_IMAGE_BYTES:
        raise ImageRejectedError("member too large", f"at most {MAX_IMAGE_BYTES:,} bytes")
    return data
