"""A folder of one job's images: resume, lock, write behind, contact sheet. For ul-generate and ul-decode."""

import json
import logging
import os
import re
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, Self, TypeAlias, TypeVar

import numpy as np

from ul_runtime.batches import Images
from ul_runtime.errors import BadInputError, NonFiniteError, OutputError, StoppedError, UsageError
from ul_runtime.files import durable
from ul_runtime.files.json_file import read_object
from ul_runtime.images.png import (
    CONTACT_SHEET,
    JOB_FILES,
    MOST_TILES,
    ImageInfo,
    Job,
    as_pil,
    contact_sheet,
    image_name,
    pixels_sha256,
    png_bytes,
    read_info,
    read_png,
)
from ul_runtime.pipeline import Pipeline
from ul_runtime.progress import Tick, progress, silent
from ul_runtime.settings import check_seed, no_label
from ul_runtime.signals import stop_on_signal

_LOG = logging.getLogger(__name__)
_FORMAT = "unified-latents-images"
_NAME = re.compile(r"\d{6}\.png|[1-9]\d{6,18}\.png")  # image_name
_MOST_BATCHES = 2  # made and not yet written
_MOST_WRITERS = 8  # threads
_MOST_INDICES = 2**14  # in memory: many whole batches

Item = TypeVar("Item")
SomeJob = TypeVar("SomeJob", bound=Job)
Batches: TypeAlias = Callable[[np.ndarray, Tick], Iterator[Images]]  # the images of these indices


class Background(Generic[Item]):
    """One other thread that does `work` for each item, in order; at most `most` items are unfinished.

    The first error of `work` is raised by the next `put` or `check`, or at the end of the block; no later item is
    worked on. However the block ends, what was put before is done first.
    """

    def __init__(self, work: Callable[[Item], None], most: int) -> None:
        self._work, self._most = work, most
        self._pending: deque[Future[None]] = deque()
        self._pool = ThreadPoolExecutor(max_workers=1)

    def _after(self, previous: Future[None] | None, item: Item) -> None:
        if previous is not None:
            previous.result()  # its error is this item's too
        self._work(item)

    def put(self, item: Item) -> None:
        """Hand an item over, as soon as fewer than `most` are unfinished."""
        while len(self._pending) >= self._most:
            self._pending.popleft().result()
        self.check()
        previous = self._pending[-1] if self._pending else None
        self._pending.append(self._pool.submit(self._after, previous, item))

    def check(self) -> None:
        """Raise the error of an item, if one has failed; does not wait."""
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            while self._pending:
                self._pending.popleft().result()
        finally:
            self._pool.shutdown()


