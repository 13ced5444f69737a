"""The labelled contact sheet: which image stands where."""

import numpy as np
import pytest

from ul_runtime.png import MOST_TILES, contact_sheet


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
