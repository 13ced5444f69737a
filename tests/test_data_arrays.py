"""IDX and npz files: what is read, what is refused."""

import gzip
import io
import os
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_sources import SIZE, notes_of, of, opened

from ul_runtime.errors import BadInputError
from ul_train.data.arrays import FASHION_NAMES


def idx(folder: Path, split: str, count: int, suffix: str = ".gz", first: int = 0, side: int = 6) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write = gzip.compress if suffix else bytes
    pixels = b"".join(bytes([first + i]) * side * side for i in range(count))
    labels = bytes(i % 10 for i in range(count))
    header = struct.pack(">4I", 0x803, count, side, side)
    (folder / f"{split}-images-idx3-ubyte{suffix}").write_bytes(write(header + pixels))
    (folder / f"{split}-labels-idx1-ubyte{suffix}").write_bytes(write(struct.pack(">2I", 0x801, count) + labels))


@pytest.mark.parametrize(("folder", "names"), [("fashion", FASHION_NAMES), ("mnist", tuple("0123456789"))])
@pytest.mark.parametrize("suffix", [".gz", ""])
def test_idx_files_are_read_with_their_class_names(
    tmp_path: Path, folder: str, names: tuple[str, ...], suffix: str
) -> None:
    idx(tmp_path / folder, "train", 20, suffix, first=1)
    idx(tmp_path / folder, "t10k", 10, suffix, first=100)
    splits = opened(tmp_path / folder, tmp_path, channels=1, fit="pad")
    assert splits.train.class_names == names
    assert splits.train.images.shape == (20, 1, SIZE, SIZE)
    assert splits.train.labels.tolist() == [i % 10 for i in range(20)]
    assert np.array_equal(splits.train.images[4][0], np.pad(np.full((6, 6), 5), 1))
    assert splits.heldout.images[:][:, 0, 4, 4].tolist() == list(range(100, 110))


def test_idx_images_smaller_than_the_model_are_refused_with_what_to_do(tmp_path: Path) -> None:
    idx(tmp_path / "in", "train", 5)
    with pytest.raises(BadInputError, match=r'all 5 images are smaller.*image\.size=.*image\.fit="pad"'):
        opened(tmp_path / "in", tmp_path)


def damage_idx(path: Path, how: str) -> None:
    data = gzip.decompress(path.read_bytes())
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif how == "short":
        path.write_bytes(gzip.compress(data[:-1]))
    elif how == "long":
        path.write_bytes(gzip.compress(data + b"\0"))
    elif how == "magic":
        path.write_bytes(gzip.compress(b"\0\0\x0d\x03" + data[4:]))
    elif how == "size":
        path.write_bytes(gzip.compress(data[:8] + struct.pack(">2I", 2**31, 2**31) + data[16:]))
    elif how == "not gzip":
        path.write_bytes(data)
    elif how == "flip":
        raw = bytearray(path.read_bytes())
        raw[-6] ^= 1  # the checksum
        path.write_bytes(raw)


@pytest.mark.parametrize("how", ["cut", "short", "long", "magic", "size", "not gzip", "flip"])
def test_damaged_idx_files_are_refused_whole(tmp_path: Path, how: str) -> None:
    idx(tmp_path / "in", "train", 30)
    damage_idx(tmp_path / "in" / "train-images-idx3-ubyte.gz", how)
    with pytest.raises(BadInputError, match="train-images"):
        opened(tmp_path / "in", tmp_path, fit="pad")
    assert not any((tmp_path / "cache").glob("*")) if (tmp_path / "cache").exists() else True


def test_idx_without_labels_or_with_other_counts_is_refused(tmp_path: Path) -> None:
    idx(tmp_path / "in", "train", 5)
    labels = tmp_path / "in" / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(struct.pack(">2I", 0x801, 4) + b"\0" * 4))
    with pytest.raises(BadInputError, match=r"5 images, but .* has 4 labels"):
        opened(tmp_path / "in", tmp_path)
    labels.unlink()
    with pytest.raises(BadInputError, match=r"labels .* are missing"):
        opened(tmp_path / "in", tmp_path)


def test_a_plain_idx_file_that_declares_more_or_less_than_it_holds_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    idx(tmp_path / "in", "train", 5, suffix="")
    images = tmp_path / "in" / "train-images-idx3-ubyte"
    good = images.read_bytes()
    frombuffer = np.frombuffer

    def labels_only(data: bytes, *options: Any) -> np.ndarray:
        return frombuffer(data, *options) if len(data) == 5 else pytest.fail("read")

    monkeypatch.setattr(np, "frombuffer", labels_only)
    for count, message in [(4, "more data than it declares"), (6, "truncated, it declares more than it holds")]:
        images.write_bytes(good[:4] + struct.pack(">I", count) + good[8:])
        with pytest.raises(BadInputError, match=message):
            opened(tmp_path / "in", tmp_path, fit="pad")
    images.write_bytes(good)
    with pytest.raises(pytest.fail.Exception, match="read"):
        opened(tmp_path / "in", tmp_path, fit="pad")


