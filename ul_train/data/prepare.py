"""One pass over a source: every image converted once and written, in the source's order, to a prepared set."""

import fcntl
import hashlib
import heapq
import json
import math
import os
import shutil
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

import numpy as np

from ul_runtime import durable
from ul_runtime.errors import BadInputError, OutputError, StoppedError, UsageError
from ul_runtime.images import SMALLER, Conversion, ImageRejectedError, Rejected, convert
from ul_runtime.progress import print_line, progress
from ul_train.config import ImageConfig
from ul_train.data.imageset import (
    INDEX_NAME,
    SCHEMA,
    Index,
    PartIndex,
    RejectedEntry,
    Splits,
    images_path,
    labels_path,
    load,
    read_index,
)
from ul_train.data.records import Record, Source
from ul_train.data.sources import recognise

MAX_LISTED = 10_000
_CHUNK_ROWS = 1 << 16


class Classes:
    """Class names while they are found; numbers are provisional until `final`."""

    def __init__(self, fixed: tuple[str, ...] | None) -> None:
        self._fixed = fixed
        self._numbers = {name: number for number, name in enumerate(fixed or ())}
        self._labelled: bool | None = True if fixed else None
        self._closed = fixed is not None

    def close(self) -> None:
        """After the training images: no new class from here on."""
        self._closed = True

    def number(self, label: str | None) -> int:
        """Provisional number; -1 without classes. ImageRejectedError if the first image decided otherwise."""
        if self._labelled is None:
            self._labelled = label is not None
        if not self._labelled:
            if label is not None and not self._closed:
                raise ImageRejectedError("has a class", "the images before it have none")
            return -1
        if label is None:
            raise ImageRejectedError("no class", "other images have one")
        if label not in self._numbers:
            if self._closed:
                raise ImageRejectedError("a class that the training images do not have", label)
            self._numbers[label] = len(self._numbers)
        return self._numbers[label]

    def final(self) -> tuple[tuple[str, ...], np.ndarray]:
        """Names in final order (given, else sorted; numbers by value) and final number of each provisional one."""
        names = list(self._numbers)
        if self._fixed is None and all(name.isdecimal() and name.isascii() for name in names):
            order = sorted(names, key=lambda name: (int(name), name))
        else:
            order = names if self._fixed is not None else sorted(names)
        rank = {name: number for number, name in enumerate(order)}
        return tuple(order), np.array([rank[name] for name in names], dtype=np.int64)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """A failed write names the cache folder and says what to do."""
    try:
        yield
    except OSError as error:
        message = f"{folder}: cannot write the prepared images: {error.strerror or error}"
        raise OutputError(f"{message}; free space or choose another cache folder") from error


