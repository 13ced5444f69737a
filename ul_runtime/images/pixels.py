"""Pixels of any type to opaque sRGB of 8 bits. The type that the file declares decides, never one picture's values."""

import io
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image

from ul_runtime.images.decode import DAMAGED, ImageRejectedError

if TYPE_CHECKING:
    from PIL.ImageCms import ImageCmsTransform

NEARLY_BLACK = "nearly black"  # no value reaches 1/8 of the range
_GREY_MODES = {"1", "L", "LA", "La", "F", "I", "I;16", "I;16B", "I;16L", "I;16N"}
_ALPHA_MODES = {"RGBA", "LA", "PA", "La", "RGBa"}
_WHITE_IS_ZERO = 0  # TIFF's PhotometricInterpretation
_SIGNED = 2  # TIFF's SampleFormat
_SAME_COLOUR = 2  # of 255: sRGB profiles of different makers differ by so much
_SRGB_GAMMA = 0.45455  # of PNG's gAMA
_SRGB_CICP = b"\x01\x0d\0\x01"  # primaries, transfer, matrix, full range


def nearly_black_note(changes: dict[str, int], num_images: int) -> str | None:
    """Takes the nearly black pictures out of the counted `changes`; what to say when all pictures are."""
    if changes.pop(NEARLY_BLACK, 0) < max(1, num_images):
        return None
    return (
        f"all {num_images} images stay under 1/8 of the range that their type declares, so they are nearly black; "
        "if they hold fewer bits than their type has (as 12 in 16), scale them and save them again"
    )


def is_grey(image: Image.Image) -> bool:
    """Whether the pixels hold no colour, by their type."""
    return image.mode in _GREY_MODES


def to_opaque_8_bit(image: Image.Image, background: tuple[int, int, int], changes: list[str]) -> Image.Image:
    """A decoded picture of any mode -> L or RGB, sRGB, 8 bits a channel; appends to `changes`.

    ImageRejectedError: values outside the declared range, or nothing to be seen.
    """
    profile = image.info.get("icc_profile")
    if not profile and (unused := _unused_colour_space(image)):
        changes.append(f"{unused} ignored")
    ignores_zero_alpha = image.format == "BMP"  # often written with a fourth channel that means nothing
    grey = is_grey(image)
    image = _to_8_bit(image, changes)
    if profile:
        image = _to_srgb(image, profile, grey, changes)
    if image.mode == "CMYK":
        image = image.convert("RGB")
    if image.mode != "RGBA":
        return image
    least, largest = image.getchannel("A").getextrema()
    if least == 255:
        return image.convert("RGB")
    if largest == 0:
        if not ignores_zero_alpha:
            raise ImageRejectedError("wholly transparent", "nothing of it would be seen")
        changes.append("alpha of zeros ignored")
        return image.convert("RGB")
    changes.append("transparency")
    canvas = Image.new("RGBA", image.size, (*background, 255))
    canvas.alpha_composite(image)
    return canvas.convert("RGB")


def _unused_colour_space(image: Image.Image) -> str | None:
    """What names another colour space than sRGB in a picture without a profile."""
    info = image.info
    if info.get("cICP", _SRGB_CICP) != _SRGB_CICP:
        return "cICP"
    if image.format == "PNG" and "srgb" not in info and abs(info.get("gamma", _SRGB_GAMMA) - _SRGB_GAMMA) > 0.01:
        return "gAMA"
    if "exif" in info:
        with suppress(*DAMAGED):
            interoperability = image.getexif().get_ifd(ExifTags.IFD.Interop)
            return "Adobe RGB of EXIF" if interoperability.get(ExifTags.Interop.InteropIndex) == "R03" else None
    return None


def _to_8_bit(image: Image.Image, changes: list[str]) -> Image.Image:
    """L, RGB, RGBA or CMYK of 8 bits."""
    if image.mode in ("P", "PA"):
        changes.append("palette")
    if image.mode.startswith(("I", "F")) or _is_signed(image):
        return _from_numbers(image, changes)
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        return image.convert("RGBA")
    if image.mode == "1":
        changes.append("1-bit")
        return image.convert("L")
    if image.mode in ("L", "RGB"):
        return image
    if image.mode not in ("P", "RGBX"):
        changes.append(image.mode.lower())
    return image if image.mode == "CMYK" else image.convert("RGB")


