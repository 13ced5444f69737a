"""Small sources of images for the tests of ul_train.data, and what came out of them."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ul_runtime.progress import Tick, silent
from ul_train.config import ImageConfig
from ul_train.data.imageset import ImageSet, PartIndex, Splits
from ul_train.data.prepare import open_sources
from ul_train.data.sources import find_sources

SIZE = 8


def image(value: int, size: int = SIZE) -> Image.Image:
    return Image.new("RGB", (size, size), (value, value, value))


def png(value: int, size: int = SIZE) -> bytes:
    file = io.BytesIO()
    image(value, size).save(file, "PNG")
    return file.getvalue()


def put(path: Path, value: int, size: int = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(value, size))


def opened(
    source: Path | str,
    tmp_path: Path,
    heldout: Path | None = None,
    cache: str = "cache",
    tick: Tick = silent,
    **image: Any,
) -> Splits:
    """The images of `source`, prepared in `tmp_path / cache`; `image` are fields of ImageConfig."""
    config = ImageConfig.model_validate({"size": SIZE, "channels": 3} | image)
    sources = find_sources(str(source), None if heldout is None else str(heldout), config.labels)
    return open_sources(sources, config, tmp_path / cache, tick)


def notes_of(source: Path | str, labelled: bool = True) -> list[str]:
    """What is said of a source before its images are read."""
    return list(find_sources(str(source), None, labelled).all_notes)


def contents(*sets: ImageSet) -> dict[int, str]:
    """Pixel value -> class name (or "") of every image; each value occurs once."""
    found = {}
    for images in sets:
        pixels, labels = images.batch(range(len(images)))
        for row, label in zip(pixels, labels, strict=True):
            value = int(row[0, 0, 0])
            assert value not in found
            assert np.all(row == value)
            found[value] = images.class_names[label] if label >= 0 else ""
    return found


def of(splits: Splits) -> dict[int, str]:
    return contents(splits.train, splits.heldout)


def reasons(part: PartIndex) -> dict[str, str]:
    return {entry.path: entry.reason for entry in part.rejected}
