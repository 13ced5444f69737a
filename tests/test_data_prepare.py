"""The prepared set: held-out choice, cache, order, concurrency, memory, messages when it fails."""

import errno
import io
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sources import SIZE, opened
from PIL import Image

from ul_runtime.errors import BadInputError, OutputError, StoppedError, UsageError
from ul_runtime.images.convert import Conversion
from ul_runtime.machine import cache_dir, in_units
from ul_train.config import ImageConfig, load_config
from ul_train.data import imageset, prepare, write
from ul_train.data.imageset import SCHEMA, Images, Splits, read_index
from ul_train.data.prepare import open_splits
from ul_train.data.sources import find_sources
from ul_train.data.write import MAX_HELDOUT, in_share, rank, split_by_rank


def folder(path: Path, values: Any, size: int = SIZE) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for value in values:
        Image.new("RGB", (size, size), (value % 256, value // 256, 0)).save(path / f"{value:05d}.png")
    return path


def values(images: Images) -> list[int]:
    return [int(image[0, 0, 0]) + 256 * int(image[1, 0, 0]) for image in images[:]]


def prepared(splits: Splits, tmp_path: Path) -> Path:
    """Folder of the prepared set."""
    return tmp_path / "cache" / splits.index.key


def fail(*_: object) -> Any:
    raise AssertionError("prepared again")


# held out


def test_held_out_images_stay_held_out_when_images_are_added(tmp_path: Path) -> None:
    before = opened(folder(tmp_path / "in", range(0, 400, 2)), tmp_path)
    after = opened(folder(tmp_path / "in", range(400)), tmp_path)
    assert len(before.heldout) >= 2
    assert set(values(before.heldout.images)) <= set(values(after.heldout.images))
    assert set(values(before.train.images)) <= set(values(after.train.images))
    assert sorted(values(after.train.images) + values(after.heldout.images)) == list(range(400))


_RANKS = st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 2**60 - 1), st.integers(2**60, 2**64 - 1))


@settings(max_examples=200)
@given(ranks=st.one_of(*(st.lists(_RANKS.filter(keep), min_size=2, max_size=60) for keep in (bool, in_share))))
def test_every_image_is_on_one_side_and_both_sides_have_one(ranks: list[int]) -> None:
    train, heldout = (side.tolist() for side in split_by_rank(ranks))
    assert heldout == sorted(heldout)
    assert train == sorted(train)
    assert train
    assert heldout
    assert sorted(train + heldout) == list(range(len(ranks)))


