"""Images as training and ul-encode see them: read from any file, converted to one size and mode."""

import io
import threading
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image, ImageColor

from ul_runtime.errors import UsageError
from ul_runtime.images.decode import (
    DAMAGED,
    ImageRejectedError,
    check_pixels,
    decode,
    is_animated,
    open_image,
    open_regular,
    why_not,
    without_extras,
)
from ul_runtime.images.pixels import NEARLY_BLACK, is_grey, to_opaque_8_bit
from ul_runtime.manifest import ImageFormat

SMALLER = "smaller than the model"
_LARGE_PIXELS = 16_000_000
_one_large_image = threading.Lock()  # of the images that take 100 MB and more to decode, one at a time


@dataclass(frozen=True)
class Conversion:
    """Target of every image. crop: shorter side to `size` px, centre square. pad: whole image, centred on
    `background`, shrunk if larger, and enlarged only with `enlarge` (which also lets crop enlarge)."""

    size: int
    channels: int
    background: str = "white"
    fit: Literal["crop", "pad"] = "crop"
    enlarge: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"image.size={self.size}: a positive number of px is expected")
        if self.channels not in (1, 3):
            raise UsageError(f"image.channels={self.channels}: 1 (grey) or 3 (RGB) is expected")
        if self.fit not in ("crop", "pad"):
            raise UsageError(f"image.fit={self.fit!r}: 'crop' or 'pad' is expected")
        rgb(self.background)


def rgb(background: str) -> tuple[int, int, int]:
    """The colour of "white", "black", "#rrggbb" or another CSS name. UsageError."""
    try:
        red, green, blue = ImageColor.getrgb(background)[:3]
    except ValueError as error:
        message = f"image.background={background!r}: a colour is expected, such as 'white', 'black', '#20c0ff'"
        raise UsageError(message) from error
    return red, green, blue


def convert(source: Path | bytes | np.ndarray, to: Conversion) -> tuple[np.ndarray, tuple[str, ...]]:
    """An image file, its bytes, or uint8 pixels h w [c] -> uint8 c h w and what had to be changed (and `NEARLY_BLACK`).

    ImageRejectedError says why an image cannot be used; nothing else is raised for bad content.
    """
    changes: list[str] = []
    if isinstance(source, np.ndarray):
        _check_size(source.shape[1], source.shape[0], to)
        return _finish(Image.fromarray(source), to, changes), tuple(changes)
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else open_regular(source)
    except OSError as error:
        raise ImageRejectedError("not readable", error.strerror or str(error)) from error
    with file:
        try:
            return _from_file(file, to)
        except DAMAGED as error:
            slim = None if isinstance(error, Image.DecompressionBombError) else without_extras(file)
            if slim is None:
                raise why_not(file, error) from error
        try:
            return _from_file(slim[0], to, slim[1])
        except DAMAGED as error:
            raise why_not(file, error) from error


def _from_file(file: BinaryIO, to: Conversion, profile: bytes | None = None) -> tuple[np.ndarray, tuple[str, ...]]:
    """`profile`: the colour profile, if it is not in the file. ImageRejectedError, DAMAGED."""
    changes: list[str] = []
    with open_image(file) as image:
        width, height = image.size
        _check_size(width, height, to)
        if to.fit == "crop" or max(width, height) > to.size:
            # JPEG only: decode at 1/2, 1/4 or 1/8 while twice the model's resolution remains
            scale = 2 * to.size / (min(width, height) if to.fit == "crop" else max(width, height))
            if scale < 1:
                image.draft(None, (int(width * scale) + 1, int(height * scale) + 1))
        check_pixels(image, width, height)
        if profile is not None:
            image.info["icc_profile"] = profile
        with _one_large_image if image.width * image.height > _LARGE_PIXELS else nullcontext():
            decode(image, changes)
            pixels = _finish(image, to, changes)
        if is_animated(image):
            changes.append("animated (first frame)")
    return pixels, tuple(changes)


def _check_size(width: int, height: int, to: Conversion) -> None:
    if to.fit == "crop" and min(width, height) < to.size and not to.enlarge:
        raise ImageRejectedError(SMALLER, f"{width}x{height}, model {to.size}x{to.size}")


def _finish(image: Image.Image, to: Conversion, changes: list[str]) -> np.ndarray:
    """A decoded image of any mode -> uint8 c h w; appends to `changes`."""
    grey = is_grey(image)
    image = to_opaque_8_bit(image, rgb(to.background), changes)
    mode = "L" if to.channels == 1 else "RGB"
    if grey != (mode == "L"):
        changes.append("grey to colour" if grey else "colour to grey")
    if (min if to.fit == "crop" else max)(image.size) < to.size:
        changes.append("enlarged" if to.enlarge else "smaller than the model (padded)")
    image = _resize(image if image.mode == mode else image.convert(mode), to)
    if np.asarray(image).max() < 256 / 8:
        changes.append(NEARLY_BLACK)
    image = _pad(image, to)
    pixels = np.asarray(image).reshape(to.size, to.size, to.channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _resize(image: Image.Image, to: Conversion) -> Image.Image:
    width, height = image.size
    enlarges = (min if to.fit == "crop" else max)(width, height) < to.size
    kernel = Image.Resampling.BICUBIC if enlarges else Image.Resampling.LANCZOS  # bicubic rings less
    if to.fit == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        box = (left, top, left + side, top + side)
        if side == to.size:
            return image.crop(box)
        return image.resize((to.size, to.size), kernel, box=box, reducing_gap=3.0)
    longest = max(width, height)
    if longest > to.size or to.enlarge:
        width, height = (max(1, round(side * to.size / longest)) for side in (width, height))
    if (width, height) == image.size:
        return image
    return image.resize((width, height), kernel, reducing_gap=3.0)


def _pad(image: Image.Image, to: Conversion) -> Image.Image:
    width, height = image.size
    if (width, height) == (to.size, to.size):
        return image
    canvas = Image.new("RGB", (to.size, to.size), rgb(to.background)).convert(image.mode)
    canvas.paste(image, ((to.size - width) // 2, (to.size - height) // 2))
    return canvas


def load_image(path: Path, image: ImageFormat) -> tuple[np.ndarray, tuple[str, ...]]:
    """(x float32 `c h w` in [-1, 1], what had to be converted); ImageRejectedError says why a file cannot be used."""
    to = Conversion(image.size, image.channels, image.background, image.fit)
    pixels, changes = convert(path, to)
    return from_uint8(pixels), changes


def to_uint8(x: np.ndarray) -> np.ndarray:
    """x `b c h w`, finite, clipped to [-1, 1] -> uint8 `b h w c`: round((x + 1) * 127.5)."""
    return np.rint((np.clip(x, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)


def from_uint8(images: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [-1, 1], any shape."""
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1.0)
