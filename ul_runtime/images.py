"""Images as training and ul-encode see them: read from any file, converted to one size and mode."""

import io
import os
import stat
import struct
import threading
import zlib
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from PIL import ExifTags, Image, ImageColor, ImageOps

from ul_runtime.errors import UsageError
from ul_runtime.manifest import ImageFormat

SUFFIXES = frozenset({".png", ".apng", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 178_956_970  # twice Pillow's warning level, its own "decompression bomb" bound
SMALLER = "smaller than the model"
_LARGE_PIXELS = 16_000_000
_one_large_image = threading.Lock()  # of the images that take 100 MB and more to decode, one at a time
# All that Pillow's decoders raise on damaged files; there is no common base class below Exception.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    EOFError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
)
_GREY_MODES = {"1", "L", "LA", "La", "F", "I", "I;16", "I;16B", "I;16L", "I;16N"}
_ALPHA_MODES = {"RGBA", "LA", "PA", "La", "RGBa"}
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclass(frozen=True)
class Rejected:
    """An image (or a file that should hold some) that cannot be used: where, why, and what was seen."""

    path: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


class ImageRejectedError(Exception):
    """Says why one image cannot be used; caught where images are counted, it never ends a run."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def at(self, path: str) -> Rejected:
        """This refusal as an entry of the list of rejected images."""
        return Rejected(path, self.reason, self.detail)


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


def check_regular(mode: int) -> None:
    """ImageRejectedError unless the st_mode is that of a regular file."""
    if not stat.S_ISREG(mode):
        raise ImageRejectedError("not a regular file", _KINDS.get(stat.S_IFMT(mode), "of unknown kind"))


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file, never waiting for a pipe or touching a device. OSError, ImageRejectedError."""
    check_regular(os.stat(path).st_mode)
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        check_regular(os.fstat(fd).st_mode)
        return os.fdopen(fd, "rb")
    except ImageRejectedError:
        os.close(fd)
        raise


def rgb(background: str) -> tuple[int, int, int]:
    """The colour of "white", "black", "#rrggbb" or another CSS name. UsageError."""
    try:
        red, green, blue = ImageColor.getrgb(background)[:3]
    except ValueError as error:
        message = f"image.background={background!r}: a colour is expected, such as 'white', 'black', '#20c0ff'"
        raise UsageError(message) from error
    return red, green, blue


def convert(source: Path | bytes | np.ndarray, to: Conversion) -> tuple[np.ndarray, tuple[str, ...]]:
    """An image file, its bytes, or uint8 pixels h w [c] -> uint8 c h w and what had to be changed.

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
    try:
        with file:
            return _decode(file, to, changes), tuple(changes)
    except Image.UnidentifiedImageError:
        raise ImageRejectedError("not an image of a known format", ", ".join(FORMATS)) from None
    except Image.DecompressionBombError:
        raise ImageRejectedError("too many pixels", f"at most {MAX_PIXELS:,}") from None
    except _DAMAGED as error:
        text = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
        raise ImageRejectedError("corrupt or truncated", text) from error


def _decode(file: BinaryIO, to: Conversion, changes: list[str]) -> np.ndarray:
    if not file.read(1):
        raise ImageRejectedError("zero bytes")
    file.seek(0)
    with Image.open(file, formats=FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ImageRejectedError("too many pixels", f"{width}x{height}, at most {MAX_PIXELS:,}")
        _check_size(width, height, to)
        if to.fit == "crop" or max(width, height) > to.size:
            # JPEG only: decode at 1/2, 1/4 or 1/8 while twice the model's resolution remains
            scale = 2 * to.size / (min(width, height) if to.fit == "crop" else max(width, height))
            if scale < 1:
                image.draft(None, (int(width * scale) + 1, int(height * scale) + 1))
        with _one_large_image if width * height > _LARGE_PIXELS else nullcontext():
            if image.mode in ("RGB", "RGBA") and any(";16" in str(tile) for tile in image.tile):
                changes.append("16-bit")
            image.load()
            if _is_turned(image):
                with suppress(*_DAMAGED):  # the pixels are turned before the metadata is written again
                    ImageOps.exif_transpose(image, in_place=True)
                changes.append("exif orientation")
            pixels = _finish(image, to, changes)
        if _is_animated(image):
            changes.append("animated (first frame)")
    return pixels


def _check_size(width: int, height: int, to: Conversion) -> None:
    if to.fit == "crop" and min(width, height) < to.size and not to.enlarge:
        raise ImageRejectedError(SMALLER, f"{width}x{height}, model {to.size}x{to.size}")


def _is_turned(image: Image.Image) -> bool:
    with suppress(*_DAMAGED):
        return image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
    return False  # damaged metadata do not cost the image


def _is_animated(image: Image.Image) -> bool:
    if image.format == "MPO":  # a photograph with a preview or depth image behind it
        return False
    with suppress(*_DAMAGED):
        return bool(getattr(image, "is_animated", False))
    return True  # a second frame begins and is damaged


def _finish(image: Image.Image, to: Conversion, changes: list[str]) -> np.ndarray:
    """A decoded image of any mode -> uint8 c h w; appends to `changes`."""
    grey = image.mode in _GREY_MODES
    image = _to_8_bit(image, rgb(to.background), changes)
    mode = "L" if to.channels == 1 else "RGB"
    if grey != (mode == "L"):
        changes.append("grey to colour" if grey else "colour to grey")
    image = _fit(image if image.mode == mode else image.convert(mode), to)
    pixels = np.asarray(image).reshape(to.size, to.size, to.channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _to_8_bit(image: Image.Image, background: tuple[int, int, int], changes: list[str]) -> Image.Image:
    """Opaque L or RGB with 8 bits a channel."""
    if image.mode in ("P", "PA"):
        changes.append("palette")
    if image.mode.startswith(("I", "F")):
        return _from_wide_grey(image, changes)
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() == (255, 255):
            return image.convert("RGB")
        changes.append("transparency")
        canvas = Image.new("RGBA", image.size, (*background, 255))
        canvas.alpha_composite(image)
        return canvas.convert("RGB")
    if image.mode == "1":
        changes.append("1-bit")
        return image.convert("L")
    if image.mode in ("L", "RGB"):
        return image
    if image.mode not in ("P", "RGBX"):
        changes.append(image.mode.lower())
    return image.convert("RGB")


def _from_wide_grey(image: Image.Image, changes: list[str]) -> Image.Image:
    """16-bit, 32-bit and float grey to L: full range by the type, for floats by their largest value."""
    values = np.asarray(image).astype(np.float64)
    is_float = image.mode == "F"
    changes.append("float" if is_float else "16-bit")
    least, largest = float(values.min()), float(values.max())
    if not (least >= 0 and largest <= 65535):  # false for NaN too
        raise ImageRejectedError("pixel values out of range", f"{least:g} to {largest:g}, expected 0 to 65535")
    full = next(top for top in (1, 255, 65535) if largest <= top) if is_float else 65535
    return Image.fromarray(np.rint(values * (255 / full)).astype(np.uint8))


def _fit(image: Image.Image, to: Conversion) -> Image.Image:
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
    if (width, height) != image.size:
        image = image.resize((width, height), kernel, reducing_gap=3.0)
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