@settings(max_examples=200)
@given(ranks=st.lists(_RANKS, min_size=2, max_size=60))
def test_the_split_is_the_one_of_the_images_written_in_turn(ranks: list[int]) -> None:
    """The rule in words: an image of the share is held out until a ninth is; the one of the highest rank then returns,
    behind the training images so far. Runs made from a large set can only be resumed while this order stays."""
    train: list[int] = []
    heldout: list[int] = []
    for number, value in enumerate(ranks):
        (heldout if in_share(value) else train).append(number)
        if len(heldout) == 9:
            returned = max(heldout, key=lambda each: (ranks[each], -each))
            heldout.remove(returned)
            train.append(returned)
    if not train:
        train.append(heldout.pop(heldout.index(max(heldout, key=lambda each: (ranks[each], -each)))))
    if not heldout:
        heldout.append(train.pop(train.index(min(train, key=lambda each: (ranks[each], each)))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "MAX_HELDOUT", 8)
        found = [side.tolist() for side in split_by_rank(ranks)]
    assert found == [train, sorted(heldout)]


def test_at_most_the_maximum_is_held_out_and_it_has_the_lowest_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ul_train.data.write.MAX_HELDOUT", 5)
    splits = opened(folder(tmp_path / "in", range(300)), tmp_path)
    ranks = sorted((rank(f"{value:05d}.png"), value) for value in range(300))
    assert sum(in_share(value) for value, _ in ranks) > 5
    assert values(splits.heldout.images) == sorted(value for _, value in ranks[:5])
    assert sorted(values(splits.train.images)) == sorted(value for _, value in ranks[5:])


def test_the_share_is_five_percent() -> None:
    share = sum(in_share(rank(str(i))) for i in range(20_000)) / 20_000
    assert abs(share - 0.05) < 0.005
    assert MAX_HELDOUT == 1000


# the cache


def test_a_second_open_reuses_the_prepared_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder(tmp_path / "in", range(20))
    first = opened(source, tmp_path)
    monkeypatch.setattr(prepare, "write_set", fail)
    second = opened(source, tmp_path)
    assert second.train.fingerprint == first.train.fingerprint
    assert np.array_equal(second.train.images[:], first.train.images[:])
    assert not isinstance(second.train.batch([0])[0], np.memmap)
    assert isinstance(second.train.images.array, np.memmap)
    assert not second.train.images.array.flags.writeable


CHANGES: dict[str, dict[str, Any]] = {
    "size": {"size": 4},
    "channels": {"channels": 1},
    "background": {"background": "black"},
    "fit": {"fit": "pad"},
    "held-out source": {"heldout": "other"},
}


@pytest.mark.parametrize("name", [*CHANGES, "file added", "file changed", "file renamed"])
def test_every_change_that_matters_prepares_another_set(tmp_path: Path, name: str) -> None:
    source = folder(tmp_path / "in", range(20))
    folder(tmp_path / "other", range(100, 103))
    before = prepared(opened(source, tmp_path), tmp_path)
    if name == "file added":
        folder(source, [50])
    elif name == "file changed":
        os.utime(source / "00003.png", ns=(1, 1))
    elif name == "file renamed":
        (source / "00003.png").rename(source / "00099.png")
    options = dict(CHANGES.get(name, {}))
    if "heldout" in options:
        options["heldout"] = tmp_path / "other"
    assert prepared(opened(source, tmp_path, **options), tmp_path) != before
    assert before.exists()


def test_the_fingerprint_follows_pixels_labels_and_names(tmp_path: Path) -> None:
    def fingerprint(name: str, classes: tuple[str, str], change: int = 0) -> str:
        for number, label in enumerate(classes):
            folder(tmp_path / name / label, [10 * number, 10 * number + 1 + change * number, 10 * number + 2])
        other = tmp_path / "heldout" / name
        folder(other / classes[0], [99])
        return opened(tmp_path / name, tmp_path, heldout=other).train.fingerprint

    same = [fingerprint("one", ("a", "b")), fingerprint("two", ("a", "b"))]
    assert same[0] == same[1]
    assert fingerprint("three", ("a", "c")) != same[0]
    assert fingerprint("four", ("a", "b"), change=5) != same[0]


def _overwrite(path: Path, at: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    at %= len(content)
    content[at : at + len(data)] = data
    path.write_bytes(content)


DAMAGES = {
    "images cut": lambda path: os.truncate(path / "images.npy", (path / "images.npy").stat().st_size - 1),
    "images cut in the header": lambda path: os.truncate(path / "images.npy", 100),
    "images empty": lambda path: os.truncate(path / "images.npy", 0),
    "images longer": lambda path: os.truncate(path / "images.npy", (path / "images.npy").stat().st_size + 1),
    "images missing": lambda path: (path / "images.npy").unlink(),
    "images of another shape": lambda path: np.save(path / "images.npy", np.zeros((20, 3, SIZE, 4), np.uint8)),
    "labels cut": lambda path: os.truncate(path / "labels.npy", 150),
    "labels of another type": lambda path: np.save(path / "labels.npy", np.zeros(20, np.int32)),
    "ids missing": lambda path: (path / "heldout_ids.npy").unlink(),
    "ids of other length": lambda path: np.save(path / "train_ids.npy", np.arange(3)),
    "three bytes of an image": lambda path: _overwrite(path / "images.npy", -700, b"xyz"),
    "three bytes of a held-out image": lambda path: _overwrite(
        path / "images.npy", 128 + 192 * int(np.load(path / "heldout_ids.npy")[0]), b"xyz"
    ),
    "a label out of range": lambda path: _overwrite(path / "labels.npy", -160, b"\7"),
    "a label of another class": lambda path: _overwrite(path / "labels.npy", -160, b"\0" * 8),
    "an id out of range": lambda path: _overwrite(path / "train_ids.npy", -8, b"\x50"),
    "index missing": lambda path: (path / "index.json").unlink(),
    "index cut": lambda path: os.truncate(path / "index.json", 50),
    "index of another set": lambda path: (path / "index.json").write_text(
        (path / "index.json").read_text().replace(path.name, "0" * 64)
    ),
}


@pytest.mark.case(
    "A13", "bytes of prepared images changed, or a label out of range", "found when opened, prepared again"
)
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_prepared_set_is_prepared_again_and_it_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    caplog.set_level("INFO", "ul_train")
    source = folder(tmp_path / "in", range(20))
    first = opened(source, tmp_path)
    fingerprint = first.train.fingerprint
    DAMAGES[name](prepared(first, tmp_path))
    again = opened(source, tmp_path)
    assert again.train.fingerprint == fingerprint
    assert values(again.train.images) == sorted(values(again.train.images))
    assert [message.count("the prepared images were damaged") for message in caplog.messages] == [1]
    opened(source, tmp_path)
    assert len(caplog.messages) == 1


@pytest.mark.case("A13")
def test_labels_and_numbers_of_a_set_too_large_to_compare_are_still_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imageset, "MAX_COMPARED", 100)
    source = folder(tmp_path / "in", range(20))
    first = opened(source, tmp_path)
    whole = prepared(first, tmp_path)
    DAMAGES["three bytes of an image"](whole)
    assert read_index(whole, first.index.key) == first.index
    DAMAGES["a label out of range"](whole)
    assert read_index(whole, first.index.key) == "train_ids.npy or labels.npy is out of range"


def test_a_failed_preparation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder(tmp_path / "in", range(20))

    def full(*_: object) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ul_train.data.write.fingerprint", full)
    with pytest.raises(OutputError, match="No space"):
        opened(source, tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.undo()
    assert len(opened(source, tmp_path).train) > 0


def test_a_full_disk_is_an_output_error_that_names_the_folder(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", range(40), size=64)
    code = (
        "import resource, signal, sys; from pathlib import Path; from image_sources import opened\n"
        "from ul_runtime.errors import OutputError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "try: opened(sys.argv[1], Path(sys.argv[2]), size=64)\n"
        "except OutputError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert f"{tmp_path / 'cache'}: cannot write: File too large; " in printed
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.case("R6", "no space for the prepared images", "sizes are said in a unit that fits")
def test_too_little_space_is_reported_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder(tmp_path / "in", range(20))
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(OutputError, match=r"20 prepared images take 4\.1 KiB, 1 bytes are free; free space, or name"):
        opened(source, tmp_path)


@pytest.mark.case("R6")
@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (3 << 40, "3.0 TiB")],
)
def test_sizes_are_said_in_the_unit_that_fits(size: int, text: str) -> None:
    assert in_units(size) == text


@pytest.mark.case("R1", "a cache folder that cannot be written", "the error names --cache and UL_CACHE")
def test_a_cache_that_cannot_be_written_says_how_to_choose_another(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", range(20))
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(
        OutputError, match=r"cache: cannot write: .*, or name another cache with --cache DIR or UL_CACHE$"
    ):
        opened(source, tmp_path)


@pytest.mark.case("F13", "no HOME, and no entry for the user", "the error asks for UL_CACHE; with it all works")
def test_without_a_home_the_cache_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unknown(_: int) -> None:
        raise KeyError("uid")

    for name in ("HOME", "UL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(UsageError, match="no home folder for a cache; set UL_CACHE"):
        cache_dir()
    assert cache_dir(tmp_path) == tmp_path
    monkeypatch.setenv("UL_CACHE", "/elsewhere")
    assert cache_dir() == Path("/elsewhere")
    with pytest.raises(BadInputError, match="~nosuchuser/x: does not exist"):
        find_sources("~nosuchuser/x", None, True)


def _prepare(source: Path, tmp_path: Path, barrier: Any, results: Any) -> None:
    barrier.wait()
    splits = opened(source, tmp_path)
    results.put((splits.train.fingerprint, int(splits.train.images[:].astype(np.int64).sum())))


def test_processes_that_prepare_at_once_all_get_the_same_whole_set(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", range(150))
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    arguments = (source, tmp_path, barrier, results)
    processes = [context.Process(target=_prepare, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    found = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(found) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_an_attempt_that_was_killed_is_swept(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", range(20))
    final = prepared(opened(source, tmp_path), tmp_path)
    left = final.parent / f".{final.name}.0123456789abcdef.tmp"
    final.rename(left)
    opened(source, tmp_path)
    assert list(final.parent.iterdir()) == [final]


def test_the_set_of_the_faster_process_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder(tmp_path / "in", range(20))
    write_set = prepare.write_set

    def slow(*arguments: Any) -> Any:
        index = write_set(*arguments)
        monkeypatch.setattr(prepare, "write_set", write_set)
        opened(source, tmp_path)  # another one commits while we write
        return index

    monkeypatch.setattr(prepare, "write_set", slow)
    assert len(opened(source, tmp_path).train) > 0
    assert len(list((tmp_path / "cache").iterdir())) == 1


# determinism, memory, progress


def test_bytes_do_not_depend_on_the_number_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder(tmp_path / "in", range(100))
    found = set()
    for threads in (1, 2, 4):
        monkeypatch.setattr(write, "_THREADS", threads)
        splits = opened(source, tmp_path, cache=str(threads))
        found.add((splits.train.fingerprint, splits.heldout.fingerprint))
    assert len(found) == 1


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        path = tmp_path / f"{count}.tar"
        pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        with tarfile.open(path, "w") as tar:
            for number in range(count):
                stream = io.BytesIO()
                Image.fromarray(pixels + np.uint8(number % 256)).save(stream, "BMP")
                member = tarfile.TarInfo(f"{number:05d}.bmp")
                member.size = stream.tell()
                stream.seek(0)
                tar.addfile(member, stream)
        tracemalloc.start()
        splits = opened(path, tmp_path, size=64)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(splits.train) + len(splits.heldout) == count
        return most

    peak(10)
    small, large = peak(300), peak(3000)
    assert large - small < 2 << 20  # of 33 MB more of pixels


@pytest.mark.slow
def test_resident_memory_stays_flat_while_preparing(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    opened(folder(tmp_path / "in", range(4000), size=64), tmp_path, size=64)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40 << 10


def test_progress_ends_with_all_images(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", range(30))
    (source / "bad.png").write_bytes(b"")
    ticks: list[float] = []
    opened(source, tmp_path, tick=ticks.append)
    assert sum(ticks) == find_sources(str(source), None, True).num_records == 31


def test_a_tick_that_stops_leaves_nothing(tmp_path: Path) -> None:
    for last in (1, 20, 22):  # the first image, the last one, and while the fingerprints are made
        ticks = iter(range(1, 100))

        def stop(amount: float, ticks: Iterator[int] = ticks, last: int = last) -> None:
            if next(ticks) >= last:
                raise StoppedError("stopped")

        with pytest.raises(StoppedError):
            opened(folder(tmp_path / "in", range(20)), tmp_path, tick=stop)
        assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "shard"])  # of the latter, the number of images is not known
def test_a_signal_stops_the_opening_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    source = folder(tmp_path / "in", range(20))
    if kind == "shard":
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for path in sorted(source.iterdir()):
                tar.add(path, path.name)
        source = tmp_path / "a.tar"
    assert (find_sources(str(source), None, True).num_records is None) == (kind == "shard")
    (tmp_path / "cache").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("ul_runtime.signals._State.asked", True)
        with pytest.raises(StoppedError, match="stopped while preparing the images; run the same command again"):
            open_splits(image_config(size=SIZE), str(source), None, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(open_splits(image_config(size=SIZE), str(source), None, tmp_path / "cache").train) > 0


def image_config(**changes: Any) -> ImageConfig:
    return load_config(
        "tiny", ["image.channels=3", *(f"image.{name}={value}" for name, value in changes.items())]
    ).image


def test_what_was_found_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "ul_train")
    source = folder(tmp_path / "in", range(19))
    Image.new("RGBA", (SIZE, SIZE), (200, 200, 200, 99)).save(source / "alpha.png")
    (source / "bad.png").write_bytes(b"")
    splits = open_splits(image_config(size=SIZE), str(source), None, tmp_path / "cache")
    counts = f"{len(splits.train)} training and {len(splits.heldout)} held-out images of 8 px, no classes"
    assert caplog.messages == [
        f"{counts}, from {source}",
        "rejected: 1: bad.png: zero bytes",
        "converted: 1 transparency",
    ]


def test_a_set_of_an_earlier_format_is_prepared_again_and_it_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ul_train")
    source = folder(tmp_path / "in", range(20))
    sources = find_sources(str(source), None, True)
    older = tmp_path / "cache" / prepare._key(Conversion(SIZE, 3), sources, SCHEMA - 1)
    older.mkdir(parents=True)
    first = opened(source, tmp_path)
    assert len(first.train) + len(first.heldout) == 20
    lines = [message for message in caplog.messages if "prepared by an earlier version" in message]
    assert len(lines) == 1
    assert str(older) in lines[0]
    assert older.exists()
    assert opened(source, tmp_path).train.fingerprint == first.train.fingerprint
    assert len([message for message in caplog.messages if "prepared by an earlier version" in message]) == 1


# what is rejected


def test_too_many_rejected_images_are_an_error_that_names_three_and_the_list(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", range(5))
    for value in range(6):
        (source / f"bad{value}.png").write_bytes(b"nothing")
    with pytest.raises(BadInputError) as error:
        opened(source, tmp_path)
    message = str(error.value)
    assert "6 of 11 images are unusable, at most 50.0% may be" in message
    assert message.count("not an image of a known format") == 3
    listed = Path(next(word for word in message.split() if word.endswith("index.json;"))[:-1])
    assert [entry["path"] for entry in json.loads(listed.read_text())["train"]["rejected"]] == [
        f"bad{value}.png" for value in range(6)
    ]
    splits = opened(source, tmp_path, max_rejected_share=0.6)
    assert splits.index.train.num_rejected == 6
    assert prepared(splits, tmp_path) == listed.parent


def test_the_list_of_rejected_images_is_bounded_but_all_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ul_train.data.write.MAX_LISTED", 3)
    source = folder(tmp_path / "in", range(20))
    for value in range(6):
        (source / f"bad{value}.png").write_bytes(b"")
    train = opened(source, tmp_path).index.train
    assert train.num_rejected == 6
    assert len(train.rejected) == 3


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_usable_images_are_an_error(tmp_path: Path, count: int) -> None:
    source = folder(tmp_path / "in", range(count))
    (source / "bad.png").write_bytes(b"")
    with pytest.raises(BadInputError, match=f"{count} usable images?, at least 2 expected; 1 rejected: bad.png: zero"):
        opened(source, tmp_path)


def test_only_images_smaller_than_the_model_are_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", range(5))
    with pytest.raises(
        BadInputError, match=r'all 5 images are smaller.*8x8, model 16x16.*image\.size.*image\.fit="pad"'
    ):
        opened(source, tmp_path, size=16)
    assert len(opened(source, tmp_path, size=16, fit="pad").train) > 0


def test_converted_images_are_counted_by_reason(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", range(10))
    for number in range(3):
        Image.new("RGBA", (SIZE, SIZE), (number, 0, 0, 9)).save(source / f"alpha{number}.png")
    stream = io.BytesIO()
    Image.new("CMYK", (SIZE, SIZE)).save(stream, "JPEG")
    (source / "cmyk.jpg").write_bytes(stream.getvalue())
    assert opened(source, tmp_path).index.train.converted == {"transparency": 3, "cmyk": 1}


def test_images_of_an_unlabelled_training_set_hold_out_without_labels(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", range(4))
    folder(tmp_path / "other" / "a", [9])
    folder(tmp_path / "other" / "b", [10])
    splits = opened(source, tmp_path, heldout=tmp_path / "other")
    assert splits.heldout.labels.tolist() == [-1, -1]
    with pytest.raises(BadInputError, match="no class"):
        opened(tmp_path / "other", tmp_path, heldout=source)


@pytest.mark.parametrize("setting", ["size=0", "channels=4", "labels=some", "max_rejected_share=2", "fit=x"])
def test_impossible_options_are_usage_errors(setting: str) -> None:
    with pytest.raises(UsageError, match=f"image.{setting.partition('=')[0]} = "):
        load_config("tiny", [f"image.{setting}"])


def test_a_background_that_is_no_colour_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"image\.background='x': a colour is expected"):
        opened(folder(tmp_path / "in", range(3)), tmp_path, background="x")


@pytest.mark.case("R22")
def test_a_source_that_uses_little_of_its_range_has_a_note(tmp_path: Path) -> None:
    for top, expected in ((4095, 1), (65535, 0)):
        source = tmp_path / str(top)
        source.mkdir()
        for number in range(4):
            values = np.linspace(number, top, SIZE * SIZE).reshape(SIZE, SIZE).astype(np.uint16)
            Image.fromarray(values).save(source / f"{number}.png")
        index = opened(source, tmp_path, channels=1).index
        assert index.train.converted == {"16-bit": 4}
        assert sum("all 4 images stay under 1/8 of the range" in note for note in index.notes) == expected
