"""Colours, bit depths and transparency are read as the file declares them."""

import io
import struct
import zlib

import numpy as np
import pytest
from icc import ADOBE_RGB, LINEAR_GREY, SWAPPED
from PIL import ExifTags, Image, ImageCms
from tiffs import BITS, EXTRA_SAMPLES, FILL_ORDER, PHOTOMETRIC, SAMPLE_FORMAT, Tags, tiff

from ul_runtime.images.convert import Conversion, convert
from ul_runtime.images.decode import ImageRejectedError
from ul_runtime.images.pixels import NEARLY_BLACK

RGB_8, GREY_8 = Conversion(8, 3), Conversion(8, 1)
QUADRANTS = ((200, 40, 40), (40, 200, 40), (40, 40, 200), (128, 128, 128))
IGNORED = "colour profile ignored (damaged or for other colours)"


def quadrants(size: int = 8) -> np.ndarray:
    pixels = np.zeros((size, size, 3), np.uint8)
    half = size // 2
    for colour, (y, x) in zip(QUADRANTS, ((0, 0), (0, half), (half, 0), (half, half)), strict=True):
        pixels[y : y + half, x : x + half] = colour
    return pixels


def colours(out: np.ndarray) -> list[list[int]]:
    return [out[:, y, x].tolist() for y, x in ((1, 1), (1, 6), (6, 1), (6, 6))]


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, colour_type: int, rows: bytes, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + data


def with_chunks(image: bytes, *chunks: bytes, at_end: bool = False) -> bytes:
    """A PNG with these chunks behind its header, or before its end."""
    at = len(image) - 12 if at_end else 33
    return image[:at] + b"".join(chunks) + image[at:]


def refusal(source: bytes, to: Conversion = RGB_8) -> ImageRejectedError:
    with pytest.raises(ImageRejectedError) as error:
        convert(source, to)
    return error.value


# Colour profiles


@pytest.mark.case(
    "F7",
    "pictures with a colour profile other than sRGB, as JPEG, PNG, TIFF and WebP",
    "converted to sRGB and counted as colour profile",
)
@pytest.mark.parametrize(("format", "tolerance"), [("PNG", 1), ("TIFF", 1), ("JPEG", 3), ("WEBP", 1)])
def test_colours_are_converted_from_their_profile_to_srgb(format: str, tolerance: int) -> None:
    options = {"quality": 100} if format == "JPEG" else {"lossless": True} if format == "WEBP" else {}
    image = Image.fromarray(quadrants())
    swapped, changes = convert(encoded(image, format, icc_profile=SWAPPED, **options), RGB_8)
    assert changes == ("colour profile",)
    found = np.array(colours(swapped))
    assert np.abs(found - np.array(QUADRANTS)[:, [1, 0, 2]]).max() <= tolerance + 4  # gamma 2.2 is near sRGB's curve
    plain, changes = convert(encoded(image, format, **options), RGB_8)
    assert np.abs(np.array(colours(plain)) - QUADRANTS).max() <= tolerance
    assert changes == ()


@pytest.mark.case("F7")
def test_colours_in_adobe_rgb_come_back_as_they_were_in_srgb() -> None:
    srgb = ImageCms.createProfile("sRGB")
    adobe = ImageCms.ImageCmsProfile(io.BytesIO(ADOBE_RGB))
    wide = ImageCms.profileToProfile(Image.fromarray(quadrants()), srgb, adobe)
    assert np.asarray(wide)[1, 1].tolist() == pytest.approx([172, 44, 43], abs=2)
    out, _ = convert(encoded(wide, icc_profile=ADOBE_RGB), RGB_8)
    assert np.abs(np.array(colours(out)) - QUADRANTS).max() <= 2


@pytest.mark.case("F7")
def test_an_srgb_profile_changes_no_byte_and_is_not_counted() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    out, changes = convert(encoded(Image.fromarray(pixels), icc_profile=profile), RGB_8)
    assert np.array_equal(out, pixels.transpose(2, 0, 1))
    assert changes == ()


@pytest.mark.case("F7")
@pytest.mark.parametrize("profile", [b"no profile", ADOBE_RGB[:200], LINEAR_GREY])
def test_a_damaged_profile_or_one_for_grey_is_ignored_and_counted(profile: bytes) -> None:
    out, changes = convert(encoded(Image.fromarray(quadrants()), icc_profile=profile), RGB_8)
    assert colours(out) == [list(colour) for colour in QUADRANTS]
    assert changes == (IGNORED,)


