"""Hugging Face data sets, on the hub or on this disk, streamed; the images are decoded by `convert`, not there."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ul_runtime.errors import BadInputError, UsageError
from ul_runtime.images import ImageRejectedError, Rejected
from ul_train.data.records import MAX_IMAGE_BYTES, Record, Source, file_identity, printable

HELDOUT_SPLITS = ("test", "validation", "valid", "val", "heldout")
_ERRORS = (OSError, ValueError, LookupError, TypeError, RuntimeError)
_LABEL_COLUMNS = ("label", "labels", "class", "fine_label")


@dataclass(frozen=True)
class _Columns:
    image: str
    label: str | None
    class_names: tuple[str, ...] | None


@contextmanager
def _reading(where: str) -> Iterator[None]:
    """Errors of the library, the network and damaged files as one BadInputError."""
    import datasets

    try:
        yield
    except (*_ERRORS, datasets.exceptions.DatasetsError) as error:
        text = (str(error) or type(error).__name__).splitlines()[0]
        raise BadInputError(f"{where}: cannot be read as a Hugging Face data set: {text}") from error


def huggingface_sources(source: str, classes: Literal["auto", "none"]) -> tuple[Source, Source | None]:
    """`hf:NAME_OR_PATH[:split]` -> training and, unless a split is named, held-out images.

    UsageError without the `datasets` package; BadInputError for what cannot be found or read.
    """
    try:
        import datasets
    except ImportError as error:
        raise UsageError(f"{source}: needs the package datasets; pip install 'unified-latents[train]'") from error
    name, split = _name_and_split(source.removeprefix("hf:"))
    progress = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with _reading(source):
            builder = _builder(datasets, name)
            splits = builder.as_streaming_dataset()
    finally:
        if progress:
            datasets.enable_progress_bars()
    identity = _identity(builder)
    train, heldout = _choose(source, list(splits), split)

    def part(chosen: str) -> Source:
        columns = _columns(f"{source} {chosen}", splits[chosen].features or {}, datasets, classes)
        return Source(
            where=f"{source} ({chosen})",
            identity={"kind": "huggingface", "split": chosen, "labelled": columns.label is not None} | identity,
            records=lambda: _records(splits[chosen], columns, source, datasets),
            class_names=columns.class_names,
        )

    return part(train), part(heldout) if heldout else None


def _name_and_split(text: str) -> tuple[str, str | None]:
    name, colon, split = text.rpartition(":")
    if not colon or "/" in split or Path(text).exists():
        return text, None
    return name, split


def _builder(datasets: Any, name: str) -> Any:
    path = Path(name)
    if path.is_file() and path.suffix == ".parquet":
        return datasets.load_dataset_builder("parquet", data_files=str(path))
    return datasets.load_dataset_builder(name)


def _identity(builder: Any) -> dict[str, object]:
    """Files on this disk by their state; addresses on the hub contain the commit."""
    files = [str(file) for split in (builder.config.data_files or {}).values() for file in split]
    states = [file_identity(Path(file)) if Path(file).exists() else file for file in files]
    return {"builder": type(builder).__name__, "config": str(builder.config.name), "files": states}


def _choose(source: str, splits: list[str], wanted: str | None) -> tuple[str, str | None]:
    if wanted is not None:
        if wanted not in splits:
            raise BadInputError(f"{source}: no split {wanted!r}; it has {', '.join(splits)}")
        return wanted, None
    if len(splits) == 1:
        return splits[0], None
    if "train" not in splits:
        raise BadInputError(f"{source}: has the splits {', '.join(splits)}; name one: {source}:{splits[0]}")
    return "train", next((name for name in HELDOUT_SPLITS if name in splits), None)


def _columns(where: str, features: Any, datasets: Any, classes: Literal["auto", "none"]) -> _Columns:
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if len(images) != 1:
        found = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
        raise BadInputError(f"{where}: {len(images)} image columns, 1 is expected; columns: {found or 'none'}")
    if classes == "none":
        return _Columns(images[0], None, None)
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    labels = [name for name in _LABEL_COLUMNS if name in labels] or labels
    if labels:
        return _Columns(images[0], labels[0], tuple(printable(name) for name in features[labels[0]].names))
    named = [name for name in _LABEL_COLUMNS if isinstance(features.get(name), datasets.Value)]
    return _Columns(images[0], named[0] if named else None, None)


def _records(split: Any, columns: _Columns, where: str, datasets: Any) -> Iterator[Record | Rejected]:
    rows = iter(split.cast_column(columns.image, datasets.Image(decode=False)))
    index = 0
    while True:
        with _reading(f"{where}, after {index} images"):
            row = next(rows, None)
        if row is None:
            return
        name = f"{index:08d}"
        try:
            yield Record(name, _label(row, columns), _image(row[columns.image]))
        except ImageRejectedError as problem:
            yield problem.at(name)
        index += 1


def _label(row: Any, columns: _Columns) -> str | None:
    value = row[columns.label] if columns.label else None
    if value is None or (columns.class_names is not None and value == -1):
        return None
    if columns.class_names is None:
        return printable(str(value))
    if not 0 <= value < len(columns.class_names):
        raise ImageRejectedError("label out of range", f"{value} of {len(columns.class_names)} classes")
    return columns.class_names[value]


def _image(cell: Any) -> bytes | Path:
    """An undecoded image: bytes in the row, a file here, or an address that is read now, at most 256 MiB."""
    if cell is None:
        raise ImageRejectedError("no image in this row")
    if cell.get("bytes") is not None:
        return bytes(cell["bytes"])
    path = cell.get("path")
    if not path:
        raise ImageRejectedError("no image in this row")
    base = path.rpartition("::")[2]  # "zip://a.png::hf://..." lies in an archive
    if "://" not in path:
        return Path(path)
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