@pytest.mark.case("T5")
def test_a_gzip_bomb_is_refused_before_it_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    idx(tmp_path / "in", "train", 5)
    images = tmp_path / "in" / "train-images-idx3-ubyte.gz"
    images.write_bytes(gzip.compress(struct.pack(">4I", 0x803, 70_000, 32, 32) + bytes(70_000 << 10)))
    read: list[int] = []
    gzip_read = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, size: read.append(size) or gzip_read(self, size))
    with pytest.raises(BadInputError, match=r"train-images.* more than 200 times"):
        opened(tmp_path / "in", tmp_path, fit="pad")
    assert max(read) == 16


@pytest.mark.parametrize("kind", ["idx", "npz"])
def test_an_array_larger_than_the_memory_of_this_machine_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    idx(tmp_path / "in", "train", 20)
    source = tmp_path / "in" if kind == "idx" else npz(tmp_path / "a.npz", images=flat(20, 6, 6))
    monkeypatch.setattr("ul_runtime.files.npz.memory_bytes", lambda: 19 * 36)
    with pytest.raises(BadInputError, match=r"of memory, this machine has .* a folder or as \.tar shards"):
        opened(source, tmp_path, fit="pad")
    monkeypatch.setattr("ul_runtime.files.npz.memory_bytes", lambda: 20 * 36 + 128)
    assert len(opened(source, tmp_path, fit="pad").train) > 0


def npz(path: Path, **arrays: Any) -> Path:
    np.savez_compressed(path, **arrays)
    return path


def flat(count: int, *shape: int) -> np.ndarray:
    values = np.arange(count, dtype=np.uint8).reshape(-1, *[1] * len(shape))
    return np.ascontiguousarray(np.broadcast_to(values, (count, *shape)))


@pytest.mark.parametrize("shape", [(SIZE, SIZE), (SIZE, SIZE, 1), (SIZE, SIZE, 3), (1, SIZE, SIZE), (3, SIZE, SIZE)])
@pytest.mark.parametrize("channels", [1, 3])
def test_npz_layouts_and_channels_are_converted(tmp_path: Path, shape: tuple[int, ...], channels: int) -> None:
    path = npz(tmp_path / "a.npz", images=flat(5, *shape), labels=np.array([0, 1, 0, 1, 2]))
    splits = opened(path, tmp_path, channels=channels)
    assert splits.train.class_names == ("0", "1", "2")
    assert of(splits) == {0: "0", 1: "1", 2: "0", 3: "1", 4: "2"}
    grey = 3 not in shape
    expected = {(True, 3): "grey to colour", (False, 1): "colour to grey"}.get((grey, channels))
    assert splits.index.train.converted == ({expected: 5} if expected else {})


def test_npz_class_names_are_used(tmp_path: Path) -> None:
    images = flat(3, SIZE, SIZE)
    path = npz(tmp_path / "a.npz", images=images, labels=np.array([1, 0, 1], ">i4"), class_names=np.array(["z", "a"]))
    splits = opened(path, tmp_path)
    assert splits.train.class_names == ("z", "a")
    assert of(splits) == {0: "a", 1: "z", 2: "a"}


def lying_npz(path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (1000, SIZE, SIZE)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", header.getvalue() + bytes(500))


def twice_npz(path: Path) -> None:
    np.savez(path, images=flat(3, SIZE, SIZE))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("images.npy", b"x")


BAD_NPZ = {
    "pickled objects": (lambda p: np.savez(p, images=np.array([{}, {}])), "never unpickled"),
    "pickled labels": (
        lambda p: np.savez(p, images=flat(2, SIZE, SIZE), labels=np.array([0, None])),
        "never unpickled",
    ),
    "other name": (lambda p: np.savez(p, x=flat(2, SIZE, SIZE)), "has x; an array named images"),
    "float": (lambda p: np.savez(p, images=np.zeros((2, SIZE, SIZE))), "float64"),
    "two channels": (lambda p: np.savez(p, images=flat(2, SIZE, SIZE, 2)), "c = 1, 3 or 4"),
    "vectors": (lambda p: np.savez(p, images=flat(2, SIZE)), "expected uint8"),
    "labels of other length": (lambda p: np.savez(p, images=flat(2, SIZE, SIZE), labels=np.arange(3)), "expected 2"),
    "label past the names": (
        lambda p: np.savez(p, images=flat(2, SIZE, SIZE), labels=np.array([0, 2]), class_names=np.array(["a", "b"])),
        "label 2 of image 1",
    ),
    "fortran": (lambda p: np.savez(p, images=np.asfortranarray(flat(4, SIZE, SIZE))), "Fortran"),
    "shape lie": (lying_npz, "declares"),
    "the same twice": (twice_npz, "twice"),
    "not a zip": (lambda p: p.write_bytes(b"PK nothing"), "not a readable"),
}


@pytest.mark.parametrize("name", BAD_NPZ)
def test_npz_files_that_are_not_what_they_say_are_refused(tmp_path: Path, name: str) -> None:
    make, message = BAD_NPZ[name]
    make(tmp_path / "a.npz")
    with pytest.raises(BadInputError, match=message):
        opened(tmp_path / "a.npz", tmp_path)


def test_a_pickle_in_a_npz_is_not_run(tmp_path: Path) -> None:
    class Canary:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "canary"),)

    np.savez(tmp_path / "a.npz", images=np.array([Canary(), Canary()], dtype=object), allow_pickle=True)
    with pytest.raises(BadInputError, match="never unpickled"):
        opened(tmp_path / "a.npz", tmp_path)
    assert not (tmp_path / "canary").exists()