@pytest.mark.case("F7")
@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_profiles_are_converted_too(mode: str) -> None:
    image = Image.new("L", (8, 8), 64)
    if mode == "LA":
        image.putalpha(255)
    if mode == "I;16":
        image = Image.fromarray(np.full((8, 8), 64 * 257, np.uint16))
    out, changes = convert(encoded(image, icc_profile=LINEAR_GREY), GREY_8)
    assert np.abs(out.astype(int) - 137).max() <= 1  # sRGB's code of the linear value 64/255
    assert changes[-1] == "colour profile"


@pytest.mark.case("F7")
def test_transparency_survives_a_profile() -> None:
    image = Image.fromarray(quadrants())
    image.putalpha(Image.fromarray(np.repeat(np.uint8([[255] * 4 + [0] * 4]), 8, 0)))
    out, changes = convert(encoded(image, icc_profile=SWAPPED), Conversion(8, 3, "#0a0b0c"))
    assert out[:, 1, 6].tolist() == [10, 11, 12]
    assert out[1, 1, 1] > 190
    assert changes == ("colour profile", "transparency")


@pytest.mark.case("F7")
@pytest.mark.parametrize(
    ("kind", "data", "expected"),
    [
        (b"gAMA", struct.pack(">I", 45455), ()),
        (b"gAMA", struct.pack(">I", 100000), ("gAMA ignored",)),
        (b"cICP", bytes([1, 13, 0, 1]), ()),
        (b"cICP", bytes([9, 16, 0, 1]), ("cICP ignored",)),  # BT.2020, PQ
    ],
)
def test_a_png_of_another_colour_space_without_a_profile_is_counted(
    kind: bytes, data: bytes, expected: tuple[str, ...]
) -> None:
    source = with_chunks(encoded(Image.fromarray(quadrants())), chunk(kind, data))
    assert convert(source, RGB_8)[1] == expected


@pytest.mark.case("F7")
@pytest.mark.parametrize(("index", "expected"), [("R98", ()), ("R03", ("Adobe RGB of EXIF ignored",))])
def test_a_photograph_in_adobe_rgb_by_its_exif_alone_is_counted(index: str, expected: tuple[str, ...]) -> None:
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ColorSpace] = 65535
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.IFD.Interop] = {1: index}
    assert convert(encoded(Image.fromarray(quadrants()), "JPEG", exif=exif), RGB_8)[1] == expected


# Depth and type of numbers


def packed(values: np.ndarray, bits: int) -> bytes:
    """Big-endian rows of numbers of `bits` bits."""
    shifts = np.arange(bits - 1, -1, -1)
    return b"".join(np.packbits((row[:, None] >> shifts & 1).astype(np.uint8).ravel()).tobytes() for row in values)


RAMP = np.arange(64).reshape(8, 8)


@pytest.mark.case("F8", "a TIFF of 12 bits a sample", "0 to 4095 are black to white; counted as 12-bit")
def test_the_declared_depth_decides_what_is_white() -> None:
    values = np.rint(RAMP * (4095 / 63)).astype(int)
    out, changes = convert(tiff(values.astype("<u2"), {BITS: (12,)}, strip=packed(values, 12)), GREY_8)
    assert np.abs(out[0] - RAMP * (255 / 63)).max() <= 1
    assert changes == ("12-bit",)


NUMBERS: dict[str, tuple[np.ndarray, Tags, str]] = {
    "uint16": (np.rint(RAMP * (65535 / 63)).astype("<u2"), {}, "16-bit"),
    "uint16, big-endian": (np.rint(RAMP * (65535 / 63)).astype(">u2"), {}, "16-bit"),
    "int16": (np.rint(RAMP * (32767 / 63)).astype("<i2"), {SAMPLE_FORMAT: (2,)}, "signed 16-bit"),
    "int16, big-endian": (np.rint(RAMP * (32767 / 63)).astype(">i2"), {SAMPLE_FORMAT: (2,)}, "signed 16-bit"),
    "uint32": (np.rint(RAMP * (4294967295 / 63)).astype("<u4"), {}, "32-bit"),
    "int32": (np.rint(RAMP * (2147483647 / 63)).astype("<i4"), {SAMPLE_FORMAT: (2,)}, "signed 32-bit"),
    "int8": (np.rint(RAMP * (127 / 63)).astype("i1"), {SAMPLE_FORMAT: (2,)}, "signed 8-bit"),
    "float32": ((RAMP / 63).astype("<f4"), {SAMPLE_FORMAT: (3,)}, "float (0 to 1)"),
    "float32, big-endian": ((RAMP / 63).astype(">f4"), {SAMPLE_FORMAT: (3,)}, "float (0 to 1)"),
}


@pytest.mark.case(
    "R4", "TIFF of uint32, int16, int32, int8", "each is read as its type; 0 to its largest value are black to white"
)
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_read_as_their_type(name: str) -> None:
    values, tags, change = NUMBERS[name]
    out, changes = convert(tiff(values, tags), GREY_8)
    assert np.abs(out[0] - RAMP * (255 / 63)).max() <= 1.5
    assert changes == (change,)