class Rows:
    """Image and label files of one part, appended to in order."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self.images = images_path(folder, name)
        self.labels = labels_path(folder, name)
        self.count = 0
        self._digest = hashlib.sha256()
        with writing(folder), ExitStack() as on_failure:
            self._image_file = on_failure.enter_context(open(self.images, "xb", buffering=1 << 20))
            self._label_file = open(self.labels, "xb", buffering=1 << 16)  # noqa: SIM115 (closed in `close`)
            on_failure.pop_all()

    def append(self, pixels: np.ndarray, label: int) -> None:
        """One image uint8 c h w with its provisional class number. OutputError."""
        data = pixels.tobytes()
        self._digest.update(data)
        with writing(self._folder):
            self._image_file.write(data)
            self._label_file.write(label.to_bytes(8, "little", signed=True))
        self.count += 1

    def read(self, index: int, shape: tuple[int, ...]) -> tuple[np.ndarray, int]:
        """Image and provisional label of a row appended before. OutputError."""
        with writing(self._folder):
            self._image_file.flush()
            self._label_file.flush()
            size = math.prod(shape)
            pixels = np.fromfile(self.images, np.uint8, size, offset=index * size).reshape(shape)
            return pixels, int(np.fromfile(self.labels, "<i8", 1, offset=index * 8)[0])

    def close(self) -> None:
        """Close both files. OutputError."""
        with writing(self._folder):
            self._image_file.close()
            self._label_file.close()

    def finish(self, names: tuple[str, ...], final: np.ndarray) -> tuple[str, dict[str, int]]:
        """Give the labels their final numbers; -> fingerprint, images per class."""
        counts = np.zeros(len(names), dtype=np.int64)
        digest = hashlib.sha256()
        with writing(self._folder), open(self.labels, "r+b") as file:
            for start in range(0, self.count, _CHUNK_ROWS):
                file.seek(start * 8)
                labels = np.frombuffer(file.read(_CHUNK_ROWS * 8), "<i8")
                if names:
                    labels = final[labels].astype("<i8")
                    counts += np.bincount(labels, minlength=len(names))
                file.seek(start * 8)
                file.write(labels.tobytes())
                digest.update(labels.tobytes())
        facts = [self._digest.hexdigest(), digest.hexdigest(), names]
        fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        return fingerprint, {name: int(count) for name, count in zip(names, counts, strict=True)}

    def rename(self, name: str) -> None:
        """Give the files of this part another free name."""
        with writing(self._folder):
            self.images = self.images.rename(images_path(self._folder, name))
            self.labels = self.labels.rename(labels_path(self._folder, name))

    def remove(self) -> None:
        """Close and delete both files."""
        self.close()
        self.images.unlink()
        self.labels.unlink()


class Tally:
    """What happened to the images of one source."""

    def __init__(self) -> None:
        self.rejected: list[Rejected] = []
        self.reasons: Counter[str] = Counter()
        self.converted: Counter[str] = Counter()

    def reject(self, image: Rejected) -> None:
        """Count an image that was set aside, and list it while the list is short."""
        self.reasons[image.reason] += 1
        if len(self.rejected) < MAX_LISTED:
            self.rejected.append(image)

    def part(self, rows: Rows, names: tuple[str, ...], final: np.ndarray, ignored: dict[str, int]) -> PartIndex:
        """The part's entry of index.json; finishes the rows."""
        fingerprint, class_counts = rows.finish(names, final)
        return PartIndex(
            num_images=rows.count,
            fingerprint=fingerprint,
            class_counts=class_counts,
            num_rejected=self.reasons.total(),
            reasons=dict(self.reasons),
            rejected=[RejectedEntry(path=r.path, reason=r.reason, detail=r.detail) for r in self.rejected],
            converted=dict(self.converted),
            ignored=ignored,
        )


SHARE = 0.05
MAX_HELDOUT = 1000


def rank(name: str) -> int:
    """Uniform in 0..2^64-1, a function of the name alone."""
    return int.from_bytes(hashlib.sha256(b"heldout\0" + name.encode()).digest()[:8], "big")


def in_share(value: int) -> bool:
    """Whether a rank lies in the held-out share."""
    return value < int(SHARE * 2**64)