class ImageFolder:
    """The open folder of one job; made by `open_image_folder`."""

    def __init__(self, path: Path, job: Job, bundle_name: str, num_images: int) -> None:
        self.path, self.job, self.bundle_name, self.num_images = path, job, bundle_name, num_images
        self.fingerprint = job.fingerprint
        self._place = path.stat()

    def _read(self, index: int) -> np.ndarray | None:
        """Image `index` as uint8 `h w c` if it is there, whole and of this job."""
        path = self.path / image_name(index)
        try:
            stored = read_png(path)
            info = read_info(stored.texts, str(path))
        except BadInputError:
            return None
        ours = (self.fingerprint, index, pixels_sha256(stored.pixels))
        return stored.pixels if (info.job.fingerprint, info.index, info.pixels) == ours else None

    def done(self) -> set[int]:
        """Indices of the images that are there, whole and of this job."""
        return {index for index in self._names() if self._read(index) is not None}

    def _names(self) -> Iterator[int]:
        """Indices of all names of images of this job that are there."""
        with os.scandir(self.path) as entries:
            for entry in entries:
                index = int(Path(entry.name).stem) if _NAME.fullmatch(entry.name) else self.num_images
                if index < self.num_images:
                    yield index

    def check_there(self, count: int) -> None:
        """OutputError unless so many images are there, and the job file: who says that a job is done has looked."""
        self._check_place()
        with durable.as_output_error(self.path):
            found = sum(1 for _ in self._names())
        job_file = self.path / JOB_FILES[self.job.command]
        if not job_file.is_file():  # or the folder would be one that this job does not know
            self._write_job(job_file)
        if found < count:
            message = f"{found} of {count} images are there, the others went while the job ran"
            raise OutputError(f"{self.path}: {message}; run the same command again to make them")

    def _check_place(self) -> None:
        """OutputError if the folder has given its name to another one, which nothing may be written into."""
        with durable.as_output_error(self.path):
            same = os.path.samestat(self.path.stat(), self._place)
        if not same:
            raise OutputError(f"{self.path}: another folder has this name since the job began; run it again")

    def write(self, index: int, image: np.ndarray, label: str, batch: int | None = None) -> None:
        """Put image `index` (uint8 `h w c`) in place, whole or not at all, with its info. OutputError."""
        self._check_place()
        info = ImageInfo(job=self.job, bundle_name=self.bundle_name, index=index, label=label, batch=batch)
        durable.atomic_write(self.path / image_name(index), png_bytes(as_pil(image), info))

    def write_contact_sheet(self, title: str, columns: Sequence[str] = (), captions: Sequence[str] = ()) -> Path | None:
        """The contact sheet of the first images that are there; None if there are none. OutputError."""
        found = [self._read(index) for index in range(min(self.num_images, MOST_TILES))]
        example = next((image for image in found if image is not None), None)
        if example is None:
            return None
        images = [np.full_like(example, 255) if image is None else image for image in found]
        info = ImageInfo(job=self.job, bundle_name=self.bundle_name)
        path = self.path / CONTACT_SHEET
        durable.atomic_write(path, png_bytes(contact_sheet(images, title, columns, captions), info))
        return path

    def begin(self, job_file: Path) -> None:
        """Write the job file, or check that the one there is of the same job. UsageError, BadInputError."""
        if job_file.exists():
            self._check_same(job_file, _read_job(job_file))
        elif next(self.path.glob("*.png"), None):
            raise UsageError(f"{self.path}: holds images but no {job_file.name}; choose an empty folder")
        self._write_job(job_file)

    def _write_job(self, job_file: Path) -> None:
        head = {"format": _FORMAT, "format_version": 1, "num_images": self.num_images}
        content = {**head, "fingerprint": self.fingerprint, "job": self.job.as_dict()}
        durable.atomic_write(job_file, (json.dumps(content, indent=2) + "\n").encode())

    def _check_same(self, job_file: Path, found: dict[str, Any]) -> None:
        job, count = found["job"], found["num_images"]
        wanted = self.job.as_dict()
        for key in sorted(set(job) | set(wanted)):
            if job.get(key) != wanted.get(key):
                was = f"{_option_of(key)} {job.get(key)}"
                message = f"{job_file}: the images here were made with {was}, now {wanted.get(key)}"
                raise UsageError(f"{message}; choose another folder, or the same settings to go on")
        if count > self.num_images:
            message = f"{job_file}: the folder holds a job of {count} images, now {self.num_images}"
            raise UsageError(f"{message}; ask for at least as many, or choose another folder")


def _option_of(key: str) -> str:
    """The option that a field of a job is given by."""
    words = key.removeprefix("prior_").replace("num_steps", "steps").replace("labels", "label")
    return key if key in ("bundle", "latents") else f"--{words.replace('_', '-')}"


def _read_job(job_file: Path) -> dict[str, Any]:
    try:
        found = read_object(job_file)
        if found["format"] == _FORMAT and isinstance(found["job"], dict) and isinstance(found["num_images"], int):
            return found
    except (ValueError, KeyError):
        pass
    raise BadInputError(f"{job_file}: is not a job file of this toolkit; choose another folder")


@contextmanager
def open_image_folder(path: Path, job: Job, bundle_name: str, num_images: int) -> Iterator[ImageFolder]:
    """The folder `path`, held for this process: new, empty, or filled by the same job before, or by less of it.

    UsageError: other things in it, or another job. OutputError: not writable.
    """
    job_name = JOB_FILES[job.command]
    durable.check_output_directory(path, [job_name, CONTACT_SHEET, "[0-9]" * 6 + "*.png"])
    with durable.lock_directory(path):
        folder = ImageFolder(path, job, bundle_name, num_images)
        folder.begin(path / job_name)
        durable.sweep(path)
        yield folder


def job_of(pipeline: Pipeline, kind: type[SomeJob], seed: int, **fields: Any) -> SomeJob:
    """The job of `kind` on this bundle and backend. UsageError: a seed that cannot be."""
    check_seed(seed)
    return kind(bundle=pipeline.hash, seed=seed, **fields, **pipeline.computed_by)


