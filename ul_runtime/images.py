"""Pictures of any kind as the arrays a bundle's encoder takes: x `c h w` in [-1, 1]."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageOps

from ul_runtime.errors import BadInputError

EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_MOST_PIXELS = 100_000_000
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def list_images(paths: Sequence[Path]) -> list[Path]:
    """The files given, and for folders all picture files below them, in order of name. BadInputError if none."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            below = sorted(file for file in path.rglob("*") if file.suffix.lower() in EXTENSIONS)
            inside = [file for file in below if file.is_file()]
            if not inside:
                raise BadInputError(f"{path}: the folder holds no pictures ({', '.join(sorted(EXTENSIONS))})")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise BadInputError(f"{path}: no such file or folder; expected pictures or folders of them")
    return found


def _eight_bit(picture: Image.Image) -> Image.Image:
    """16-bit and 32-bit grey as 8-bit grey; Pillow's own conversion clips instead of scaling."""
    if not picture.mode.startswith("I"):
        return picture
    values = np.asarray(picture).astype(np.float64) / 257.0
    return Image.fromarray(np.rint(np.clip(values, 0.0, 255.0)).astype(np.uint8))


def _flatten(picture: Image.Image, background: str) -> Image.Image:
    """Transparency laid on `background`, everything as RGB."""
    if picture.has_transparency_data:
        above = picture.convert("RGBA")
        below = Image.new("RGBA", above.size, (*ImageColor.getrgb(background)[:3], 255))
        picture = Image.alpha_composite(below, above)
    return picture.convert("RGB")


def load_image(path: Path, channels: int, size: int, background: str) -> np.ndarray:
    """The picture as float32 `c h w` in [-1, 1]: upright, the middle square, resized to `size` px.

    Channels 1 = grey, 3 = RGB on `background`, 4 = RGBA. BadInputError for anything that is not one whole picture.
    """
    try:
        with warnings.catch_warnings(), Image.open(path, formats=_FORMATS) as opened:
            warnings.simplefilter("ignore")
            _check(path, opened)
            picture = _eight_bit(ImageOps.exif_transpose(opened))
            picture = picture.convert("RGBA") if channels == 4 else _flatten(picture, background)
            picture = picture.convert(_MODES[channels])
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise BadInputError(f"{path}: cannot be read as a picture: {error}; remove it or convert it") from error
    if picture.size != (size, size):
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(picture, np.float32).reshape(size, size, channels)
    return np.ascontiguousarray((pixels / np.float32(127.5) - np.float32(1.0)).transpose(2, 0, 1))


def _check(path: Path, opened: Image.Image) -> None:
    width, height = opened.size
    if width * height > _MOST_PIXELS:
        raise BadInputError(f"{path}: {width} x {height} px; at most {_MOST_PIXELS} pixels are read; scale it down")
    if getattr(opened, "n_frames", 1) > 1:
        raise BadInputError(f"{path}: has {opened.n_frames} frames; one picture is expected; take a frame out")  # type: ignore[attr-defined]
