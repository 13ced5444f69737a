"""Write a prepared set: one pass over its sources, every image converted once, in their order."""

import hashlib
import heapq
import io
import os
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np

from ul_runtime.errors import BadInputError
from ul_runtime.files import durable
from ul_runtime.images.convert import SMALLER, Conversion, convert
from ul_runtime.images.decode import ImageRejectedError, Rejected, quiet_decoders
from ul_runtime.images.find import class_name, first_three
from ul_runtime.images.pixels import nearly_black_note
from ul_runtime.manifest import MAX_NAME
from ul_runtime.progress import Tick
from ul_train.data.imageset import (
    IDS_NAMES,
    IMAGES_NAME,
    INDEX_NAME,
    LABELS_NAME,
    SCHEMA,
    Index,
    PartIndex,
    fingerprint,
)
from ul_train.data.records import LABEL_ALONE, Ignored, Record, Source
from ul_train.data.sources import Sources

MAX_LISTED = 10_000  # rejected images
HELDOUT_SHARE = 0.05
MAX_HELDOUT = 1000
TOO_SMALL_ADVICE = '--set image.size=N with N at most their shorter side, or --set image.fit="pad"'
_CAPTIONS = "if the labels are captions or numbers of images, train without classes: --set image.labels=false"
_THREADS = min(4, max(2, os.cpu_count() or 2))
_Converted: TypeAlias = tuple[Record, np.ndarray, tuple[str, ...]]  # pixels uint8 c h w, and what was changed


class Classes:
    """Class names while they are found, in one spelling; numbers are provisional until `final`.

    BadInputError, here and by `number`: a name that no bundle can hold, or the same one twice.
    """

    def __init__(self, where: str, fixed: tuple[str, ...] | None) -> None:
        self._where = where
        self._fixed = None if fixed is None else tuple(self._spelled(name) for name in fixed)
        self._numbers = {name: number for number, name in enumerate(self._fixed or ())}
        if len(self._numbers) < len(self._fixed or ()):
            raise BadInputError(f"{where}: two of the class names are the same in Unicode's form NFC; rename one")
        self._labelled: bool | None = True if fixed else None
        self.closed = fixed is not None  # no new class from here on
        self.offered: set[str] = set()  # by images, whether they can be read or not

    def offer(self, label: str | None) -> None:
        """Before an image is read: its label, of which more than a few need not come to be a class."""
        if label is not None and not self.closed:
            self.offered.add(self._spelled(label))

    def _spelled(self, label: str) -> str:
        name = class_name(label)
        if not 0 < len(name) <= MAX_NAME:
            found = f"a class name of {len(name)} characters ({name[:40]!r}...), 1 to {MAX_NAME} are expected"
            raise BadInputError(f"{self._where}: {found}; {_CAPTIONS}")
        return name

    def number(self, label: str | None) -> int:
        """Provisional number; -1 without classes. ImageRejectedError if the first image decided otherwise."""
        if self._labelled is None:
            self._labelled = label is not None
        if not self._labelled:
            if label is not None and not self.closed:
                raise ImageRejectedError("has a class", "the images before it have none")
            return -1
        if label is None:
            raise ImageRejectedError("no class", "other images have one")
        name = self._spelled(label)
        if name not in self._numbers:
            if self.closed:
                raise ImageRejectedError("a class that the training images do not have", name)
            self._numbers[name] = len(self._numbers)
        return self._numbers[name]

    def final(self) -> tuple[tuple[str, ...], np.ndarray]:
        """Names in final order (given, else sorted; numbers by value) and final number of each provisional one."""
        names = order = list(self._numbers)
        if self._fixed is None:
            numeric = all(name.isdecimal() and name.isascii() for name in names)
            order = sorted(names, key=(lambda name: (int(name), name)) if numeric else None)
        number_of = {name: number for number, name in enumerate(order)}
        return tuple(order), np.array([number_of[name] for name in names], dtype=np.int64)


def _reject(part: PartIndex, image: Rejected) -> None:
    part.num_rejected += 1
    part.reasons[image.reason] = part.reasons.get(image.reason, 0) + 1
    if len(part.rejected) < MAX_LISTED:
        part.rejected.append(image)


def _check_count(part: PartIndex, where: str, expected: int) -> None:
    """BadInputError when too few images are usable to go on at all."""
    count, rejected = part.num_images, part.num_rejected
    if count >= expected:
        return
    if count == 0 and rejected and part.reasons.get(SMALLER) == rejected:
        first = part.rejected[0]
        raise BadInputError(f"{where}: all {rejected} images are {SMALLER} (first: {first}); {TOO_SMALL_ADVICE}")
    found = f"{count} usable image{'s' * (count != 1)}, at least {expected} expected"
    examples = f"; {rejected} rejected: {first_three(part.rejected)}" if rejected else ""
    raise BadInputError(f"{where}: {found}{examples}")


def _check_labels(part: PartIndex, where: str, classes: Classes) -> None:
    """BadInputError when labels are there, but none of them belongs to an image."""
    alone = part.reasons.get(LABEL_ALONE, 0)
    if alone and not classes.offered:
        first = next(each.path for each in part.rejected if each.reason == LABEL_ALONE)
        raise BadInputError(
            f"{where}: {alone} labels have no image (first: {first}) and no image has a label: a label belongs to the "
            "image of the same name up to the first dot; rename, or train without classes: --set image.labels=false"
        )


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


