"""Folders of images, explicit held-out sources."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_sources import contents, of, opened, png, put, reasons

from ul_runtime.errors import BadInputError, UsageError


def test_first_level_folders_are_the_classes(tmp_path: Path) -> None:
    for value, name in enumerate(["dog/1.png", "cat/b/deep/2.png", "cat/1.png", "dog/.hidden.png", "cat/note.txt"]):
        put(tmp_path / "in" / name, value)
    splits = opened(tmp_path / "in", tmp_path)
    assert splits.train.class_names == splits.heldout.class_names == ("cat", "dog")
    assert of(splits) == {0: "dog", 1: "cat", 2: "cat"}
    assert splits.index.train.ignored == {".txt": 1}


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
    assert "not used: extra" in splits.index.notes[0]


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

    monkeypatch.setattr("ul_train.data.folder.os.scandir", refuse)
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


def test_the_digits_of_scikit_learn_fill_the_image(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    splits = opened("sklearn-digits", tmp_path, size=16, channels=1)
    assert len(splits.train) + len(splits.heldout) == 1797
    assert splits.train.class_names == tuple("0123456789")
    assert splits.index.train.converted == {}
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
