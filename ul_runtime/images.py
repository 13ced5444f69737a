"""The images that ul-encode is given: as training would see them, so that what is encoded is what was learned."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ul_runtime.errors import BadInputError
from ul_runtime.image_conversion import SUFFIXES, Conversion, ImageRejectedError, convert
from ul_runtime.image_folder import is_sheet
from ul_runtime.manifest import ImageFormat


def list_images(paths: Sequence[Path]) -> list[Path]:
    """The files given, and for folders all image files below them, in order of name. BadInputError if none.

    The contact sheet of a folder of ul-generate is left out.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            below = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
            inside = [file for file in below if file.is_file() and not is_sheet(file)]
            if not inside:
                raise BadInputError(f"{path}: the folder holds no images ({', '.join(sorted(SUFFIXES))})")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise BadInputError(f"{path}: no such file or folder; expected images or folders of them")
    return found


def load_image(path: Path, image: ImageFormat) -> tuple[np.ndarray, tuple[str, ...]]:
    """(x float32 `c h w` in [-1, 1], what had to be converted); BadInputError says why a file cannot be used."""
    to = Conversion(image.size, image.channels, image.background, image.fit)
    try:
        pixels, changes = convert(path, to)
    except ImageRejectedError as error:
        raise BadInputError(f"{error.at(str(path))}; remove it or convert it") from None
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1.0), changes
