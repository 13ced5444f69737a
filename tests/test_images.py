"""Pictures of every kind as the encoder's input."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ul_runtime.errors import BadInputError
from ul_runtime.images import list_images, load_image


def saved(tmp_path: Path, picture: Image.Image, name: str = "a.png", **options) -> Path:
    picture.save(tmp_path / name, **options)
    return tmp_path / name


def level(x: np.ndarray) -> list[int]:
    """Mean of each channel as 0..255."""
    return [round(float(v)) for v in (x.mean(axis=(1, 2)) + 1) * 127.5]


def test_pixels_become_minus_1_to_1_channels_first(tmp_path):
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5
    x = load_image(saved(tmp_path, Image.fromarray(pixels)), 3, 4, "white")
    assert x.dtype == np.float32
    assert np.array_equal(np.rint((x + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0), pixels)


def test_the_middle_square_is_kept_and_resized(tmp_path):
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 200
    assert level(load_image(saved(tmp_path, Image.fromarray(pixels)), 3, 8, "white")) == [200] * 3
    assert load_image(saved(tmp_path, Image.fromarray(pixels)), 3, 4, "white")[:, 1:3, 1:3].min() > 0.5


@pytest.mark.parametrize(("channels", "expected"), [(1, [77]), (3, [0, 0, 255])])
def test_transparent_pixels_show_the_background(tmp_path, channels, expected):
    file = saved(tmp_path, Image.new("RGBA", (4, 4), (9, 9, 9, 0)))
    background = "#0000ff" if channels == 3 else "#4d4d4d"
    assert level(load_image(file, channels, 4, background)) == expected


def test_a_transparent_palette_shows_the_background_too(tmp_path):
    picture = Image.new("P", (4, 4), 0)
    picture.putpalette([10, 20, 30] * 256)
    assert level(load_image(saved(tmp_path, picture, transparency=0), 3, 4, "#ff0000")) == [255, 0, 0]


@pytest.mark.parametrize(
    ("picture", "name"),
    [
        (Image.fromarray(np.full((4, 4), 100 * 257, np.uint16)), "grey16.png"),
        (Image.fromarray(np.full((4, 4), 100 * 257, np.uint16)), "grey16.tif"),
        (Image.new("L", (4, 4), 100), "grey.png"),
        (Image.new("CMYK", (4, 4), (155, 155, 155, 0)), "cmyk.tif"),
        (Image.new("RGB", (4, 4), (100, 100, 100)), "rgb.bmp"),
    ],
)
def test_every_mode_becomes_the_same_grey(tmp_path, picture, name):
    assert level(load_image(saved(tmp_path, picture, name), 3, 4, "white")) == [100] * 3


def test_a_photo_is_turned_upright(tmp_path):
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 3
    x = load_image(saved(tmp_path, Image.fromarray(pixels), exif=exif), 3, 4, "white")
    assert x[:, 3].min() == 1.0


def test_what_is_not_one_whole_picture_is_refused_by_name(tmp_path):
    whole = saved(tmp_path, Image.effect_noise((64, 64), 50), "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.jpg").touch()
    frames = [Image.new("L", (4, 4), k) for k in (0, 255)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    for name in ("cut.png", "text.png", "empty.jpg", "moving.gif"):
        with pytest.raises(BadInputError, match=name):
            load_image(tmp_path / name, 3, 4, "white")


def test_folders_are_listed_in_order_of_name_and_files_as_given(tmp_path):
    for name in ("b/2.png", "b/1.jpg", "a/3.PNG", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    listed = [str(path.relative_to(tmp_path)) for path in list_images([tmp_path / "b/2.png", tmp_path])]
    assert listed == ["b/2.png", "a/3.PNG", "b/1.jpg", "b/2.png"]
