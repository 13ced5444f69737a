"""The labelled contact sheet: which image stands where."""

import numpy as np
import pytest
from PIL import ImageFont

from ul_runtime.images.png import _TEXT_PX, MOST_TILES, _drawable, _shortened, contact_sheet


def flat(value: int, size: int = 8, channels: int = 3) -> np.ndarray:
    return np.full((size, size, channels), value, np.uint8)


def blocks(sheet: np.ndarray, value: int) -> tuple[int, int]:
    """Centre (x, y) of the pixels of one grey."""
    y, x = np.nonzero((sheet == value).all(axis=-1))
    return int(x.mean()), int(y.mean())


def test_image_i_stands_in_column_i_mod_the_number_of_classes():
    sheet = np.asarray(contact_sheet([flat(100 + i) for i in range(6)], "title", ["a", "b", "c"]))
    places = [blocks(sheet, 100 + i) for i in range(6)]
    assert [x for x, _ in places[:3]] == [x for x, _ in places[3:]]
    assert places[0][0] < places[1][0] < places[2][0]
    assert len({y for _, y in places[:3]}) == 1
    assert places[0][1] < places[3][1]


def test_small_images_are_enlarged_by_whole_factors_and_large_ones_reduced():
    for size, expected in ((28, 28 * 4), (32, 96), (256, 256), (512, 256)):
        sheet = np.asarray(contact_sheet([flat(7, size)], "t"))
        assert (sheet == 7).all(axis=-1).sum() == expected**2


def test_a_class_name_stands_above_its_column():
    with_names = np.asarray(contact_sheet([flat(9), flat(9)], "t", ["left", "right"]))
    without = np.asarray(contact_sheet([flat(9), flat(9)], "t"))
    assert with_names.shape[0] == without.shape[0] + 20
    assert (with_names[:, : 12 + 96] < 128).sum() > (without[:, : 12 + 96] < 128).sum()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_grey_rgb_and_rgba_are_drawn(channels):
    image = flat(50, channels=channels)
    if channels == 4:
        image[..., 3] = 255
    assert (np.asarray(contact_sheet([image], "t")) == 50).all(axis=-1).sum() == 96**2


def test_many_classes_get_captions_in_a_square():
    sheet = contact_sheet([flat(9)] * 30, "t", [f"class {i}" for i in range(30)])
    assert sheet.size == (12 * 2 + 6 * 100 - 4, 12 + 24 + 5 * 120 + 12)


def test_at_most_a_hundred_are_shown():
    shown = (np.asarray(contact_sheet([flat(9)] * 500, "t")) == 9).all(axis=-1).sum()
    assert shown == MOST_TILES * 96**2


@pytest.mark.case(
    "N12",
    "three classes and 48 images; latents that hold names; ul-bench --plot",
    "the sheet is about square, the sheet of ul-decode has the names, bars begin at 0",
)
@pytest.mark.parametrize(
    ("classes", "num", "across"), [(3, 48, 6), (2, 64, 8), (10, 100, 10), (10, 64, 10), (20, 9, 20)]
)
def test_few_classes_have_several_columns_each(classes, num, across):
    names = [f"class {i}" for i in range(classes)]
    sheet = contact_sheet([flat(9)] * num, "t", names)
    assert sheet.width == 2 * 12 + across * 100 - 4
    first = np.asarray(contact_sheet([flat(100 + i % classes) for i in range(num)], "t", names))
    x = [blocks(first[:, : 12 + classes * 100], 100 + i)[0] for i in range(min(classes, num))]
    assert x == sorted(x)


@pytest.mark.case("R11", "classes in Chinese, NFD and emoji", "what the font cannot draw is written as its number")
def test_a_name_that_the_font_cannot_draw_is_written_in_numbers():
    font = ImageFont.load_default(_TEXT_PX)
    assert _drawable("日本 cat", font) == "\\u65e5\\u672c cat"
    assert _drawable("e\u0301t\u00e9", font) == "ete"
    assert _drawable("\U0001f600", font) == "\\U0001f600"
    assert _drawable("cat…", font) == "cat…"


@pytest.mark.case("R23", "300 classes with long names that differ at their ends", "both ends of a long name are shown")
def test_a_long_name_keeps_its_beginning_and_its_end():
    font = ImageFont.load_default(_TEXT_PX)
    shown = {_shortened(f"class number {i}", 96, font) for i in range(300)}
    assert len(shown) == 300
    assert all(font.getlength(text) <= 96 for text in shown)
    long = _shortened("a very long class name 17", 96, font)
    assert (long[:5], long[-4:]) == ("a ver", "e 17")
    assert _shortened("short", 96, font) == "short"
    assert _shortened("short", 1, font) == "…"
    assert [_shortened(text, 96, font) for text in ("7", "", "ab")] == ["7", "", "ab"]
    assert _shortened("7", 1, font) == "…"
