"""Image files, opened and decoded by Pillow; a file that cannot be read is refused with what it is."""

import ctypes
import io
import logging
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import COMPRESSION_INFO, ImageFileDirectory_v2, TiffImageFile

from ul_runtime.images.kinds import HEAD_BYTES, is_image_kind, kind_of
from ul_runtime.install import install

SUFFIXES = frozenset(
    {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
    | {".avif", ".heic", ".heif", ".hif", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm"}
)
FORMATS = ("PNG", "JPEG", "WebP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM")  # no other decoder is ever tried
MAX_PIXELS = 178_956_970  # that are decoded; twice Pillow's warning level, its own "decompression bomb" bound
MAX_JPEG_PIXELS = 8 * MAX_PIXELS  # of a file that is decoded at 1/2, 1/4 or 1/8
# All that Pillow's decoders raise on damaged files; there is no common base class below Exception.
DAMAGED = (
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
    Image.DecompressionBombError,
)
_UNSUPPORTED = (  # how Pillow begins its errors about sound files
    "Unsupported BMP",
    "cannot handle",
    "unsupported picture format",
    "unknown pixel mode",
    "unknown data organization",
    "unknown raw mode",
    "Invalid value for samples per pixel",
    "unable to determine J2K image mode",
    "Windows Media Photo",
)
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_TURNED = range(2, 9)  # EXIF orientations; 1 is upright
_DNG_VERSION = 50706
_NUMBERS = {1: "unsigned", 2: "signed", 3: "float"}  # TIFF's SampleFormat
_PNG_NEEDED = (b"IHDR", b"PLTE", b"tRNS", b"gAMA", b"sRGB", b"iCCP", b"eXIf", b"IDAT", b"IEND")
_MAX_PROFILE_BYTES = 64 << 20
_MAX_PNG_BYTES = 1 << 30


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


@contextmanager
def quiet_decoders() -> Iterator[None]:
    """Inside, decoders do not write to stderr what they dislike about a file; what matters of it is counted."""
    library = ctypes.CDLL(Image.core.__file__)  # libtiff is found behind it
    for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        with suppress(AttributeError):  # a Pillow without libtiff, or with its names hidden
            getattr(library, name)(None)
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """`FORMATS`, and HEIF where pillow-heif is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return FORMATS
    register_heif_opener()
    return (*FORMATS, "HEIF")


def open_image(file: BinaryIO) -> ImageFile:
    """The picture in a file, its pixels not yet decoded. ImageRejectedError, `DAMAGED`."""
    head = file.read(HEAD_BYTES)
    if not head:
        raise ImageRejectedError("zero bytes")
    file.seek(0)
    try:
        image: ImageFile = Image.open(file, formats=_formats())
    except Image.DecompressionBombError:
        if kind_of(head) != "JPEG":
            raise
        file.seek(0)
        image = JpegImageFile(file)  # may be decoded at a smaller scale
    if isinstance(image, TiffImageFile):
        if _DNG_VERSION in image.tag_v2 or image.tag_v2.get(ExifTags.Base.NewSubfileType, 0) & 1:
            raise ImageRejectedError("unsupported", "raw photograph (DNG or another): its first picture is a preview")
        _check_covered(image)
        _read_planes_of_16_bits(image)
    elif image.format == "PNG":
        _scale_transparent_grey(image)
        if (at := head.find(b"cICP")) > 0:  # which Pillow passes over
            image.info["cICP"] = head[at + 4 : at + 8]
    return image


def check_pixels(image: Image.Image, width: int, height: int) -> None:
    """ImageRejectedError if decoding takes too much memory. `width`, `height`: in the file, before `draft`."""
    allowed = MAX_PIXELS
    if image.format == "JPEG" and not image.info.get("progressive"):  # which libjpeg decodes whole
        allowed = MAX_JPEG_PIXELS
    if image.width * image.height > MAX_PIXELS or width * height > allowed:
        raise ImageRejectedError("too many pixels", f"{width}x{height}, at most {MAX_PIXELS:,}")


def decode(image: ImageFile, changes: list[str]) -> None:
    """Decode the pixels and turn them as the file says; appends to `changes`. `DAMAGED`."""
    if not image.mode.startswith("I") and any(";16" in str(tile) for tile in image.tile):
        changes.append("16-bit")
    turned = isinstance(image, TiffImageFile) and image.tag_v2.get(ExifTags.Base.Orientation) in _TURNED
    image.load()  # which turns a TIFF
    if _is_turned(image):
        with suppress(*DAMAGED):  # the pixels are turned before the metadata is written again
            ImageOps.exif_transpose(image, in_place=True)
        turned = True
    if turned:
        changes.append("exif orientation")


def is_animated(image: Image.Image) -> bool:
    """Whether a decoded file has frames behind the first."""
    if image.format == "MPO":  # a photograph with a preview or depth image behind it
        return False
    with suppress(*DAMAGED):
        return bool(getattr(image, "is_animated", False))
    return True  # a second frame begins and is damaged


def _is_turned(image: Image.Image) -> bool:
    with suppress(*DAMAGED):
        return image.getexif().get(ExifTags.Base.Orientation) in _TURNED
    return False  # damaged metadata do not cost the image


def _check_covered(image: TiffImageFile) -> None:
    """OSError where rows are missing, which Pillow leaves black."""
    rows = max((tile.extents[3] for tile in image.tile if tile.extents), default=0)
    expected = image.tag_v2[ExifTags.Base.ImageLength]
    if rows < expected:
        raise OSError(f"{rows} of {expected} rows are in the file")


def _read_planes_of_16_bits(image: TiffImageFile) -> None:
    """Pillow reads uncompressed planes ("R", "G", ...) of 16 bits as if they had 8."""
    bits = image.tag_v2.get(ExifTags.Base.BitsPerSample, ())
    if image.tag_v2.get(ExifTags.Base.PlanarConfiguration) == 2 and 16 in bits:
        order = ";16B" if image.tag_v2.prefix == b"MM" else ";16L"
        for i, tile in enumerate(image.tile):
            if tile.codec_name == "raw" and isinstance(tile.args, tuple):
                image.tile[i] = tile._replace(args=(tile.args[0] + order, *tile.args[1:]))


def _scale_transparent_grey(image: ImageFile) -> None:
    """Pillow scales grey of 2 and 4 bits to 8, but not the transparent value."""
    bits = {"L;2": 2, "L;4": 4}.get(str(image.tile[0].args)) if image.tile else None
    if bits and "transparency" in image.info:
        image.info["transparency"] = image.info["transparency"] * 255 // (2**bits - 1)


def without_extras(file: BinaryIO) -> tuple[BinaryIO, bytes | None] | None:
    """A PNG with the chunks alone that its pixels need, and its colour profile; None if the file is no PNG.

    Pillow refuses a PNG for long or odd text, and for a large profile, which its pixels do not need.
    """
    file.seek(0)
    if kind_of(file.read(HEAD_BYTES)) != "PNG":
        return None
    file.seek(0)
    content, profile = file.read(_MAX_PNG_BYTES), None
    kept, at = [content[:8]], 8
    while at < len(content):
        kind = content[at + 4 : at + 8]
        end = at + 12 + int.from_bytes(content[at : at + 4])
        if kind == b"iCCP":
            profile = _inflated_profile(content[at + 8 : end - 4])
        elif kind in _PNG_NEEDED or len(kind) < 4:
            kept.append(content[at:end])
        at = end
    return io.BytesIO(b"".join(kept)), profile


def _inflated_profile(chunk: bytes) -> bytes:
    with suppress(zlib.error):
        return zlib.decompressobj().decompress(chunk.partition(b"\0")[2][1:], _MAX_PROFILE_BYTES)
    return b"damaged"


def why_not(file: BinaryIO, error: BaseException) -> ImageRejectedError:
    """Why Pillow refused this file: what it is instead, or of which type, or that it is damaged."""
    if isinstance(error, Image.DecompressionBombError):
        return ImageRejectedError("too many pixels", f"at most {MAX_PIXELS:,}")
    if isinstance(error, MemoryError):
        return ImageRejectedError("not enough memory to decode it")
    file.seek(0)
    kind = kind_of(file.read(HEAD_BYTES))
    if isinstance(error, UnidentifiedImageError):
        if not is_image_kind(kind):
            return ImageRejectedError("not an image of a known format", kind or ", ".join(FORMATS))
        cause = _cause(file)
        if cause is None:
            advice = install("heif") if kind == "HEIF" else "convert it to PNG"
            return ImageRejectedError("unsupported", f"{kind}; {advice}")
        error = cause
    text = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
    if kind == "TIFF" and (types := _tiff_type(file, text)):
        return ImageRejectedError("unsupported", types)
    if text.startswith(_UNSUPPORTED) or text.endswith("not available"):  # a decoder that Pillow was built without
        return ImageRejectedError("unsupported", f"{kind}: {text}")
    return ImageRejectedError("corrupt or truncated", text)


def _cause(file: BinaryIO) -> BaseException | None:
    """The error of the decoder that the file is for; None if there is none."""
    file.seek(0)
    head = file.read(16)
    for name in _formats():
        factory, accept = Image.OPEN[name.upper()]
        if accept is None or accept(head) is True:
            file.seek(0)
            try:
                factory(file, "")
            except DAMAGED as error:
                return error
    return None


def _tiff_type(file: BinaryIO, text: str) -> str | None:
    """The type of a TIFF that is not read; None if it should have been, or its tags cannot be read."""
    with suppress(*DAMAGED):
        file.seek(0)
        head = file.read(16)
        tags = ImageFileDirectory_v2(head if head[2] == 43 else head[:8])  # 43: BigTIFF
        file.seek(tags.next)
        tags.load(file)
        compression = tags.get(ExifTags.Base.Compression, 1)
        name = COMPRESSION_INFO.get(compression)
        if name is None or not _can_compress(name):
            return f"TIFF with compression {name or compression}"
        if text.startswith(_UNSUPPORTED):
            bits = tags.get(ExifTags.Base.BitsPerSample, (1,))
            number = _NUMBERS.get(tags.get(ExifTags.Base.SampleFormat, (1,))[0], "complex")
            samples = tags.get(ExifTags.Base.SamplesPerPixel, 1)
            photometric = tags.get(ExifTags.Base.PhotometricInterpretation)
            return f"TIFF of {samples} x {bits[0]} bits, {number}, photometric {photometric}; save it as 8- or 16-bit"
    return None


@lru_cache
def _can_compress(name: str) -> bool:
    """Whether this Pillow's libtiff was built with a compression: it is tried."""
    with suppress(*DAMAGED):
        mode = "1" if name.startswith(("group", "tiff_ccitt", "tiff_raw_16")) else "L"
        Image.new(mode, (8, 8)).save(io.BytesIO(), "TIFF", compression=name)
        return True
    return False
