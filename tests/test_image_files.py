"""Files of images: which formats are read, and what is said of those that are not."""

import io
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features
from tiffs import COMPRESSION, SAMPLE_FORMAT, tiff

from ul_runtime.images import decode
from ul_runtime.images.convert import Conversion, convert
from ul_runtime.images.decode import FORMATS, SUFFIXES, ImageRejectedError
from ul_runtime.images.kinds import kind_of

RGB_8 = Conversion(8, 3)
RED = (200, 40, 40)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def refused(source: bytes, to: Conversion = RGB_8) -> str:
    """ "reason (detail)"."""
    with pytest.raises(ImageRejectedError) as error:
        convert(source, to)
    return str(error.value.at("f")).removeprefix("f: ")


@pytest.mark.case(
    "R2",
    "AVIF, JPEG 2000, PPM, HEIC; files that are no images; TIFF of unsupported types",
    "AVIF, JPEG 2000 and PPM are read, HEIC with the extra heif; others are named by their first bytes",
)
@pytest.mark.parametrize("format", ["AVIF", "JPEG2000", "PPM"])
def test_further_formats_are_read_whatever_the_file_is_called(format: str, tmp_path: Path) -> None:
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(Image.new("RGB", (16, 16), RED), format))
    out, changes = convert(path, RGB_8)
    assert np.abs(out[:, 3, 3].astype(int) - RED).max() <= 3
    assert changes == ()


@pytest.mark.case("R2")
def test_the_depth_of_a_pgm_is_its_largest_value() -> None:
    out, changes = convert(b"P5 8 8 4095\n" + struct.pack(">H", 2048) * 64, Conversion(8, 1))
    assert (out == 128).all()
    assert changes == ("16-bit",)


@pytest.mark.case("R2")
def test_heic_is_read_with_the_extra() -> None:
    pytest.importorskip("pillow_heif").register_heif_opener()
    out, changes = convert(encoded(Image.new("RGB", (64, 64), RED), "HEIF"), RGB_8)
    assert np.abs(out[:, 3, 3].astype(int) - RED).max() <= 3
    assert changes == ()


@pytest.mark.case("R2")
def test_without_the_extra_heic_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_formats", lambda: FORMATS)
    message = refused(b"\0\0\0\x1cftypheic" + bytes(200))
    assert message.startswith("unsupported (HEIF; pip install ")
    assert "[heif]" in message


@pytest.mark.case("R2")
@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"\xff\x0a" + bytes(99), "unsupported (JPEG XL; convert it to PNG)"),
        (b"8BPS\0\1" + bytes(99), "unsupported (Photoshop document; convert it to PNG)"),
        (b"\n <!DOCTYPE HTML><title>404", "not an image of a known format (HTML page)"),
        (b"%PDF-1.7", "not an image of a known format (PDF)"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not an image of a known format (Git LFS pointer; run git "),
        (b"\0\0\0\x20ftypmp42" + bytes(99), "not an image of a known format (video)"),
        (b"Not Found", "not an image of a known format (text)"),
        (b"\x13\x37\xbe\xef" * 9, f"not an image of a known format ({', '.join(FORMATS)})"),
    ],
)
def test_a_file_that_is_not_read_is_named_by_its_first_bytes(head: bytes, message: str) -> None:
    assert refused(head).startswith(message)


@pytest.mark.case("R2")
@pytest.mark.parametrize(
    ("type", "shape", "message"),
    [
        ("<f4", (8, 8, 3), "TIFF of 3 x 32 bits, float, photometric 2; save it as 8- or 16-bit"),
        ("<f2", (8, 8), "TIFF of 1 x 16 bits, float, photometric 1; save it as 8- or 16-bit"),
        ("<f8", (8, 8), "TIFF of 1 x 64 bits, float, photometric 1; save it as 8- or 16-bit"),
    ],
)
def test_a_tiff_of_a_type_that_is_not_read_says_which(type: str, shape: tuple[int, ...], message: str) -> None:
    assert refused(tiff(np.zeros(shape, type), {SAMPLE_FORMAT: (3,)})) == f"unsupported ({message})"


@pytest.mark.case("R2")
def test_a_big_tiff_of_a_type_that_is_not_read_says_which() -> None:
    source = encoded(Image.new("F", (16, 16)), "TIFF", big_tiff=True)
    entry = struct.pack("<HHQH", 339, 3, 1, 3)  # SampleFormat: float
    assert entry in source
    message = "TIFF of 1 x 32 bits, complex, photometric 1; save it as 8- or 16-bit"
    assert refused(source.replace(entry, struct.pack("<HHQH", 339, 3, 1, 6))) == f"unsupported ({message})"


@pytest.mark.case("R2")
def test_the_preview_of_a_raw_photograph_is_not_taken_for_it() -> None:
    message = "unsupported (raw photograph (DNG or another): its first picture is a preview)"
    assert refused(tiff(np.zeros((16, 16, 3), np.uint8), {254: (1,)})) == message


