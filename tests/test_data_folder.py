"""Folders of images, explicit held-out sources."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_sources import SIZE, contents, notes_of, of, opened, png, put, reasons

from ul_runtime.errors import BadInputError, UsageError
from ul_train.config import load_config
from ul_train.data.prepare import open_splits


def test_first_level_folders_are_the_classes(tmp_path: Path) -> None:
    for value, name in enumerate(["dog/1.png", "cat/b/deep/2.png", "cat/1.png", "dog/.hidden.png", "cat/note.txt"]):
        put(tmp_path / "in" / name, value)
    splits = opened(tmp_path / "in", tmp_path)
    assert splits.train.class_names == splits.heldout.class_names == ("cat", "dog")
    assert of(splits) == {0: "dog", 1: "cat", 2: "cat"}
    assert splits.index.train.ignored == {".txt": 1, "hidden": 1}


def test_images_at_the_top_have_no_classes(tmp_path: Path) -> None:
    for value in range(3):
        put(tmp_path / "in" / f"{value}.png", value)
    splits = opened(tmp_path / "in", tmp_path)
    assert splits.train.class_names == ()
    assert of(splits) == {0: "", 1: "", 2: ""}
    assert set(splits.train.labels) == {-1}


def test_images_beside_class_folders_are_refused_unless_without_classes(tmp_path: Path) -> None:
    for value, name in enumerate(["a/1.png", "b/1.png", "stray.png"]):
        put(tmp_path / "in" / name, value)
    with pytest.raises(BadInputError, match=r"stray\.png.*beside class folders.*image\.labels=false"):
        opened(tmp_path / "in", tmp_path)
    assert of(opened(tmp_path / "in", tmp_path, labels=False)) == {0: "", 1: "", 2: ""}


def test_train_and_test_folders_are_the_splits(tmp_path: Path) -> None:
    for value, name in enumerate(["train/a/1.png", "train/b/1.png", "test/b/2.png", "extra/c/1.png"]):
        put(tmp_path / "in" / name, value)
    splits = opened(tmp_path / "in", tmp_path)
    assert contents(splits.train) == {0: "a", 1: "b"}
    assert contents(splits.heldout) == {2: "b"}
    assert "not used: extra" in notes_of(tmp_path / "in")[0]


def test_a_held_out_class_without_training_images_is_rejected(tmp_path: Path) -> None:
    for value, name in enumerate(["train/a/1.png", "train/b/1.png", "val/b/2.png", "val/c/1.png"]):
        put(tmp_path / "in" / name, value)
    splits = opened(tmp_path / "in", tmp_path)
    assert reasons(splits.index.heldout) == {"c/1.png": "a class that the training images do not have"}


def test_numbered_classes_are_sorted_by_value(tmp_path: Path) -> None:
    for value, name in enumerate(["10", "9", "100"]):
        put(tmp_path / "in" / name / "1.png", value)
    splits = opened(tmp_path / "in", tmp_path)
    assert splits.train.class_names == ("9", "10", "100")
    assert of(splits) == {0: "10", 1: "9", 2: "100"}


def test_one_class_is_kept_and_noted(tmp_path: Path) -> None:
    for value in range(3):
        put(tmp_path / "in" / "only" / f"{value}.png", value)
    splits = opened(tmp_path / "in", tmp_path)
    assert splits.train.class_names == ("only",)
    assert any("one class only (only)" in note for note in splits.index.notes)


def test_obstacles_in_a_folder_are_listed_and_the_good_images_keep_their_order(tmp_path: Path) -> None:
    top = tmp_path / "in"
    for value in range(6):
        put(top / f"{value}.png", value)
    before = opened(top, tmp_path)
    put(top / "1b.png", 200, size=4)
    (top / "2b.png").write_bytes(b"%PDF-1.7 not an image")
    (top / "3b.png").write_bytes(b"")
    os.mkfifo(top / "4b.png")
    (top / "5b.png").symlink_to("5b.png")
    (top / "loop").symlink_to(top)
    after = opened(top, tmp_path, max_rejected_share=0.6)
    assert reasons(after.index.train) == {
        "1b.png": "smaller than the model",
        "2b.png": "not an image of a known format",
        "3b.png": "zero bytes",
        "4b.png": "not a regular file",
        "5b.png": "symbolic link loop",
        "loop": "symbolic link loop",
    }
    assert np.array_equal(before.train.images[:], after.train.images[:])
    assert np.array_equal(before.heldout.images[:], after.heldout.images[:])


def test_linked_images_and_folders_outside_are_read_once(tmp_path: Path) -> None:
    put(tmp_path / "store" / "x" / "1.png", 1)
    put(tmp_path / "store" / "2.png", 2)
    (tmp_path / "store" / "x" / "back").symlink_to(tmp_path / "store" / "x")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").symlink_to(tmp_path / "store" / "x")
    (tmp_path / "in" / "b").mkdir()
    (tmp_path / "in" / "b" / "2.png").symlink_to(tmp_path / "store" / "2.png")
    splits = opened(tmp_path / "in", tmp_path)
    assert of(splits) == {1: "a", 2: "b"}
    assert reasons(splits.index.train) == {"a/back": "symbolic link loop"}


def test_an_unreadable_folder_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value, name in enumerate(["a/1.png", "b/1.png", "c/1.png"]):
        put(tmp_path / "in" / name, value)
    scandir = os.scandir

    def refuse(path: Path) -> Any:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("ul_runtime.images.find.os.scandir", refuse)
    splits = opened(tmp_path / "in", tmp_path)
    assert reasons(splits.index.train) == {"b/": "not readable"}
    assert of(splits) == {0: "a", 2: "c"}


def test_names_that_are_not_utf8_or_printable_are_read(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a", 0)
    (tmp_path / "in" / "a").unlink()
    for value, name in enumerate([b"\xff.png", b"a\nb.png", "\u00fc.png".encode()]):
        Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/" + name)).write_bytes(png(value))
    (tmp_path / "in" / os.fsdecode(b"\xfe.png")).write_bytes(b"")
    splits = opened(tmp_path / "in", tmp_path)
    assert len(of(splits)) == 3
    assert splits.index.train.rejected[0].path == "\\udcfe.png"
    json.loads((tmp_path / "cache" / splits.index.key / "index.json").read_text())


@pytest.mark.parametrize("name", ["nothing", "empty", "texts"])
def test_a_source_without_images_is_bad_input(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("x")
    expected = {"nothing": "does not exist", "empty": "found nothing", "texts": r"found 1 \.txt"}[name]
    with pytest.raises(BadInputError, match=expected):
        opened(tmp_path / name, tmp_path)


def test_a_file_of_no_known_kind_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    with pytest.raises(BadInputError, match="try hf:"):
        opened(tmp_path / "data.parquet", tmp_path)


@pytest.mark.case("N9", "images smaller than the model, enlarged or padded", "counted in the line converted:")
def test_the_digits_of_scikit_learn_fill_the_image(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    splits = opened("sklearn-digits", tmp_path, size=16, channels=1)
    assert len(splits.train) + len(splits.heldout) == 1797
    assert splits.train.class_names == tuple("0123456789")
    assert splits.index.train.converted == {"enlarged": len(splits.train) + len(splits.heldout)}
    assert splits.train.images[:].max() == 255
    assert set(splits.heldout.labels) == set(range(10))


def test_a_held_out_source_is_used_and_may_not_be_the_training_set(tmp_path: Path) -> None:
    for value in range(4):
        put(tmp_path / "a" / f"{value}.png", value)
        put(tmp_path / "b" / f"{value}.png", 10 + value)
    splits = opened(tmp_path / "a", tmp_path, heldout=tmp_path / "b")
    assert set(contents(splits.train)) == {0, 1, 2, 3}
    assert set(contents(splits.heldout)) == {10, 11, 12, 13}
    with pytest.raises(UsageError, match="is the training set"):
        opened(tmp_path / "a", tmp_path, heldout=tmp_path / "a")


# what is found, and what is said of the rest


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def said(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, *settings: str) -> list[str]:
    """What ul-train says of these images."""
    caplog.clear()
    caplog.set_level("INFO", "ul_train")
    config = load_config("tiny", [f"image.size={SIZE}", "image.channels=3", *settings])
    open_splits(config.image, str(source), None, tmp_path / "cache")
    return caplog.messages


def class_folders(top: Path, *names: str, count: int = 10) -> None:
    for number, name in enumerate(names):
        for value in range(count):
            put(top / name / f"{value}.png", 40 * number + value)


@pytest.mark.case(
    "F1",
    "class folders with HEIC, JPEG XL, TGA, DNG, texts, hidden files and images without an ending",
    "images without an ending are read; every other file is counted by ending or listed as rejected",
)
def test_every_file_of_a_folder_is_read_or_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    top = tmp_path / "in"
    class_folders(top, "cat", "dog")
    for number in range(3):
        (top / "cat" / f"{number}.png").rename(top / "cat" / f"photo{number}")
        (top / "dog" / f"{number}.png").rename(top / "dog" / f"{number}.jpg_large")
        write(top / "dog" / f"{number}.txt", b"a caption")
    write(top / "cat" / "IMG_1.HEIC", b"\0\0\0\x18ftypheic\0\0\0\0")
    write(top / "cat" / "drawing.jxl", b"\xff\x0a\xfa\x7f")
    write(top / "cat" / "old.tga", bytes(18))
    write(top / "cat" / "raw.DNG", b"II*\0" + bytes(8))
    write(top / "cat" / "film.mp4", b"\0\0\0\x18ftypmp42")
    write(top / "cat" / ".DS_Store", b"x")
    lines = said(top, tmp_path, caplog)
    assert lines[0].endswith(f" images of {SIZE} px, 2 classes, from {top}")
    assert lines[1] == "images of each class: cat 10, dog 10"
    assert lines[2].startswith(f"note: {top}: 3 no ending, 3 .jpg_large, ")
    assert lines[2].endswith("1 .jxl: images by their first bytes")
    assert lines[3].startswith("rejected: 4")
    assert all(name in lines[3] for name in ("IMG_1.HEIC: ", "drawing.jxl: ", "old.tga: unsupported (.tga"))
    assert lines[4:] == ["no images, not looked at: 3 .txt, 1 hidden, 1 .mp4"]


@pytest.mark.case("F1")
def test_images_of_other_formats_count_as_rejected(tmp_path: Path) -> None:
    class_folders(tmp_path / "in", "cat", "dog", count=2)
    for number in range(5):
        write(tmp_path / "in" / "cat" / f"{number}.tga", bytes(18))
    with pytest.raises(BadInputError, match=r"5 of 9 images are unusable, .*0\.tga: unsupported"):
        opened(tmp_path / "in", tmp_path)
    write(tmp_path / "others" / "a.txt", b"")
    for number in range(5):
        write(tmp_path / "others" / f"{number}.tga", bytes(18))
    with pytest.raises(BadInputError, match=r"no images in this folder \(found 5 unsupported, 1 \.txt\)"):
        opened(tmp_path / "others", tmp_path)


@pytest.mark.case("F1")
def test_what_is_no_image_is_counted_anew_when_prepared_images_are_opened_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class_folders(tmp_path / "in", "cat", "dog")
    assert not any("not looked at" in line for line in said(tmp_path / "in", tmp_path, caplog))
    write(tmp_path / "in" / "labels.csv", b"x")
    assert said(tmp_path / "in", tmp_path, caplog)[-1] == "no images, not looked at: 1 .csv"
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_many_classes_are_said_by_the_smallest_and_the_largest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class_folders(tmp_path / "in", *(f"c{number}" for number in range(21)), count=2)
    put(tmp_path / "in" / "c7" / "more.png", 1)
    (tmp_path / "in" / "c3" / "1.png").unlink()
    assert said(tmp_path / "in", tmp_path, caplog)[1] == "images of each class: 1 (c3) to 3 (c7)"


@pytest.mark.case(
    "F3",
    "the output folder of ul-train or ul-generate inside the data folder",
    "its pictures are no images; it is said",
)
@pytest.mark.parametrize(
    "name", ["run.json", "generate.json", "decode.json", "manifest.json", "results.json", "eval.json"]
)
def test_folders_that_this_program_writes_hold_no_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    top = tmp_path / "in"
    class_folders(top, "cat", "dog")
    before = opened(top, tmp_path)
    write(top / "out" / name, b'{"format": "unified-latents-run"}')
    put(top / "out" / "previews" / "joint-000010.png", 200)
    write(top / "cat" / name, b'{"format": "of another program"}')
    lines = said(top, tmp_path, caplog)
    assert f"no images, not looked at: 1 .json, 1 out/ (has a {name} of this program)" in lines
    after = opened(top, tmp_path)
    assert after.train.class_names == ("cat", "dog")
    assert after.train.fingerprint == before.train.fingerprint
    if name not in ("generate.json", "decode.json"):  # whose pictures may be a data set
        with pytest.raises(BadInputError, match=f"was written by this program .{name}.; expected a folder of images"):
            opened(top / "out", tmp_path)


@pytest.mark.case("R12", "folders of thumbnails of a file server (@eaDir)", "no class; counted as not looked at")
def test_folders_of_a_system_are_no_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class_folders(tmp_path / "in", "cat", "dog")
    put(tmp_path / "in" / "@eaDir" / "cat" / "SYNOPHOTO_THUMB_M.png", 200)
    put(tmp_path / "in" / "cat" / "@eaDir" / "0.png", 201)
    put(tmp_path / "in" / "__MACOSX" / "cat" / "._0.png", 202)
    lines = said(tmp_path / "in", tmp_path, caplog)
    assert lines[1:] == ["images of each class: cat 10, dog 10", "no images, not looked at: 2 @eaDir/, 1 __MACOSX/"]


@pytest.mark.case("F6", "split folders in capitals, or called training and testing", "they are the splits")
@pytest.mark.parametrize(("train", "test"), [("Train", "Test"), ("training", "testing"), ("TRAIN", "Validation")])
def test_splits_are_found_in_any_spelling(tmp_path: Path, train: str, test: str) -> None:
    for value, name in enumerate([f"{train}/cat/1.png", f"{train}/dog/1.png", f"{test}/cat/2.png"]):
        put(tmp_path / "in" / name, value)
    splits = opened(tmp_path / "in", tmp_path)
    assert contents(splits.train) == {0: "cat", 1: "dog"}
    assert contents(splits.heldout) == {2: "cat"}


@pytest.mark.case("F6")
def test_splits_without_a_training_part_are_refused(tmp_path: Path) -> None:
    class_folders(tmp_path / "in", "test", "validation")
    with pytest.raises(BadInputError, match=r"has test/, validation/, and no train/; name the folder to train on"):
        opened(tmp_path / "in", tmp_path)
    class_folders(tmp_path / "other", "train", "Train")
    with pytest.raises(BadInputError, match="has Train/ and train/; join or rename them"):
        opened(tmp_path / "other", tmp_path)
    class_folders(tmp_path / "tests", "test", "cat")
    assert opened(tmp_path / "tests", tmp_path).train.class_names == ("cat", "test")


@pytest.mark.case("F6")
def test_splits_below_the_classes_are_noted(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        class_folders(tmp_path / "in" / name, "Train", "test", count=2)
    class_folders(tmp_path / "in" / "eel", "test", "old", count=2)
    (note,) = notes_of(tmp_path / "in")
    assert "cat/ has Train/ and test/, and all of it is trained on; to hold some out" in note


@pytest.mark.case("F16", "two folders whose names look the same (NFC and NFD)", "one class")
def test_names_that_look_the_same_are_one_class(tmp_path: Path) -> None:
    for value, name in enumerate(["\u00e9t\u00e9", "e\u0301te\u0301", "a"]):
        put(tmp_path / "in" / name / f"{value}.png", value)
    splits = opened(tmp_path / "in", tmp_path)
    assert splits.train.class_names == ("a", "\u00e9t\u00e9")
    assert of(splits) == {0: "\u00e9t\u00e9", 1: "\u00e9t\u00e9", 2: "a"}


@pytest.mark.case("F2", "a class folder whose name is longer than a bundle can hold", "refused before the first step")
def test_a_class_name_that_no_bundle_can_hold_is_refused_at_once(tmp_path: Path) -> None:
    class_folders(tmp_path / "in", "cat", "a photograph of a cat on a wall, " * 5)
    with pytest.raises(
        BadInputError, match=r"a class name of 165 characters \('a photograph of .*, 1 to 128 are expected"
    ):
        opened(tmp_path / "in", tmp_path)
    assert opened(tmp_path / "in", tmp_path, labels=False).train.class_names == ()


@pytest.mark.case("R13", "a class folder that is empty, or whose images are all broken", "the class is named in a note")
def test_a_class_without_a_usable_image_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class_folders(tmp_path / "in", "cat", "dog")
    (tmp_path / "in" / "ant").mkdir()
    write(tmp_path / "in" / "bee" / "0.png", b"broken")
    lines = said(tmp_path / "in", tmp_path, caplog)
    assert f"note: {tmp_path / 'in'}: no usable image of 2 more, which are no classes then (ant, bee)" in lines


@pytest.mark.case("R14", "folders Cat and cat", "two classes, and a note")
def test_classes_that_differ_by_capitals_are_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class_folders(tmp_path / "in", "Cat", "cat", "dog")
    lines = said(tmp_path / "in", tmp_path, caplog)
    assert any("classes that differ only by capitals (Cat, cat); rename one" in line for line in lines)


def test_a_class_for_each_image_is_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class_folders(tmp_path / "in", *(f"image {number}" for number in range(30)), count=1)
    assert any("if the labels are captions" in line for line in said(tmp_path / "in", tmp_path, caplog))
