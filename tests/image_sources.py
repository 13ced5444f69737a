"""Small sources of images for the tests of ul_train.data, and what came out of them."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ul_train.data.imageset import ImageSet, Splits
from ul_train.data.prepare import open_data

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


def opened(source: Path | str, tmp_path: Path, **options: Any) -> Splits:
    defaults: dict[str, Any] = {"size": SIZE, "channels": 3, "cache_dir": tmp_path / "cache"}
    return open_data(str(source), **(defaults | options))


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


def reasons(images: ImageSet) -> dict[str, str]:
    return {entry.path: entry.reason for entry in images.rejected}