def _tag(image: Image.Image, tag: int, otherwise: int) -> int:
    """The (first) value of a tag of a TIFF; `otherwise` for a file that does not have it."""
    value = image.tag_v2.get(tag, otherwise) if image.format == "TIFF" else otherwise  # type: ignore[attr-defined]
    return value[0] if isinstance(value, tuple) else value


def _is_signed(image: Image.Image) -> bool:
    return _tag(image, ExifTags.Base.SampleFormat, 1) == _SIGNED


def _from_numbers(image: Image.Image, changes: list[str]) -> Image.Image:
    """Grey of other numbers than uint8 -> L, or RGBA: 0 to the largest value of the declared type are black to white,
    floats 0 to 1."""
    values, full, name = _declared(image)
    changes.append(name)
    least, largest = float(values.min()), float(values.max())
    if not (least >= 0 and largest <= full):  # false for NaN too
        found = f"{least:g} to {largest:g}, expected 0 to {full:g} ({name.partition(' (')[0]})"
        raise ImageRejectedError("pixel values out of range", f"{found}; scale them, or save 8- or 16-bit")
    if full <= 65535 and image.mode != "F":
        grey = _in_8_bit(np.arange(full + 1), full)[values]
    else:
        grey = _in_8_bit(values, full)
    if _tag(image, ExifTags.Base.PhotometricInterpretation, 1) == _WHITE_IS_ZERO:
        grey = 255 - grey
    transparent = image.info.get("transparency")
    if transparent is None:
        return Image.fromarray(grey)
    alpha = Image.fromarray(np.where(values == transparent, np.uint8(0), np.uint8(255)))
    return Image.merge("LA", (Image.fromarray(grey), alpha)).convert("RGBA")


def _in_8_bit(values: np.ndarray, full: float) -> np.ndarray:
    return np.rint(values.astype(np.float64) * (255 / full)).astype(np.uint8)


def _declared(image: Image.Image) -> tuple[np.ndarray, float, str]:
    """The numbers of a grey picture as their file declares them, the largest of that type, and its name."""
    values = np.asarray(image)
    if image.mode == "F":
        return values, 1.0, "float (0 to 1)"
    bits, signed = _tag(image, ExifTags.Base.BitsPerSample, 16), _is_signed(image)
    if bits == 32 and not signed:
        values = values.view(np.uint32)  # Pillow's numbers are int32
    if bits == 8:
        values = values.view(np.int8)
    return values, 2 ** (bits - signed) - 1, f"signed {bits}-bit" if signed else f"{bits}-bit"


def _to_srgb(image: Image.Image, profile: bytes, grey: bool, changes: list[str]) -> Image.Image:
    """L, RGB, RGBA or CMYK with a colour profile -> the same mode, RGB for CMYK, in sRGB."""
    from PIL.ImageCms import PyCMSError

    try:
        space, transform = _transform(profile)
        if not {"RGB": image.mode != "CMYK", "L": grey, "CMYK": image.mode == "CMYK"}[space]:
            raise ValueError(f"a profile for {space}, the picture is {image.mode}")
        if transform is None:
            return image
        converted = transform.apply(image if image.mode == space else image.convert(space))
    except (PyCMSError, OSError, ImportError, TypeError, ValueError, LookupError):
        changes.append("colour profile ignored (damaged or for other colours)")
        return image
    changes.append("colour profile")
    if image.mode == "RGBA":
        converted.putalpha(image.getchannel("A"))
    return converted.getchannel("G") if image.mode == "L" else converted


@lru_cache(maxsize=16)
def _transform(profile: bytes) -> "tuple[str, ImageCmsTransform | None]":
    """The mode that a profile is for, and its conversion to sRGB as RGB; None if that changes no colour visibly.

    Relative colorimetric, black point compensated. PyCMSError, OSError, TypeError, LookupError.
    """
    from PIL import ImageCms

    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[source.profile.xcolor_space.strip()]
    intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", intent, flags)
    if mode == "CMYK":
        return mode, transform
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(27, 27, 3)
    probe = Image.fromarray(colours).convert(mode)
    moved = np.asarray(transform.apply(probe)).astype(int) - np.asarray(probe.convert("RGB"))
    return mode, transform if np.abs(moved).max() > _SAME_COLOUR else None