@pytest.mark.case("R3")
def test_a_decoder_that_is_not_there_is_not_the_fault_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    source = encoded(Image.new("RGB", (16, 16), RED), "JPEG2000")
    monkeypatch.delattr(Image.core, "jpeg2k_decoder")
    assert refused(source) == "unsupported (JPEG 2000: decoder jpeg2k not available)"


def test_every_suffix_is_that_of_a_format_that_is_read() -> None:
    Image.init()
    of = {suffix for suffix, name in Image.EXTENSION.items() if name in {format.upper() for format in FORMATS}}
    assert SUFFIXES - of <= {".heic", ".heif", ".hif"}


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WebP", "BMP", "GIF", "TIFF", "AVIF", "PPM"])
def test_each_format_is_known_by_its_first_bytes(format: str) -> None:
    assert kind_of(encoded(Image.new("RGB", (16, 16)), format)) == format


# Sound files that are not read


def jpeg_of_12_bits() -> bytes:
    content = bytearray(encoded(Image.new("RGB", (16, 16), RED), "JPEG"))
    content[content.index(b"\xff\xc0") + 4] = 12
    return bytes(content)


def bmp_of_64_bits() -> bytes:
    content = bytearray(encoded(Image.new("RGB", (16, 16), RED), "BMP"))
    content[28] = 64
    return bytes(content)


GREY = np.full((16, 16), 99, np.uint8)
SOUND = {
    "JPEG of 12 bits": (jpeg_of_12_bits(), "JPEG: cannot handle 12-bit layers"),
    "BMP of 64 bits": (bmp_of_64_bits(), "BMP: Unsupported BMP pixel depth (64)"),
    "TIFF with JPEG 2000": (tiff(GREY, {COMPRESSION: (34712,)}), "TIFF with compression 34712"),
    "TIFF with SGI": (tiff(GREY, {COMPRESSION: (34676,)}), "TIFF with compression tiff_sgilog"),
}


@pytest.mark.case(
    "R3",
    "BMP of unsupported depth, TIFF of unsupported compression, JPEG of 12 bits",
    "the reason is unsupported, with the type; corrupt is said of damaged files alone",
)
@pytest.mark.parametrize("name", SOUND)
def test_a_sound_file_is_not_called_corrupt(name: str) -> None:
    source, message = SOUND[name]
    assert refused(source) == f"unsupported ({message})"


@pytest.mark.case("R3")
@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate"])
def test_a_damaged_tiff_is_called_corrupt(compression: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    source = bytearray(encoded(Image.fromarray(pixels), "TIFF", compression=compression))
    source[200:2000] = bytes(1800)
    assert refused(bytes(source)).startswith("corrupt or truncated (")


@pytest.mark.case("R3")
def test_a_tiff_with_too_few_strips_is_called_corrupt() -> None:
    message = "corrupt or truncated (8 of 64 rows are in the file)"
    assert refused(tiff(GREY[:8], {257: (64,), 278: (8,)})) == message


# Large files


@pytest.mark.case(
    "R18", "a JPEG of 200 megapixels", "decoded at 1/8 of its size where that is enough; other formats are refused"
)
def test_a_large_jpeg_is_decoded_at_a_smaller_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(decode, "MAX_PIXELS", 2000)
    image = Image.new("RGB", (64, 64), RED)
    out, changes = convert(encoded(image, "JPEG"), RGB_8)
    assert np.abs(out[:, 3, 3].astype(int) - RED).max() <= 3
    assert changes == ()
    for source, to in (
        (encoded(image, "PNG"), RGB_8),
        (encoded(image, "JPEG", progressive=True), RGB_8),  # which is decoded whole
        (encoded(image, "JPEG"), Conversion(60, 3)),
    ):
        assert refused(source, to).startswith("too many pixels (")
    monkeypatch.setattr(decode, "MAX_JPEG_PIXELS", 64 * 64 - 1)
    assert refused(encoded(image, "JPEG")).startswith("too many pixels (64x64")


@pytest.mark.case("R19", "a damaged TIFF among others", "nothing but the messages of this program is on stderr")
def test_decoders_write_nothing_to_stderr(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    source = bytearray(encoded(Image.fromarray(pixels), "TIFF", compression="tiff_lzw"))
    source[200:2000] = bytes(1800)
    (tmp_path / "a.tif").write_bytes(source)
    script = f"""
import os, pathlib
from ul_runtime.images.decode import ImageRejectedError, quiet_decoders
from ul_runtime.images.convert import Conversion, convert
def read():
    try:
        convert(pathlib.Path({str(tmp_path / "a.tif")!r}), Conversion(8, 3))
    except ImageRejectedError:
        pass
read()
os.write(2, b"QUIET")
with quiet_decoders():
    read()
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    loud, _, quiet = result.stderr.partition(b"QUIET")
    assert loud  # the negative control
    assert quiet == b""