def fill(
    out: Path,
    job: Job,
    num_images: int,
    pipeline: Pipeline,
    batches: Batches,
    title: str,
    columns: Sequence[str] = (),
    captions: Sequence[str] = (),
) -> dict[str, Any]:
    """Make the images that `out` lacks, then the contact sheet; returns the command's result.

    Images are written while the next are made; an error of writing ends the work before the next step.
    StoppedError on a signal: what is written is whole. NonFiniteError after all other images are written.
    """
    if (channels := pipeline.manifest.image.channels) not in (1, 3, 4):
        raise BadInputError(f"{pipeline.path}: images have {channels} channels; PNG takes 1, 3 or 4")
    batches(np.zeros(0, np.int64), silent)  # refuses what cannot be before anything is written
    names = [*pipeline.manifest.classes, no_label(pipeline.manifest.classes)]
    with open_image_folder(out, job, pipeline.manifest.name, num_images) as folder:
        done, made, in_float32, failed = folder.done(), 0, [], None
        start = time.monotonic()
        try:
            with stop_on_signal():
                for batch in _make_missing(folder, done, batches, names):
                    made += len(batch.indices)
                    in_float32 += batch.indices[batch.in_float32].tolist()
        except NonFiniteError as error:
            failed = error
        except StoppedError:
            there = f"{len(done) + made} of {num_images} images are there"
            raise StoppedError(f"{out}: {there}; run the same command again to go on") from None
        seconds = time.monotonic() - start
        folder.check_there(len(done) + made)
        sheet = folder.write_contact_sheet(title, columns, captions)
    if failed:
        raise failed
    if in_float32:
        shown = ", ".join(map(str, in_float32[:10])) + (" ..." if len(in_float32) > 10 else "")
        what = f"not finite in {pipeline.backend.precision} and made again in float32: images {shown}"
        _LOG.info("%d of %d %s", len(in_float32), made, what)
    rate = round(made / seconds, 3) if made else None
    counts = {"num_images": num_images, "made": made, "seconds": round(seconds, 3), "images_per_s": rate}
    counts["made_again_in_float32"] = len(in_float32)
    where = {"out": str(out), "contact_sheet": str(sheet)}
    return where | counts | {"fingerprint": folder.fingerprint} | job.as_dict()


def _make_missing(folder: ImageFolder, done: set[int], batches: Batches, names: list[str]) -> Iterator[Images]:
    """Make and write the images that are not `done`; yields each batch when it is handed to the writer.

    `names` of the labels. NonFiniteError after all other images are written. StoppedError, OutputError.
    """
    failed = []
    pool = ThreadPoolExecutor(min(_MOST_WRITERS, len(os.sched_getaffinity(0))))
    writer: Background[Images] = Background(lambda batch: _write(folder, batch, names, pool), _MOST_BATCHES)
    what = folder.job.command.removeprefix("ul-")
    with progress(what, folder.num_images - len(done), "images") as show, pool, writer:

        def tick(amount: float) -> None:
            writer.check()
            show(amount)

        for missing in _missing(folder.num_images, done):
            try:
                for batch in batches(missing, tick):
                    writer.put(batch)
                    yield batch
            except NonFiniteError as error:
                failed.append(str(error))
    if failed:
        raise NonFiniteError("; ".join(failed))


def _missing(num_images: int, done: Collection[int]) -> Iterator[np.ndarray]:
    """Indices below num_images that are not done, int64, a bounded number at a time."""
    for first in range(0, num_images, _MOST_INDICES):
        indices = [index for index in range(first, min(first + _MOST_INDICES, num_images)) if index not in done]
        if indices:
            yield np.array(indices, np.int64)


def _write(folder: ImageFolder, batch: Images, names: list[str], pool: ThreadPoolExecutor) -> None:
    """Write all images of a batch, by several threads: a GPU makes more of them than one can compress."""
    images = zip(batch.indices.tolist(), batch.labels.tolist(), batch.images, strict=True)
    writes = [
        pool.submit(folder.write, index, image, names[label], batch.computed_as) for index, label, image in images
    ]
    try:
        for write in writes:
            write.result()
    finally:
        for write in writes:
            write.cancel()  # after an error, what has not begun


def summary(result: Mapping[str, Any]) -> str:
    """The result for people: one line."""
    rate = f", {result['images_per_s']:.2f} images/s" if result["images_per_s"] else ""
    count = f"{result['num_images']} images in {result['out']} ({result['made']} made now{rate})"
    return f"{count}; {result['contact_sheet']}"
