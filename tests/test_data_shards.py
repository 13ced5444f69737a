"""WebDataset shards: read in order, never short in silence."""

import io
import tarfile
from pathlib import Path

import pytest
from image_sources import of, opened, png, reasons

from ul_runtime.errors import BadInputError
from ul_train.data.shards import expand_braces


def tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def samples(first: int, count: int) -> list[tuple[str, bytes]]:
    members = []
    for value in range(first, first + count):
        members += [(f"{value:04d}.png", png(value)), (f"{value:04d}.cls", str(value % 3).encode())]
    return members


@pytest.mark.parametrize("how", ["folder", "braces", "one"])
@pytest.mark.parametrize(("suffix", "mode"), [(".tar", "w"), (".tar.gz", "w:gz")])
def test_shards_are_read_in_order(tmp_path: Path, how: str, suffix: str, mode: str) -> None:
    for number in range(1 if how == "one" else 3):
        tar(tmp_path / "in" / f"s-{number:03d}{suffix}", samples(10 * number, 10), mode)
    source = {"folder": "in", "braces": f"in/s-{{000..002}}{suffix}", "one": f"in/s-000{suffix}"}[how]
    splits = opened(tmp_path / source, tmp_path)
    assert splits.train.class_names == ("0", "1", "2")
    assert of(splits) == {value: str(value % 3) for value in range(10 if how == "one" else 30)}
    order = splits.train.images[:][:, 0, 0, 0].tolist()
    assert order == sorted(order)


def test_json_labels_and_other_members_are_understood(tmp_path: Path) -> None:
    members = [
        ("d/a.jpg.json", b'{"label": "cat"}'),
        ("d/a.x.png", png(1)),
        ("d/a.txt", b"a caption"),
        ("d/b.png", png(2)),
        ("d/b.json", b'{"cls": "dog", "x": [1]}'),
        ("d/c.png", png(3)),
        ("d/c.json", b'{"label": "cat"}'),
    ]
    splits = opened(tar(tmp_path / "s.tar", members), tmp_path)
    assert of(splits) == {1: "cat", 2: "dog", 3: "cat"}


