"""The files of a prepared set while they are written: rows of pixels, labels in order of appearance, hashes."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from ul_runtime.errors import OutputError
from ul_runtime.image_conversion import ImageRejectedError, Rejected
from ul_train.data.imageset import PartIndex, RejectedEntry, images_path, labels_path

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