def write_set(folder: Path, key: str, to: Conversion, sources: Sources, tick: Tick) -> Index:
    """Fill `folder` with the files of the set; returns what index.json says. OSError, BadInputError, StoppedError."""
    train, given = sources.train, [source for source in (sources.train, sources.heldout) if source is not None]
    parts = [PartIndex.empty(source.ignored or {}) for source in given]
    classes = Classes(train.where, train.class_names)
    names, labels, ranks = _write_images(folder / IMAGES_NAME, given, parts, classes, to, tick)
    dark = [nearly_black_note(part.converted, part.num_images) for part in parts]
    if sources.heldout is None:
        ids = split_by_rank(ranks)
        parts.append(PartIndex.empty({}))
    else:
        ids = np.arange(parts[0].num_images), np.arange(parts[0].num_images, len(labels))
    for part, rows in zip(parts, ids, strict=True):
        part.num_images = len(rows)
        part.fingerprint = fingerprint(folder / IMAGES_NAME, rows, labels[rows], names, tick)
        if names:
            counts = np.bincount(labels[rows], minlength=len(names)).tolist()
            part.class_counts = dict(zip(names, counts, strict=True))
    for name, values in zip((LABELS_NAME, *IDS_NAMES), (labels, *ids), strict=True):
        np.save(folder / name, values)
    index = Index(
        format="unified-latents-images",
        schema_number=SCHEMA,
        key=key,
        source=train.where,
        heldout_source=sources.heldout.where if sources.heldout else f"{train.where} (held out by name)",
        channels=to.channels,
        size=to.size,
        background=train.background or to.background,
        fit=to.fit,
        class_names=list(names),
        notes=[
            *_notes(train.where, parts[0], classes.offered | set(train.folders)),
            *(f"{source.where}: {note}" for source, note in zip(given, dark, strict=True) if note),
        ],
        train=parts[0],
        heldout=parts[1],
    )
    durable.write_file(folder / INDEX_NAME, [index.model_dump_json(indent=1).encode()])
    return index


def _write_images(
    path: Path, given: Sequence[Source], parts: Sequence[PartIndex], classes: Classes, to: Conversion, tick: Tick
) -> tuple[tuple[str, ...], np.ndarray, array]:
    """Every usable image of the sources, counted in `parts`; -> class names, labels int64 n and ranks of the names."""
    provisional, ranks = array("q"), array("Q")
    with open(path, "xb", buffering=1 << 20) as file:
        file.write(_header(0, to))
        for source, part in zip(given, parts, strict=True):
            for outcome in _converted(source, _counted(source, part, classes), to):
                tick(1)
                if isinstance(outcome, Rejected):
                    _reject(part, outcome)
                    continue
                record, pixels, changes = outcome
                try:
                    label = classes.number(record.label)
                except ImageRejectedError as problem:
                    _reject(part, problem.at(record.name))
                    continue
                part.num_images += 1
                for change in changes:
                    part.converted[change] = part.converted.get(change, 0) + 1
                file.write(pixels.tobytes())
                provisional.append(label)
                ranks.append(rank(record.name))
            _check_count(part, source.where, 2 if len(given) == 1 else 1)
            _check_labels(part, source.where, classes)
            classes.closed = True  # after the training images
        file.seek(0)
        file.write(_header(len(ranks), to))
    names, final = classes.final()
    labels = np.array(provisional, np.int64)
    return names, final[labels] if names else labels, ranks


def _header(count: int, to: Conversion) -> bytes:
    """Of images.npy; as long for any number of images, so it can be completed at the end."""
    header = io.BytesIO()
    shape = (count, to.channels, to.size, to.size)
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return header.getvalue()


def _notes(where: str, part: PartIndex, offered: set[str]) -> list[str]:
    """What is odd about classes; `offered` are those of any image or folder."""
    notes, names = [], list(part.class_counts)
    if len(names) == 1:
        notes.append(f"{where}: one class only ({names[0]}); every image has the same label")
    if empty := [name for name, count in part.class_counts.items() if count == 0]:
        notes.append(f"{where}: no training image of {len(empty)} of {len(names)} classes ({_shown(empty)})")
    if names and (absent := sorted(offered - set(names))):
        notes.append(f"{where}: no usable image of {len(absent)} more, which are no classes then ({_shown(absent)})")
    twins = Counter(name.casefold() for name in names)
    if alike := [name for name in names if twins[name.casefold()] > 1]:
        notes.append(f"{where}: classes that differ only by capitals ({_shown(alike)}); rename one to join them")
    if len(names) > max(20, part.num_images / 2):
        notes.append(f"{where}: {len(names)} classes of {part.num_images} images; {_CAPTIONS}")
    return notes


def _shown(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _counted(source: Source, part: PartIndex, classes: Classes) -> Iterator[Record | Rejected]:
    """The records of a source; what is no image is counted, and every label is known to `classes`."""
    for record in source.records():
        if isinstance(record, Ignored):
            part.ignored[record.kind] = part.ignored.get(record.kind, 0) + 1
            continue
        if isinstance(record, Record):
            classes.offer(record.label)
        yield record


def _converted(source: Source, records: Iterator[Record | Rejected], to: Conversion) -> Iterator[_Converted | Rejected]:
    """Decode in a few threads, at most two images a thread ahead, results in order."""
    to = replace(to, background=source.background or to.background, enlarge=source.enlarge)
    waiting: deque[Future[_Converted | Rejected]] = deque()
    with quiet_decoders(), ThreadPoolExecutor(_THREADS, "decode") as pool:
        for record in records:
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