@pytest.mark.case("R4")
@pytest.mark.parametrize("type", ["<i1", "<i2", "<i4"])
def test_negative_numbers_are_refused_with_what_to_do(type: str) -> None:
    error = refusal(tiff((RAMP - 5).astype(type), {SAMPLE_FORMAT: (2,)}), GREY_8)
    assert error.reason == "pixel values out of range"
    assert error.detail.startswith("-5 to 58, expected 0 to ")
    assert error.detail.endswith("; scale them, or save 8- or 16-bit")


@pytest.mark.case(
    "F4",
    "float pictures, some with values up to 1, some up to 255",
    "0 to 1 are black to white in every picture; others are set aside with what to do",
)
def test_the_range_of_floats_is_the_same_for_every_picture() -> None:
    floats = {SAMPLE_FORMAT: (3,)}
    dark, _ = convert(tiff((RAMP / 630).astype("<f4"), floats), GREY_8)
    assert dark.max() == 26
    error = refusal(tiff((RAMP * 4).astype("<f4"), floats), GREY_8)
    assert error.reason == "pixel values out of range"
    assert error.detail == "0 to 252, expected 0 to 1 (float); scale them, or save 8- or 16-bit"


@pytest.mark.case(
    "F9", "grey TIFF that stores white as 0, and bits in reverse order", "read rightly at every depth, 8 bits to float"
)
@pytest.mark.parametrize("name", ["uint16", "float32", "float32, big-endian"])
def test_white_is_zero_at_every_depth(name: str) -> None:
    values, tags, _ = NUMBERS[name]
    out, _ = convert(tiff(values, tags | {PHOTOMETRIC: (0,)}), GREY_8)
    assert np.abs(out[0] - (255 - RAMP * (255 / 63))).max() <= 1.01


@pytest.mark.case("F9")
def test_white_is_zero_of_8_bits() -> None:
    out, changes = convert(tiff(RAMP.astype(np.uint8), {PHOTOMETRIC: (0,)}), GREY_8)
    assert np.array_equal(out[0], 255 - RAMP)
    assert changes == ()


@pytest.mark.case("F9")
@pytest.mark.parametrize("type", [np.uint8, np.dtype("<u2")])
def test_reversed_bits_of_any_depth(type: np.dtype) -> None:
    values = np.rint(RAMP * (np.iinfo(type).max / 63)).astype(type)
    bits = np.unpackbits(np.frombuffer(values.tobytes(), np.uint8)).reshape(-1, 8)
    source = tiff(values, {FILL_ORDER: (2,)}, strip=np.packbits(bits[:, ::-1]).tobytes())
    assert np.array_equal(convert(source, GREY_8)[0], convert(tiff(values), GREY_8)[0])


@pytest.mark.case("F10", "an uncompressed RGB TIFF of 16 bits in planes", "read rightly and counted as 16-bit")
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("planar", [True, False])
def test_planes_of_16_bits(order: str, planar: bool) -> None:
    values = (quadrants().astype(np.uint32) * 257).astype(f"{order}u2")
    out, changes = convert(tiff(values, planar=planar), RGB_8)
    assert colours(out) == [list(colour) for colour in QUADRANTS]
    assert changes == ("16-bit",)


@pytest.mark.case("F10")
def test_planes_of_16_bits_with_alpha() -> None:
    values = np.concatenate([quadrants().astype(np.uint16) * 257, np.full((8, 8, 1), 65535, np.uint16)], 2)
    out, _ = convert(tiff(values, {EXTRA_SAMPLES: (2,)}, planar=True), RGB_8)
    assert colours(out) == [list(colour) for colour in QUADRANTS]


@pytest.mark.case("F10")
def test_planes_of_8_bits() -> None:
    out, changes = convert(tiff(quadrants(), planar=True), RGB_8)
    assert colours(out) == [list(colour) for colour in QUADRANTS]
    assert changes == ()


# Transparency


@pytest.mark.case(
    "F20", "PNG of 16-bit grey with one transparent value; also 2 and 4 bits", "transparency is honoured at every depth"
)
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_one_transparent_grey_at_every_depth(bits: int) -> None:
    top = 2**bits - 1
    values = np.tile([0, top], (8, 4))
    rows = b"".join(b"\0" + packed(row[None], bits) for row in values)
    out, changes = convert(png(8, 8, bits, 0, rows, chunk(b"tRNS", struct.pack(">H", 0))), Conversion(8, 3, "#204060"))
    assert out[:, 3, 0].tolist() == [32, 64, 96]
    assert out[:, 3, 1].tolist() == [255, 255, 255]
    assert "transparency" in changes


