"""Write a prepared set: one pass over its sources, every image converted once, in their order."""

import hashlib
import heapq
import io
import json
import math
import os
import warnings
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np

from ul_runtime import durable
from ul_runtime.errors import BadInputError, OutputError
from ul_runtime.images import SMALLER, Conversion, ImageRejectedError, Rejected, convert
from ul_runtime.progress import Tick
from ul_train.data.imageset import IMAGES_NAME, INDEX_NAME, LABELS_NAME, SCHEMA, Index, PartIndex, ids_name
from ul_train.data.records import Record, Source
from ul_train.data.sources import Sources

MAX_LISTED = 10_000  # rejected images
HELDOUT_SHARE = 0.05
MAX_HELDOUT = 1000
TOO_SMALL_ADVICE = '--set image.size=N with N at most their shorter side, or --set image.fit="pad"'
_THREADS = min(4, max(2, os.cpu_count() or 2))
_Converted: TypeAlias = tuple[Record, np.ndarray, tuple[str, ...]]  # pixels uint8 c h w, and what was changed


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


class Tally:
    """What happened to the images of one source: `accepted`, `rejected` (the first) and the reasons of all."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.accepted = 0
        self.rejected: list[Rejected] = []
        self.reasons: Counter[str] = Counter()
        self.converted: Counter[str] = Counter()

    def accept(self, changes: Iterable[str]) -> None:
        """Count a usable image and what was changed in it."""
        self.accepted += 1
        self.converted.update(changes)

    def reject(self, image: Rejected) -> None:
        """Count an unusable image, and list it while the list is short."""
        self.reasons[image.reason] += 1
        if len(self.rejected) < MAX_LISTED:
            self.rejected.append(image)

    def check_count(self, expected: int) -> None:
        """BadInputError when too few images are usable to go on at all."""
        if self.accepted >= expected:
            return
        where, count, rejected = self.source.where, self.accepted, self.reasons.total()
        if count == 0 and rejected and self.reasons[SMALLER] == rejected:
            first = self.rejected[0]
            raise BadInputError(f"{where}: all {rejected} images are {SMALLER} (first: {first}); {TOO_SMALL_ADVICE}")
        found = f"{count} usable image{'s' * (count != 1)}, at least {expected} expected"
        raise BadInputError(f"{where}: {found}{examples(self.rejected, rejected)}")


def examples(rejected: Sequence[Rejected], count: int) -> str:
    """ "; 5 rejected: " and the first three of them; nothing without any."""
    if not rejected:
        return ""
    return f"; {count} rejected: " + "; ".join(map(str, rejected[:3])) + ("; ..." if count > 3 else "")


def rank(name: str) -> int:
    """Uniform in 0..2^64-1, a function of the name alone."""
    return int.from_bytes(hashlib.sha256(b"heldout\0" + name.encode()).digest()[:8], "big")


def in_share(value: int) -> bool:
    """Whether a rank lies in the held-out share."""
    return value < int(HELDOUT_SHARE * 2**64)


def split_by_rank(ranks: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
    """Ids int64 of training and held-out images, of at least two: about `HELDOUT_SHARE` is held out, at most
    `MAX_HELDOUT`, at least one.

    Below the maximum an image's side depends on its name alone, so images added later move none; above it,
    they can only return held-out images to training, behind the images before them.
    """
    train = array("q")
    heldout: list[tuple[int, int]] = []  # heap of (-rank, id): the highest rank first
    least = (2**64, -1)
    for number, value in enumerate(ranks):
        least = min(least, (value, number))
        if in_share(value):
            heapq.heappush(heldout, (-value, number))
        else:
            train.append(number)
        if len(heldout) > MAX_HELDOUT:
            train.append(heapq.heappop(heldout)[1])
    if not train:
        train.append(heapq.heappop(heldout)[1])
    if not heldout:
        heldout.append(least)
        train.remove(least[1])
    return np.array(train, np.int64), np.array(sorted(number for _, number in heldout), np.int64)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """A failed write names the cache folder and says what to do."""
    try:
        yield
    except OSError as error:
        message = f"{folder}: cannot write the prepared images: {error.strerror or error}"
        raise OutputError(f"{message}; free space or choose another cache folder") from error


class _ImageFile:
    """images.npy while it grows. Its header, of the same length for any number of images, is completed at the end."""

    def __init__(self, folder: Path, to: Conversion) -> None:
        self._folder = folder
        self._shape = (to.channels, to.size, to.size)
        self._count = 0
        with _writing(folder):
            self._file = open(folder / IMAGES_NAME, "x+b", buffering=1 << 20)  # noqa: SIM115 (closed in `close`)
            self._file.write(self._header())

    def _header(self) -> bytes:
        header = io.BytesIO()
        facts = {"descr": "|u1", "fortran_order": False, "shape": (self._count, *self._shape)}
        np.lib.format.write_array_header_1_0(header, facts)
        return header.getvalue()

    def append(self, pixels: np.ndarray) -> None:
        """One image uint8 c h w. OutputError."""
        with _writing(self._folder):
            self._file.write(pixels.tobytes())
        self._count += 1

    def digest(self, ids: np.ndarray, tick: Tick) -> str:
        """SHA-256 over these images, in this order. OutputError, StoppedError."""
        digest, start, size = hashlib.sha256(), len(self._header()), math.prod(self._shape)
        for number in ids.tolist():
            with _writing(self._folder):
                self._file.seek(start + number * size)
                digest.update(self._file.read(size))
            tick(0)
        return digest.hexdigest()

    def close(self) -> None:
        """Write the final header. OutputError."""
        with _writing(self._folder), self._file:
            self._file.seek(0)
            self._file.write(self._header())


def write_set(folder: Path, key: str, to: Conversion, sources: Sources, tick: Tick) -> Index:
    """Fill `folder` with the files of the set; returns what index.json says."""
    train, heldout = Tally(sources.train), None if sources.heldout is None else Tally(sources.heldout)
    with closing(_ImageFile(folder, to)) as file:
        names, labels, ranks = _write_images(file, [train, heldout] if heldout else [train], to, tick)
        if heldout is None:
            ids = split_by_rank(ranks)
            heldout = Tally(replace(sources.train, where=f"{sources.train.where} (held out by name)", ignored={}))
        else:
            ids = np.arange(train.accepted), np.arange(train.accepted, len(labels))
        parts = [
            _part_index(tally, labels[rows], names, file.digest(rows, tick))
            for tally, rows in zip((train, heldout), ids, strict=True)
        ]
    with _writing(folder):
        for name, values in ((LABELS_NAME, labels), (ids_name("train"), ids[0]), (ids_name("heldout"), ids[1])):
            np.save(folder / name, values)
    index = Index(
        format="unified-latents-images",
        schema_number=SCHEMA,
        key=key,
        source=train.source.where,
        heldout_source=heldout.source.where,
        channels=to.channels,
        size=to.size,
        background=train.source.background or to.background,
        fit=to.fit,
        class_names=list(names),
        notes=_notes(sources, parts[0].class_counts),
        train=parts[0],
        heldout=parts[1],
    )
    durable.write_file(folder / INDEX_NAME, [index.model_dump_json(indent=1).encode()])
    return index


def _write_images(
    file: _ImageFile, tallies: Sequence[Tally], to: Conversion, tick: Tick
) -> tuple[tuple[str, ...], np.ndarray, array]:
    """Every usable image of the sources; -> class names, labels int64 n and ranks of the names."""
    classes, provisional, ranks = Classes(tallies[0].source.class_names), array("q"), array("Q")
    for tally in tallies:
        for name, pixels, label in _accepted(tally, to, classes, tick):
            file.append(pixels)
            provisional.append(label)
            ranks.append(rank(name))
        tally.check_count(2 if len(tallies) == 1 else 1)
        classes.close()
    names, final = classes.final()
    labels = np.array(provisional, np.int64)
    return names, final[labels] if names else labels, ranks


def _part_index(tally: Tally, labels: np.ndarray, names: tuple[str, ...], images_digest: str) -> PartIndex:
    facts = [images_digest, hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest(), names]
    counts = np.bincount(labels, minlength=len(names)).tolist() if names else []
    return PartIndex(
        num_images=len(labels),
        fingerprint=hashlib.sha256(json.dumps(facts).encode()).hexdigest(),
        class_counts=dict(zip(names, counts, strict=True)),
        num_rejected=tally.reasons.total(),
        reasons=dict(tally.reasons),
        rejected=tally.rejected,
        converted=dict(tally.converted),
        ignored=dict(tally.source.ignored),
    )


def _notes(sources: Sources, class_counts: dict[str, int]) -> list[str]:
    train, names = sources.train, list(class_counts)
    notes = [*train.notes, *(sources.heldout.notes if sources.heldout else ())]
    if len(names) == 1:
        notes.append(f"{train.where}: one class only ({names[0]}); every image has the same label")
    empty = [name for name, count in class_counts.items() if count == 0]
    if empty:
        shown = ", ".join(empty[:3]) + (", ..." if len(empty) > 3 else "")
        notes.append(f"{train.where}: no training image of {len(empty)} of {len(names)} classes ({shown})")
    return notes


def _accepted(tally: Tally, to: Conversion, classes: Classes, tick: Tick) -> Iterator[tuple[str, np.ndarray, int]]:
    """Name, pixels and provisional class of every usable image, in the source's order; counts the others."""
    source = tally.source
    to = replace(to, background=source.background or to.background, enlarge=source.enlarge)
    for outcome in _converted(source, to):
        tick(1)
        if isinstance(outcome, Rejected):
            tally.reject(outcome)
            continue
        record, pixels, changes = outcome
        try:
            label = classes.number(record.label)
        except ImageRejectedError as problem:
            tally.reject(problem.at(record.name))
            continue
        tally.accept(changes)
        yield record.name, pixels, label


def _converted(source: Source, to: Conversion) -> Iterator[_Converted | Rejected]:
    """Decode in a few threads, at most two images a thread ahead, results in order."""
    waiting: deque[Future[_Converted | Rejected]] = deque()
    with warnings.catch_warnings(), ThreadPoolExecutor(_THREADS, "decode") as pool:
        warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters of it is counted
        for record in source.records():
            waiting.append(pool.submit(_convert, record, to))
            if len(waiting) > 2 * _THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _convert(record: Record | Rejected, to: Conversion) -> _Converted | Rejected:
    if isinstance(record, Rejected):
        return record
    try:
        return record, *convert(record.image, to)
    except ImageRejectedError as problem:
        return problem.at(record.name)