class SplitRows:
    """Writes train and heldout: about `SHARE` of the images is held out, at most `MAX_HELDOUT`, at least one.

    Below the maximum an image's side depends on its name alone, so images added later move none; above it,
    they can only return held-out images to training. Holds `MAX_HELDOUT` numbers in memory, no images.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...]) -> None:
        self._folder, self._shape = folder, shape
        self._train = Rows(folder, "train")
        self._candidates = Rows(folder, "candidates")
        self._kept: list[tuple[int, int]] = []  # heap of (-rank, row of candidates): the highest rank first
        self._least = (2**64, -1)  # lowest rank outside the share and its row of train

    @property
    def count(self) -> int:
        """Images appended so far."""
        return self._train.count + len(self._kept)

    def append(self, name: str, pixels: np.ndarray, label: int) -> None:
        """One image uint8 c h w with its provisional class number. OutputError."""
        value = rank(name)
        if in_share(value):
            heapq.heappush(self._kept, (-value, self._candidates.count))
            self._candidates.append(pixels, label)
        else:
            self._least = min(self._least, (value, self._train.count))
            self._train.append(pixels, label)
        if len(self._kept) > MAX_HELDOUT:
            self._return_one()

    def _return_one(self) -> None:
        _, row = heapq.heappop(self._kept)
        self._train.append(*self._candidates.read(row, self._shape))

    def finish(self) -> tuple[Rows, Rows]:
        """-> training and held-out rows; at least two images must have been appended. OutputError."""
        if self._train.count == 0:
            self._return_one()
        heldout = Rows(self._folder, "heldout")
        for row in sorted(row for _, row in self._kept):
            heldout.append(*self._candidates.read(row, self._shape))
        self._candidates.remove()
        if heldout.count == 0:  # then there are few images: none of them is in the share
            self._move_least(heldout)
        return self._train, heldout

    def _move_least(self, heldout: Rows) -> None:
        rest = Rows(self._folder, "rest")
        for row in range(self._train.count):
            to = heldout if row == self._least[1] else rest
            to.append(*self._train.read(row, self._shape))
        self._train.remove()
        rest.rename("train")
        self._train = rest


Progress = Callable[[int, int | None], None]
_THREADS = min(4, max(2, os.cpu_count() or 2))
_PROGRESS_SECONDS = 0.1
_TOO_SMALL = '--set image.size=N with N at most their shorter side, or --set image.fit="pad"'
_Outcome = tuple[np.ndarray, tuple[str, ...]] | Rejected


def open_data(
    source: str,
    *,
    size: int,
    channels: int,
    cache_dir: Path,
    background: str = "white",
    fit: Literal["crop", "pad"] = "crop",
    heldout_source: str | None = None,
    classes: Literal["auto", "none"] = "auto",
    max_rejected_share: float = 0.5,
    progress: Progress | None = None,
) -> Splits:
    """Images of `source` as uint8 channels size size, prepared in `cache_dir` on the first call, mapped after.

    `progress(done, total or None)` is called about ten times a second while preparing.
    BadInputError: nothing to train on, more than `max_rejected_share` (0 to 1) set aside, a damaged source.
    UsageError: impossible values. OutputError: `cache_dir` cannot be written.
    """
    to = Conversion(size, channels, background, fit)
    if not 0 <= max_rejected_share <= 1:
        raise UsageError(f"image.max_rejected_share={max_rejected_share}: 0 to 1 is expected")
    train, heldout, notes = _parts(source, heldout_source, classes)
    key = _key(to, train, heldout)
    folder = cache_dir / key
    index = read_index(folder, key) if folder.exists() else None
    if not isinstance(index, Index):
        if index is not None:
            notes = (*notes, f"{folder}: the prepared images were damaged ({index}) and were prepared again")
        index = _build(folder, key, to, train, heldout, progress)
    _check_rejected(folder, index, train, heldout, max_rejected_share)
    return load(folder, index, source, notes)


def _parts(
    source: str, heldout_source: str | None, classes: Literal["auto", "none"]
) -> tuple[Source, Source | None, tuple[str, ...]]:
    if classes not in ("auto", "none"):
        raise UsageError(f"classes={classes!r}: 'auto' or 'none' is expected")
    train, heldout = recognise(source, classes)
    notes: tuple[str, ...] = ()
    if heldout_source is not None:
        if heldout is not None:
            notes = (f"{source}: its own held-out images are not used; {heldout_source} is",)
        heldout, second = recognise(heldout_source, classes)
        if second is not None:
            raise UsageError(f"{heldout_source}: has splits of its own; name the one to hold out")
    if heldout is not None and heldout.identity == train.identity:
        raise UsageError(f"{heldout_source}: is the training set; name other images to hold out")
    return train, heldout, notes


def _key(to: Conversion, train: Source, heldout: Source | None) -> str:
    facts = {
        "schema": SCHEMA,
        "conversion": [to.size, to.channels, to.background, to.fit],
        "train": train.identity,
        "heldout": heldout.identity if heldout else None,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _build(
    folder: Path, key: str, to: Conversion, train: Source, heldout: Source | None, progress: Progress | None
) -> Index:
    """Prepare the set beside `folder` and give it its name; whoever is first wins, both get a whole set."""
    with ExitStack() as at_end:
        with _sweeping_alone(folder.parent):
            with suppress(OutputError):  # another attempt's folder may go away under the sweep
                durable.sweep(folder.parent, folder.name)
            temporary = at_end.enter_context(durable.temporary_directory_beside(folder))
        _check_space(temporary, to, train, heldout)
        index = _write(temporary, key, to, train, heldout, progress)
        try:
            if folder.exists() and not isinstance(read_index(folder, key), Index):
                durable.replace_directory(temporary, folder)
            else:
                durable.commit_directory(temporary, folder)
        except (UsageError, OutputError):
            theirs = read_index(folder, key)
            if not isinstance(theirs, Index):
                raise
            return theirs
    return index


@contextmanager
def _sweeping_alone(cache_dir: Path) -> Iterator[None]:
    """Wait for the other processes in this block: a new temporary folder is swept by none before it is locked."""
    durable.make_directory(cache_dir)
    fd = os.open(cache_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _check_space(temporary: Path, to: Conversion, train: Source, heldout: Source | None) -> None:
    count = (train.num_records or 0) + (heldout.num_records or 0 if heldout else 0)
    needed = count * (to.channels * to.size * to.size + 8)
    free = shutil.disk_usage(temporary).free
    if needed > free:
        raise OutputError(
            f"{temporary.parent}: {count:,} prepared images take {needed / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free; free space or choose another cache folder"
        )


def _write(
    folder: Path, key: str, to: Conversion, train: Source, heldout: Source | None, progress: Progress | None
) -> Index:
    classes = Classes(train.class_names)
    report = _Report(progress, train, heldout)
    tally, heldout_tally = Tally(), Tally()
    if heldout is None:
        rows, heldout_rows = _write_split(folder, to, train, classes, tally, report)
    else:
        rows = _write_part(folder, "train", to, train, classes, tally, report)
        classes.close()
        heldout_rows = _write_part(folder, "heldout", to, heldout, classes, heldout_tally, report)
    report.end()
    rows.close()
    heldout_rows.close()
    names, final = classes.final()
    train_part = tally.part(rows, names, final, dict(train.ignored))
    index = Index(
        format="unified-latents-images",
        schema_number=SCHEMA,
        key=key,
        source=train.where,
        heldout_source=heldout.where if heldout else f"{train.where} (held out by name)",
        channels=to.channels,
        size=to.size,
        background=train.background or to.background,
        fit=to.fit,
        class_names=list(names),
        notes=_notes(train, heldout, train_part),
        train=train_part,
        heldout=heldout_tally.part(heldout_rows, names, final, dict(heldout.ignored) if heldout else {}),
    )
    durable.write_file(folder / INDEX_NAME, [index.model_dump_json(indent=1).encode()])
    return index


def _write_part(
    folder: Path, name: str, to: Conversion, source: Source, classes: Classes, tally: Tally, report: "_Report"
) -> Rows:
    rows = Rows(folder, name)
    for _, pixels, label in _accepted(source, to, classes, tally, report):
        rows.append(pixels, label)
    _check_count(source, tally, rows.count, 1)
    return rows


def _write_split(
    folder: Path, to: Conversion, source: Source, classes: Classes, tally: Tally, report: "_Report"
) -> tuple[Rows, Rows]:
    split = SplitRows(folder, (to.channels, to.size, to.size))
    for name, pixels, label in _accepted(source, to, classes, tally, report):
        split.append(name, pixels, label)
    _check_count(source, tally, split.count, 2)
    return split.finish()


def _notes(train: Source, heldout: Source | None, part: PartIndex) -> list[str]:
    notes = [*train.notes, *(heldout.notes if heldout else ())]
    names = list(part.class_counts)
    if len(names) == 1:
        notes.append(f"{train.where}: one class only ({names[0]}); every image has the same label")
    empty = [name for name, count in part.class_counts.items() if count == 0]
    if empty:
        shown = ", ".join(empty[:3]) + (", ..." if len(empty) > 3 else "")
        notes.append(f"{train.where}: no training image of {len(empty)} of {len(names)} classes ({shown})")
    return notes


class _Report:
    """Passes the number of images done to the caller's progress display."""

    def __init__(self, progress: Progress | None, train: Source, heldout: Source | None) -> None:
        counts = [train.num_records] + ([heldout.num_records] if heldout else [])
        self._total = None if None in counts else sum(count or 0 for count in counts)
        self._progress, self._done, self._last = progress, 0, 0.0

    def add(self) -> None:
        """One more image."""
        self._done += 1
        now = time.monotonic()
        if self._progress is not None and now - self._last >= _PROGRESS_SECONDS:
            self._last = now
            self._progress(self._done, self._total)

    def end(self) -> None:
        """All images are done."""
        if self._progress is not None:
            self._progress(self._done, self._total)


