"""Any image to uint8 c h w: what is changed is named, what is unusable is rejected."""

import io
import os
import socket
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ul_runtime.errors import UsageError
from ul_runtime.images import decode
from ul_runtime.images.convert import Conversion, convert
from ul_runtime.images.decode import ImageRejectedError, quiet_decoders

RGB_16 = Conversion(16, 3)
GREY_16 = Conversion(16, 1)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(height: int = 24, width: int = 24, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_that_declares(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def rejection(source: bytes | Path, to: Conversion = RGB_16) -> str:
    with pytest.raises(ImageRejectedError) as error:
        convert(source, to)
    return error.value.reason


def test_pixels_of_the_right_size_are_kept_bit_for_bit() -> None:
    pixels = noise(16, 16)
    for source in (pixels, encoded(Image.fromarray(pixels))):
        out, changes = convert(source, RGB_16)
        assert out.dtype == np.uint8
        assert out.shape == (3, 16, 16)
        assert out.flags.c_contiguous
        assert np.array_equal(out, pixels.transpose(2, 0, 1))
        assert changes == ()


@pytest.mark.parametrize(("background", "value"), [("white", (255, 255, 255)), ("#204060", (32, 64, 96))])
def test_transparent_pixels_show_the_background(background: str, value: tuple[int, ...]) -> None:
    image = Image.new("RGBA", (16, 16), (9, 9, 9, 0))
    image.putpixel((0, 0), (70, 80, 90, 255))
    out, changes = convert(encoded(image), Conversion(16, 3, background))
    assert out[:, 0, 0].tolist() == [70, 80, 90]
    assert np.all(out[:, 1:] == np.reshape(value, (3, 1, 1)))
    assert changes == ("transparency",)


def test_half_transparent_pixels_are_mixed_with_the_background() -> None:
    out, _ = convert(encoded(Image.new("RGBA", (16, 16), (0, 0, 0, 128))), RGB_16)
    assert abs(int(out[0, 0, 0]) - 127) <= 1


def test_an_opaque_alpha_channel_changes_nothing() -> None:
    out, changes = convert(encoded(Image.new("RGBA", (16, 16), (1, 2, 203, 255))), RGB_16)
    assert out[:, 5, 5].tolist() == [1, 2, 203]
    assert changes == ()


def palette() -> Image.Image:
    return Image.fromarray(noise()).quantize(16)


def palette_with_transparency() -> bytes:
    image = Image.new("P", (16, 16), 0)
    image.putpixel((0, 0), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    return encoded(image, transparency=0)


def sixteen_bit() -> Image.Image:
    return Image.fromarray(np.full((16, 16), 257 * 100, dtype=np.uint16))


CONVERTED = {
    "palette": (encoded(palette()), RGB_16, ("palette",)),
    "palette with transparency": (palette_with_transparency(), RGB_16, ("palette", "transparency")),
    "gif": (encoded(palette(), "GIF"), RGB_16, ("palette",)),
    "cmyk": (encoded(Image.new("CMYK", (16, 16)), "JPEG"), RGB_16, ("cmyk",)),
    "lab": (encoded(Image.new("LAB", (16, 16)), "TIFF"), RGB_16, ("lab",)),
    "one bit": (encoded(Image.new("1", (16, 16), 1)), GREY_16, ("1-bit",)),
    "16 bit": (encoded(sixteen_bit()), GREY_16, ("16-bit",)),
    "16 bit tiff": (encoded(sixteen_bit(), "TIFF"), GREY_16, ("16-bit",)),
    "float": (encoded(Image.new("F", (16, 16), 0.5), "TIFF"), GREY_16, ("float (0 to 1)",)),
    "grey and alpha": (encoded(Image.new("LA", (16, 16), (99, 9))), GREY_16, ("transparency",)),
    "grey to colour": (encoded(Image.new("L", (16, 16), 99)), RGB_16, ("grey to colour",)),
    "colour to grey": (encoded(Image.new("RGB", (16, 16), (99, 99, 99))), GREY_16, ("colour to grey",)),
    "jpeg": (encoded(Image.new("RGB", (99, 40), (99, 99, 99)), "JPEG"), RGB_16, ()),
    "webp": (encoded(Image.new("RGB", (16, 16), (99, 99, 99)), "WEBP"), RGB_16, ()),
    "bmp": (encoded(Image.new("RGB", (16, 16), (99, 99, 99)), "BMP"), RGB_16, ()),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_every_mode_becomes_8_bit_and_the_change_is_named(name: str) -> None:
    source, to, expected = CONVERTED[name]
    out, changes = convert(source, to)
    assert out.shape == (to.channels, 16, 16)
    assert changes == expected


def test_16_bit_grey_keeps_its_brightness() -> None:
    assert np.all(convert(encoded(sixteen_bit()), GREY_16)[0] == 100)


def test_float_pixels_in_0_to_1_span_the_whole_range() -> None:
    image = Image.fromarray(np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16))
    assert np.array_equal(convert(encoded(image, "TIFF"), GREY_16)[0].ravel(), np.arange(256))


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 1e9])
def test_float_pixels_out_of_range_are_rejected(value: float) -> None:
    pixels = np.full((16, 16), value, dtype=np.float32)
    assert rejection(encoded(Image.fromarray(pixels), "TIFF"), GREY_16) == "pixel values out of range"


def test_animations_give_their_first_frame() -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in ("#ff0000", "#00ff00")]
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if format == "WEBP" else {}
        source = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        out, changes = convert(source, RGB_16)
        assert "animated (first frame)" in changes, format
        assert out[:, 3, 3].tolist() == [255, 0, 0], format


UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # stored pixels h w c -> as they are to be seen
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels, 1),
}


@pytest.mark.case("R20", "a TIFF with an EXIF orientation", "it is turned and counted, as every other format")
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(orientation: int, format: str) -> None:
    pixels = noise(16, 16)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    out, changes = convert(encoded(Image.fromarray(pixels), format, exif=exif, **options), RGB_16)
    assert np.array_equal(out, UPRIGHT[orientation](pixels).transpose(2, 0, 1))
    assert changes == (("exif orientation",) if orientation > 1 else ())


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_orientations_that_do_not_exist_change_nothing(value: int) -> None:
    pixels = noise(16, 16)
    exif = Image.Exif()
    exif[0x0112] = value
    out, changes = convert(encoded(Image.fromarray(pixels), exif=exif), RGB_16)
    assert np.array_equal(out, pixels.transpose(2, 0, 1))
    assert changes == ()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_cost_the_image() -> None:
    image = Image.fromarray(noise(16, 16))
    source = encoded(image, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert convert(source, RGB_16)[1] == ()


def test_crop_takes_the_centre_square() -> None:
    pixels = np.zeros((16, 48, 3), dtype=np.uint8)
    pixels[:, 16:32] = 200
    out, _ = convert(pixels, RGB_16)
    assert np.all(out == 200)


def test_crop_shrinks_the_shorter_side_to_the_model() -> None:
    out, _ = convert(np.full((64, 128, 3), 77, dtype=np.uint8), RGB_16)
    assert np.all(out == 77)


def test_jpegs_decoded_at_reduced_scale_look_like_full_ones() -> None:
    ramp = np.linspace(0, 255, 640).astype(np.uint8)
    pixels = np.repeat(np.broadcast_to(ramp, (640, 640))[..., None], 3, 2)
    jpeg, _ = convert(encoded(Image.fromarray(pixels), "JPEG", quality=95), RGB_16)
    png, _ = convert(encoded(Image.fromarray(pixels)), RGB_16)
    assert np.abs(jpeg.astype(int) - png.astype(int)).max() <= 3


def test_pad_centres_a_smaller_image_on_the_background_without_scaling() -> None:
    pixels = noise(12, 12, 1)[:, :, 0]
    out, _ = convert(pixels, Conversion(16, 1, "black", "pad"))
    assert np.array_equal(out[0, 2:14, 2:14], pixels)
    assert out[0].sum() == pixels.sum()


def test_pad_shows_the_whole_of_a_larger_image() -> None:
    out, _ = convert(np.zeros((20, 80, 3), dtype=np.uint8), Conversion(16, 3, "white", "pad"))
    assert np.all(out[:, 6:10] == 0)
    assert np.all(out[:, :6] == 255)
    assert np.all(out[:, 10:] == 255)


def test_enlarge_scales_small_images_up() -> None:
    for fit in ("crop", "pad"):
        out, changes = convert(np.full((8, 8), 90, np.uint8), Conversion(16, 1, "black", fit, enlarge=True))
        assert changes == ("enlarged",)
        assert np.all(out == 90)


GOOD_PNG = encoded(Image.fromarray(noise()))
GOOD_JPEG = encoded(Image.fromarray(noise(64, 64)), "JPEG")
GOOD_OTHERS = [encoded(palette(), "GIF"), *(encoded(Image.fromarray(noise()), name) for name in ("TIFF", "JPEG2000"))]
REJECTED: dict[str, tuple[bytes, str]] = {
    "zero bytes": (b"", "zero bytes"),
    "pdf renamed": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n" + b"1 0 obj\n" * 50, "not an image of a known format"),
    "fits renamed": (b"SIMPLE  =                    T" + b" " * 2850, "unsupported"),
    "eps renamed": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n", "not an image of a known format"),
    "text": (b"<html>404</html>", "not an image of a known format"),
    "random": (bytes(noise(9, 9).tobytes()), "not an image of a known format"),
    "truncated png": (GOOD_PNG[: len(GOOD_PNG) // 2], "corrupt or truncated"),
    "truncated jpeg": (GOOD_JPEG[: len(GOOD_JPEG) // 2], "corrupt or truncated"),
    "truncated bmp": (encoded(Image.fromarray(noise()), "BMP")[:900], "corrupt or truncated"),
    "truncated webp": (encoded(Image.fromarray(noise()), "WEBP")[:300], "corrupt or truncated"),
    "flipped png": (GOOD_PNG[:60] + bytes([GOOD_PNG[60] ^ 1]) + GOOD_PNG[61:], "corrupt or truncated"),
    "900 million pixels": (png_that_declares(30_000, 30_000), "too many pixels"),
    "179 million pixels": (png_that_declares(17_895_698, 10), "too many pixels"),
    "too small": (encoded(Image.new("RGB", (15, 400))), "smaller than the model"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_unusable_content_is_rejected_with_its_reason(name: str) -> None:
    source, reason = REJECTED[name]
    assert rejection(source) == reason


def test_an_image_over_the_pixel_bound_is_never_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_PIXELS", 24 * 24 - 1)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert rejection(GOOD_PNG) == "too many pixels"


@settings(max_examples=150)
@given(data=st.data(), good=st.sampled_from([GOOD_PNG, GOOD_JPEG, *GOOD_OTHERS]))
def test_damaged_bytes_give_an_image_or_a_reason_and_nothing_else(data: st.DataObject, good: bytes) -> None:
    damaged = bytearray(good[: data.draw(st.integers(0, len(good)))])
    for _ in range(data.draw(st.integers(0, 3))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with suppress(ImageRejectedError), quiet_decoders():
        assert convert(bytes(damaged), RGB_16)[0].shape == (3, 16, 16)


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is at most 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def a_device_link(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (a_pipe, "not a regular file"),
        (a_socket, "not a regular file"),
        (a_device_link, "not a regular file"),
        (a_loop, "not readable"),
        (Path.mkdir, "not a regular file"),
    ],
)
def test_what_is_not_a_regular_file_is_never_opened(tmp_path: Path, make: Callable[[Path], None], reason: str) -> None:
    path = tmp_path / "image.png"
    make(path)
    assert rejection(path) == reason


def test_a_file_without_permission_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(GOOD_PNG)

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("ul_runtime.images.decode.os.open", refuse)
    assert rejection(path) == "not readable"


@pytest.mark.parametrize(
    "arguments", [(0, 3), (16, 2), (16, 3, "no colour"), (16, 3, "white", "stretch"), (16, 3, "hsl(x)")]
)
def test_impossible_targets_are_usage_errors(arguments: tuple) -> None:
    with pytest.raises(UsageError, match="expected"):
        Conversion(*arguments)