@pytest.mark.case("T5", "archives that expand far beyond their size", "refused before they are expanded")
def test_a_zip_bomb_is_refused_before_it_is_expanded(tmp_path: Path) -> None:
    path = npz(tmp_path / "a.npz", images=np.zeros((70_000, 32, 32), dtype=np.uint8))
    assert path.stat().st_size < 100_000
    with pytest.raises(BadInputError, match=r"more than 200 times"):
        opened(path, tmp_path)


def test_npz_truncated_or_with_a_byte_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, images=flat(50, SIZE, SIZE))
    good = path.read_bytes()
    for bad in (good[:-100], good[:2000] + bytes([good[2000] ^ 1]) + good[2001:]):
        path.write_bytes(bad)
        with pytest.raises(BadInputError, match="not a readable"):
            opened(path, tmp_path)


@pytest.mark.case("R7", "npz of float, uint16 or bool images", "refused, with the numpy that makes uint8 of it")
@pytest.mark.parametrize(
    ("dtype", "advice"),
    [
        (np.float32, "(images * 255).round().astype(numpy.uint8) of values in [0, 1], or ((images + 1) * 127.5)"),
        (np.uint16, "save (images // 256).astype(numpy.uint8)"),
        (bool, "save images.astype(numpy.uint8) * 255"),
        (np.int64, "save images.astype(numpy.uint8) of values from 0 to 255"),
    ],
)
def test_images_of_other_types_are_refused_with_advice(tmp_path: Path, dtype: type, advice: str) -> None:
    with pytest.raises(BadInputError, match=re.escape(advice)):
        opened(npz(tmp_path / "a.npz", images=np.zeros((4, SIZE, SIZE), dtype)), tmp_path)


@pytest.mark.case("R7")
def test_labels_of_one_column_are_taken_and_others_refused_with_advice(tmp_path: Path) -> None:
    images = flat(4, SIZE, SIZE)
    column = npz(tmp_path / "a.npz", images=images, labels=np.array([[0], [1], [0], [1]]))
    assert opened(column, tmp_path).train.class_names == ("0", "1")
    for labels, advice in (
        (np.eye(4)[:, :3], "of one column for each class, save labels.argmax(1)"),
        (np.array(["cat"] * 4), "numpy.unique(labels, return_inverse=True)"),
        (np.zeros(4), "save labels.astype(numpy.int64)"),
        (np.zeros(3, np.int64), "expected 4 integers"),
    ):
        with pytest.raises(BadInputError, match=re.escape(advice)):
            opened(npz(tmp_path / "b.npz", images=images, labels=labels), tmp_path)


@pytest.mark.case("F22", "npz with an array label in place of labels", "a note names the arrays that are not used")
def test_arrays_that_are_not_used_are_named(tmp_path: Path) -> None:
    source = npz(tmp_path / "a.npz", images=flat(4, SIZE, SIZE), label=np.arange(4))
    note = f"{source}: arrays that are not used: label; labels are in an array called labels"
    assert notes_of(source) == [note]


@pytest.mark.case(
    "F2", "npz whose class_names are empty, long, twins, or have a newline", "escaped, or refused at once"
)
def test_class_names_of_an_npz_are_those_that_a_bundle_can_hold(tmp_path: Path) -> None:
    def names(*given: str) -> tuple[str, ...]:
        path = npz(tmp_path / "a.npz", images=flat(4, SIZE, SIZE), labels=np.arange(4) % 2, class_names=np.array(given))
        return opened(path, tmp_path).train.class_names

    assert names("a\nb", "c\x1b[31m") == ("a\\nb", "c\\x1b[31m")
    for first, message in (("", "a class name of 0 characters"), ("x" * 129, "a class name of 129 characters")):
        with pytest.raises(BadInputError, match=message):
            names(first, "b")
    with pytest.raises(BadInputError, match="two of the class names are the same in Unicode's form NFC"):
        names("\u00e9", "e\u0301")