def _accepted(
    source: Source, to: Conversion, classes: Classes, tally: Tally, report: _Report
) -> Iterator[tuple[str, np.ndarray, int]]:
    """Name, pixels and provisional class of every usable image, in the source's order; counts the others."""
    to = replace(to, background=source.background or to.background, enlarge=source.enlarge)
    for record, outcome in _converted(source, to):
        report.add()
        if isinstance(record, Rejected) or isinstance(outcome, Rejected):
            tally.reject(record if isinstance(record, Rejected) else cast(Rejected, outcome))
            continue
        pixels, changes = outcome
        try:
            label = classes.number(record.label)
        except ImageRejectedError as problem:
            tally.reject(problem.at(record.name))
            continue
        tally.converted.update(changes)
        yield record.name, pixels, label


def _converted(source: Source, to: Conversion) -> Iterator[tuple[Record | Rejected, _Outcome]]:
    """Decode in a few threads, at most two images a thread ahead, results in order."""
    waiting: deque[tuple[Record | Rejected, Future[_Outcome] | Rejected]] = deque()
    with warnings.catch_warnings(), ThreadPoolExecutor(_THREADS, "decode") as pool:
        warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters of it is counted
        for record in source.records():
            task = record if isinstance(record, Rejected) else pool.submit(_convert, record, to)
            waiting.append((record, task))
            if len(waiting) > 2 * _THREADS:
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())


