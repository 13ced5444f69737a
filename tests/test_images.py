"""ul-encode sees an image exactly as training does."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ul_runtime.images.convert import load_image
from ul_runtime.images.decode import ImageRejectedError
from ul_runtime.images.find import find_images
from ul_runtime.manifest import ImageFormat
from ul_train.config import load_config
from ul_train.data.prepare import open_splits
from ul_train.run import Run


def saved(tmp_path: Path, image: Image.Image, name: str = "a.png", **options) -> Path:
    image.save(tmp_path / name, **options)
    return tmp_path / name


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("background", ["black", "orange", "#123456"])
def test_what_is_encoded_equals_what_training_saw(tmp_path, fit, background):
    folder = tmp_path / "images"
    folder.mkdir()
    noise = np.random.default_rng(0)
    for k, shape in enumerate([(40, 40), (64, 48), (33, 90), (32, 32)]):
        pixels = noise.integers(0, 256, (*shape, 4), dtype=np.uint8)
        saved(folder, Image.fromarray(pixels), f"{k}.png")
    overrides = ["image.size=32", "image.channels=3", f"image.fit={fit}", f"image.background={background}"]
    config = load_config("tiny", overrides)
    other = tmp_path / "other"
    other.mkdir()
    saved(other, Image.new("RGB", (32, 32)))
    splits = open_splits(config.image, str(folder), str(other), tmp_path / "cache")
    trained = splits.train.batch(np.arange(4))[0]
    image = Run.in_memory(config).manifest().image
    for k, file in enumerate(find_images([folder])[0]):
        x, _ = load_image(file.path, image)
        assert x.dtype == np.float32
        assert np.array_equal(np.rint((x + 1) * 127.5).astype(np.uint8), trained[k])


def test_small_images_are_padded_where_training_pads_and_refused_where_it_crops(tmp_path):
    file = saved(tmp_path, Image.new("L", (28, 28), 255))
    x, changes = load_image(file, ImageFormat(channels=1, size=32, background="#000000", fit="pad"))
    assert changes == ("smaller than the model (padded)",)
    assert (x[0, 2:30, 2:30] == 1).all()
    assert (x == -1).sum() == 32**2 - 28**2
    with pytest.raises(ImageRejectedError, match=r"smaller than the model.*28x28, model 32x32"):
        load_image(file, ImageFormat(channels=1, size=32, fit="crop"))


def test_what_was_converted_is_returned(tmp_path):
    frames = [Image.new("L", (4, 4), k) for k in (0, 255)]
    file = saved(tmp_path, frames[0], "moving.gif", save_all=True, append_images=frames[1:])
    _, changes = load_image(file, ImageFormat(channels=3, size=4))
    assert "animated (first frame)" in changes


def test_what_is_no_whole_image_is_refused_with_its_reason(tmp_path):
    whole = saved(tmp_path, Image.effect_noise((64, 64), 50), "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.jpg").touch()
    for name, reason in (("cut.png", "truncated"), ("text.png", "not an image"), ("empty.jpg", "zero bytes")):
        with pytest.raises(ImageRejectedError, match=reason):
            load_image(tmp_path / name, ImageFormat(channels=3, size=4))


def test_folders_are_listed_in_order_of_name_and_files_as_given(tmp_path):
    for name in ("b/2.png", "b/1.jpg", "a/3.PNG", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    listed = [str(file.path.relative_to(tmp_path)) for file in find_images([tmp_path / "b/2.png", tmp_path])[0]]
    assert listed == ["b/2.png", "a/3.PNG", "b/1.jpg", "b/2.png"]