def test_bad_samples_are_listed(tmp_path: Path) -> None:
    members = [
        *samples(0, 6),
        ("x1.png", png(200)),  # no class
        ("x2.cls", b"1"),  # no image
        ("x3.png", b"broken"),
        ("x3.cls", b"1"),
        ("x4.png", png(201)),
        ("x4.json", b"{" * 5000),
        ("x5.png", png(202)),
        ("x5.webp", png(203)),
        ("x5.cls", b"2"),
    ]
    path = tar(tmp_path / "s.tar", members)
    with tarfile.open(path, "a") as archive:
        for name, kind in (("y.png", tarfile.SYMTYPE), ("z.png", tarfile.CHRTYPE), ("../../w.png", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    splits = opened(path, tmp_path, max_rejected_share=0.9)
    assert reasons(splits.index.train) == {
        "s.tar/x1": "no class",
        "s.tar/x2": "a label without an image",
        "s.tar/x3": "not an image of a known format",
        "s.tar/x4.json": "unreadable label",
        "s.tar/x4": "no class",
        "s.tar/x5.webp": "second image of one sample",
        "s.tar/y.png": "not a regular file",
        "s.tar/y": "no image in this sample",
        "s.tar/z.png": "not a regular file",
        "s.tar/z": "no image in this sample",
        "s.tar/../../w.png": "not a regular file",
        "s.tar/../../w": "no image in this sample",
    }
    assert set(of(splits)) == {*range(6), 202}


def test_a_tar_cut_anywhere_is_reported(tmp_path: Path) -> None:
    good = tar(tmp_path / "in" / "s-0.tar", samples(0, 6))
    other = tar(tmp_path / "in" / "s-1.tar", samples(6, 6))
    whole = other.read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    for cut in [1, 511, *range(512, end + 1, 512), end - 1]:
        other.write_bytes(whole[:cut])
        splits = opened(good.parent, tmp_path, cache=f"cache{cut}", max_rejected_share=0.9)
        assert "damaged or truncated shard" in reasons(splits.index.train).values(), cut
        assert set(of(splits)) >= set(range(6))


def test_a_damaged_header_within_a_tar_is_reported(tmp_path: Path) -> None:
    path = tar(tmp_path / "s.tar", samples(0, 6))
    data = bytearray(path.read_bytes())
    data[4 * 2048 + 150] ^= 1  # the checksum field of the fifth sample's header
    path.write_bytes(data)
    splits = opened(path, tmp_path)
    assert reasons(splits.index.train) == {"s.tar": "damaged or truncated shard"}


def test_a_truncated_gz_shard_is_reported(tmp_path: Path) -> None:
    path = tar(tmp_path / "s.tar.gz", samples(0, 40), "w:gz")
    path.write_bytes(path.read_bytes()[:-300])
    splits = opened(path, tmp_path)
    assert reasons(splits.index.train) == {"s.tar.gz": "damaged or truncated shard"}


@pytest.mark.case("T5")
def test_a_header_that_claims_gigabytes_is_not_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 8 << 30
    good = tar(tmp_path / "s.tar", samples(0, 3)).read_bytes()
    (tmp_path / "s.tar").write_bytes(good[: 3 * 2048] + info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    splits = opened(tmp_path / "s.tar", tmp_path)
    assert "a header of 8,589,934,592 bytes" in splits.index.train.rejected[0].detail


def test_a_missing_shard_is_bad_input(tmp_path: Path) -> None:
    tar(tmp_path / "s-0.tar", samples(0, 3))
    with pytest.raises(BadInputError, match=r"1 of 2 shards are missing.*s-1\.tar"):
        opened(tmp_path / "s-{0..1}.tar", tmp_path)


def test_braces_multiply_and_are_bounded() -> None:
    assert expand_braces("a{08..10}{0..1}.tar")[:3] == ["a080.tar", "a081.tar", "a090.tar"]
    for bad in ("a{3..1}.tar", "a{0..999999999}.tar", "a{0..999}{0..999}.tar"):
        with pytest.raises(BadInputError, match="100,000"):
            expand_braces(bad)


@pytest.mark.case("F5", "shards whose labels have other names than the images", "refused: no label belongs to an image")
def test_labels_that_belong_to_no_image_are_refused(tmp_path: Path) -> None:
    members = [*((f"{v}.png", png(v)) for v in range(4)), *((f"label_{v}.cls", b"cat") for v in range(4))]
    path = tar(tmp_path / "s.tar", members)
    with pytest.raises(
        BadInputError, match=r"4 labels have no image \(first: s\.tar/label_0\) and no image has a label"
    ):
        opened(path, tmp_path)
    with pytest.raises(BadInputError, match="no image in this sample"):
        opened(path, tmp_path, labels=False, max_rejected_share=0.4)
    assert set(of(opened(path, tmp_path, labels=False)).values()) == {""}


@pytest.mark.case("F1")
def test_members_that_are_no_image_are_counted(tmp_path: Path) -> None:
    members = [
        *samples(0, 6),
        ("a.txt", b"a caption"),
        ("a.png", png(20)),
        ("a.cls", b"0"),
        ("b.heic2", b"\0\0\0\x18ftypheic"),
        ("b.cls", b"0"),
        ("c", png(21)),
        ("d.tga", bytes(18)),
        ("e.png", png(22)),
        ("e.json", b'{"category": "cat"}'),
        ("e.cls", b"1"),
        ("f.png", png(23)),
        ("f.mask_png", png(0)),
        ("f.cls", b"1"),
        ("README", b"text"),
        ("g.\x1b[31m", png(0)),
    ]
    train = opened(tar(tmp_path / "s.tar", members), tmp_path).index.train
    assert reasons(train) == {
        "s.tar/b": "an image of another ending",
        "s.tar/c": "an image of another ending",
        "s.tar/d": "unsupported",
        "s.tar/g": "an image of another ending",
    }
    assert train.rejected[-1].detail == ".\\x1b[31m; name it key.png"
    assert train.ignored == {
        ".txt": 1,
        ".json without label, cls, class": 1,
        "beside the image of a sample (.mask_png)": 1,
        "no ending": 1,
    }


@pytest.mark.case(
    "F22", "shards of cat/00001.png and dog/00001.png", "no classes, and it is said where classes come from"
)
def test_folders_in_shards_are_said_to_be_no_classes(tmp_path: Path) -> None:
    path = tar(tmp_path / "s.tar", [(f"{'cat' if v % 2 else 'dog'}/{v}.png", png(v)) for v in range(4)])
    train = opened(path, tmp_path).index.train
    assert train.ignored == {"names of folders (the classes of shards are .cls and .json members)": 4}
    assert opened(path, tmp_path, labels=False).index.train.ignored == {}


@pytest.mark.case("R17", "keys with a dot, as v1.2_00001.png", "rejected, and the rule of the first dot is said")
def test_keys_with_a_dot_are_explained(tmp_path: Path) -> None:
    path = tar(tmp_path / "s.tar", [*samples(0, 4), ("v1.2_1.png", png(50)), ("v1.2_2.png", png(51)), ("v1.cls", b"1")])
    (rejected,) = opened(path, tmp_path).index.train.rejected
    assert str(rejected) == (
        "s.tar/v1.2_2.png: second image of one sample (a key ends at the first dot of the name: here v1)"
    )


@pytest.mark.case("F2", "a caption as the label of a shard", "refused before the first step")
def test_captions_as_labels_are_refused(tmp_path: Path) -> None:
    members = [*samples(0, 4), ("x.png", png(50)), ("x.json", b'{"label": "' + b"a cat on a wall " * 20 + b'"}')]
    with pytest.raises(BadInputError, match=r"a class name of 320 characters.*if the labels are captions"):
        opened(tar(tmp_path / "s.tar", members), tmp_path)


@pytest.mark.case("R13")
def test_a_class_of_broken_images_is_named(tmp_path: Path) -> None:
    members = [*samples(0, 6), ("x.png", b"broken"), ("x.cls", b"bird")]
    notes = opened(tar(tmp_path / "s.tar", members), tmp_path).index.notes
    assert any("no usable image of 1 more, which are no classes then (bird)" in note for note in notes)


def test_hidden_files_are_no_shards(tmp_path: Path) -> None:
    tar(tmp_path / "in" / "s.tar", samples(0, 4))
    (tmp_path / "in" / "._s.tar").write_bytes(b"\0\5\x16\7")
    assert opened(tmp_path / "in", tmp_path).index.train.num_rejected == 0