def _convert(record: Record, to: Conversion) -> _Outcome:
    try:
        return convert(record.image, to)
    except ImageRejectedError as problem:
        return problem.at(record.name)


def _result(
    entry: tuple[Record | Rejected, Future[_Outcome] | Rejected],
) -> tuple[Record | Rejected, _Outcome]:
    record, task = entry
    return record, task if isinstance(task, Rejected) else task.result()


def _check_count(source: Source, tally: Tally, count: int, expected: int) -> None:
    """BadInputError when too few images are usable to go on at all."""
    if count >= expected:
        return
    rejected = tally.reasons.total()
    if count == 0 and rejected and tally.reasons[SMALLER] == rejected:
        first = tally.rejected[0]
        raise BadInputError(f"{source.where}: all {rejected} images are {SMALLER} (first: {first}); {_TOO_SMALL}")
    found = f"{count} usable image{'s' * (count != 1)}, at least {expected} expected"
    raise BadInputError(f"{source.where}: {found}{_examples(tally.rejected, rejected)}")


def _examples(rejected: list[Rejected], count: int) -> str:
    if not rejected:
        return ""
    return f"; {count} set aside: " + "; ".join(map(str, rejected[:3])) + ("; ..." if count > 3 else "")


def _check_rejected(
    folder: Path, index: Index, train: Source, heldout: Source | None, max_rejected_share: float
) -> None:
    """BadInputError when too large a share of the images of a part was set aside."""
    for source, part in ((train, index.train), (heldout, index.heldout)):
        usable = part.num_images + (index.heldout.num_images if heldout is None else 0)
        if source is None or part.num_rejected <= max_rejected_share * (part.num_rejected + usable):
            continue
        rejected = [Rejected(entry.path, entry.reason, entry.detail) for entry in part.rejected]
        small = part.reasons.get(SMALLER, 0) > part.num_rejected / 2
        raise BadInputError(
            f"{source.where}: {part.num_rejected} of {part.num_rejected + usable} images are unusable, at most "
            f"{max_rejected_share:.1%} may be{_examples(rejected, part.num_rejected)}; all are listed in "
            f"{folder / INDEX_NAME}; {_TOO_SMALL if small else 'repair them'} "
            f"or raise --set image.max_rejected_share=SHARE"
        )


def open_splits(image: ImageConfig, data: str, heldout: str | None, cache: Path, stop: Callable[[], bool]) -> Splits:
    """The images, prepared or mapped; what was converted or set aside is said. StoppedError."""
    with ExitStack() as stack:
        advance: Callable[[float], None] | None = None
        shown = 0

        def show(done: int, total: int | None) -> None:
            nonlocal advance, shown
            if stop():
                raise StoppedError("stopped while preparing the images; run the same command again")
            if advance is None and total:
                advance = stack.enter_context(progress("preparing images", total, "images"))
            if advance is not None:
                advance(done - shown)
                shown = done

        splits = open_data(
            data,
            size=image.size,
            channels=image.channels,
            background=image.background,
            fit=image.fit,
            cache_dir=cache,
            heldout_source=heldout,
            classes="auto" if image.labels else "none",
            max_rejected_share=image.max_rejected_share,
            progress=show,
        )
    _describe(splits, image.size, data)
    return splits


def _describe(splits: Splits, size: int, data: str) -> None:
    train = splits.train
    classes = f"{len(train.class_names)} classes" if train.class_names else "no classes"
    print_line(f"{len(train)} training and {len(splits.heldout)} held-out images of {size} px, {classes}, from {data}")
    for note in train.notes:
        print_line(f"note: {note}")
    if train.num_rejected:
        first = "; ".join(str(rejected) for rejected in train.rejected[:3])
        print_line(f"set aside: {train.num_rejected}: {first}{'; ...' * (train.num_rejected > 3)}")
    if train.converted:
        print_line("converted: " + ", ".join(f"{count} {reason}" for reason, count in train.converted.items()))