@pytest.mark.case("F20")
@pytest.mark.parametrize("bits", [2, 4])
def test_a_transparent_grey_that_is_not_black_at_few_bits(bits: int) -> None:
    rows = b"".join(b"\0" + packed(row[None], bits) for row in np.tile([2, 3], (8, 4)))
    source = png(8, 8, bits, 0, rows, chunk(b"tRNS", struct.pack(">H", 2)))
    assert convert(source, Conversion(8, 3, "#204060"))[0][:, 3, 0].tolist() == [32, 64, 96]


def bmp_with_alpha(alpha: np.ndarray) -> bytes:
    """A 32-bit BMP with a V4 header, which declares an alpha channel."""
    pixels = np.dstack([quadrants()[..., ::-1], alpha])[::-1]
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 108, 8, 8, 1, 32, 3, 256, 2835, 2835, 0, 0) + masks + b"BGRs" + bytes(48)
    return b"BM" + struct.pack("<IHHI", 14 + 108 + 256, 0, 0, 14 + 108) + header + pixels.astype(np.uint8).tobytes()


@pytest.mark.case(
    "F19", "a 32-bit BMP whose alpha is 0 everywhere", "its colours are read, as by other viewers; counted"
)
def test_alpha_of_zeros_in_a_bmp_is_none() -> None:
    out, changes = convert(bmp_with_alpha(np.zeros((8, 8))), RGB_8)
    assert colours(out) == [list(colour) for colour in QUADRANTS]
    assert changes == ("alpha of zeros ignored",)
    half = np.repeat([[255] * 4 + [0] * 4], 8, 0)
    out, changes = convert(bmp_with_alpha(half), RGB_8)
    assert colours(out) == [[200, 40, 40], [255] * 3, [40, 40, 200], [255] * 3]
    assert changes == ("transparency",)


@pytest.mark.case("F19")
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "GIF"])
def test_a_wholly_transparent_picture_is_refused(format: str) -> None:
    image = Image.new("RGBA", (8, 8), (9, 9, 9, 0))
    assert refusal(encoded(image, format)).reason == "wholly transparent"


# Beside the pixels


def text(kind: bytes, size: int) -> bytes:
    data = zlib.compress(b"x" * size)
    return chunk(kind, b"key\0\0" + data if kind == b"zTXt" else b"key\0\1\0\0\0" + data)


LONG = {
    "3 MB zTXt": [text(b"zTXt", 3 << 20)],
    "3 MB iTXt": [text(b"iTXt", 3 << 20)],
    "80 times 0.9 MB": [text(b"zTXt", 900_000)] * 80,
    "unknown compression": [chunk(b"zTXt", b"key\0\7abc")],
}


@pytest.mark.case(
    "F18", "PNG with megabytes of compressed text, or a large colour profile", "the picture is read; text is not needed"
)
@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("name", LONG)
def test_text_does_not_cost_the_picture(name: str, at_end: bool) -> None:
    source = with_chunks(encoded(Image.fromarray(quadrants())), *LONG[name], at_end=at_end)
    out, changes = convert(source, RGB_8)
    assert colours(out) == [list(colour) for colour in QUADRANTS]
    assert changes == ()


@pytest.mark.case("F18")
def test_a_large_profile_is_still_applied() -> None:
    profile = zlib.compress(SWAPPED + bytes(2 << 20))
    source = with_chunks(encoded(Image.fromarray(quadrants())), chunk(b"iCCP", b"name\0\0" + profile))
    out, changes = convert(source, RGB_8)
    assert out[1, 1, 1] > 190
    assert changes == ("colour profile",)


@pytest.mark.case("F18")
def test_negative_control_damaged_pixels_stay_damaged_beside_long_text() -> None:
    source = bytearray(with_chunks(encoded(Image.fromarray(quadrants())), *LONG["3 MB zTXt"]))
    source[-30] ^= 1
    assert refusal(bytes(source)).reason == "corrupt or truncated"


# The range that is used


@pytest.mark.case(
    "R22", "12-bit values in a 16-bit PNG or TIFF", "a note says that all images stay under 1/8 of their range"
)
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_a_picture_that_uses_little_of_its_range_is_marked(format: str) -> None:
    grey = np.rint(RAMP * (4095 / 63)).astype(np.uint16)
    assert NEARLY_BLACK in convert(encoded(Image.fromarray(grey), format), GREY_8)[1]
    assert NEARLY_BLACK in convert(encoded(Image.fromarray(grey), format), Conversion(16, 3, "white", "pad"))[1]
    assert NEARLY_BLACK not in convert(encoded(Image.fromarray(grey * 4), format), GREY_8)[1]
