"""What ul-generate and ul-decode share: fill a folder with one job's images, then draw its contact sheet."""

import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np

from ul_runtime.background import Background
from ul_runtime.batches import Images
from ul_runtime.control import UNWATCHED, Control
from ul_runtime.errors import BadInputError, NonFiniteError, StoppedError
from ul_runtime.image_folder import ImageFolder, open_image_folder
from ul_runtime.indices import check_seed
from ul_runtime.pipeline import Pipeline
from ul_runtime.progress import progress
from ul_runtime.provenance import Job
from ul_runtime.settings import NO_LABEL
from ul_runtime.signals import stop_on_signal

_MOST_BATCHES = 2  # made and not yet written
_MOST_WRITERS = 8  # threads
_MOST_INDICES = 2**14  # in memory: many whole batches
SomeJob = TypeVar("SomeJob", bound=Job)
Batches: TypeAlias = Callable[[np.ndarray, Control], Iterator[Images]]


def job_of(pipeline: Pipeline, kind: type[SomeJob], seed: int, **fields: Any) -> SomeJob:
    """The job of `kind` on this bundle and backend. UsageError: a seed that cannot be."""
    check_seed(seed)
    return kind(bundle=pipeline.bundle.hash, seed=seed, **fields, **pipeline.computed_by)


def fill(
    out: Path,
    job: Job,
    num_images: int,
    pipeline: Pipeline,
    batches: Batches,
    title: str,
    columns: Sequence[str] = (),
) -> dict[str, Any]:
    """Make the images that `out` lacks, then the sheet; returns the command's result.

    Images are written while the next are made; an error of writing ends the work before the next step.
    StoppedError on a signal: what is written is whole. NonFiniteError after all other images are written.
    """
    if (channels := pipeline.manifest.image.channels) not in (1, 3, 4):
        raise BadInputError(f"{pipeline.bundle.path}: images have {channels} channels; PNG takes 1, 3 or 4")
    batches(np.zeros(0, np.int64), UNWATCHED)  # refuses what cannot be before anything is written
    failed: list[NonFiniteError] = []
    names = [*pipeline.manifest.classes, NO_LABEL]
    with stop_on_signal() as stop, open_image_folder(out, job, pipeline.manifest.name, num_images) as folder:
        done = folder.done(stop)
        start, made = time.monotonic(), 0
        pool = ThreadPoolExecutor(min(_MOST_WRITERS, len(os.sched_getaffinity(0))))
        writer: Background[Images] = Background(lambda batch: _write(folder, batch, names, pool), _MOST_BATCHES)

        def stopped() -> bool:
            writer.check()
            return stop()

        with progress(job.command.removeprefix("ul-"), num_images - len(done), "images") as advance, pool, writer:
            for missing in _missing(num_images, done):
                try:
                    for batch in batches(missing, Control(stopped, advance)):
                        writer.put(batch)
                        made += len(batch.indices)
                except NonFiniteError as error:
                    failed.append(error)
                except StoppedError as error:
                    there = f"{out}: {len(done) + made} of {num_images} images are there"
                    raise StoppedError(f"{there}; {error}") from None
        seconds = time.monotonic() - start
        sheet = folder.write_sheet(title, columns)
    if failed:
        raise NonFiniteError("; ".join(map(str, failed)))
    rate = round(made / seconds, 3) if made else None
    if again := pipeline.remade:
        shown = ", ".join(map(str, again[:10])) + (" ..." if len(again) > 10 else "")
        what = f"not finite in {pipeline.backend.precision} and made again in float32: images {shown}"
        print(f"{len(again)} of {made} {what}", file=sys.stderr, flush=True)
    counts = {"num_images": num_images, "made": made, "seconds": round(seconds, 3), "images_per_s": rate}
    counts["made_again_in_float32"] = len(again)
    where = {"out": str(out), "sheet": str(sheet)}
    return where | counts | {"fingerprint": folder.fingerprint} | job.model_dump(mode="json")


def _missing(num_images: int, done: Collection[int]) -> Iterator[np.ndarray]:
    """Indices below num_images that are not done, int64, a bounded number at a time."""
    for first in range(0, num_images, _MOST_INDICES):
        indices = [index for index in range(first, min(first + _MOST_INDICES, num_images)) if index not in done]
        if indices:
            yield np.array(indices, np.int64)


def _write(folder: ImageFolder, batch: Images, names: list[str], pool: ThreadPoolExecutor) -> None:
    """All images of a batch, by several threads: a card makes more of them than one can compress."""
    pictures = zip(batch.indices.tolist(), batch.labels.tolist(), batch.images, strict=True)
    pieces = [
        pool.submit(folder.write, index, image, names[label], batch.computed_as) for index, label, image in pictures
    ]
    try:
        for piece in pieces:
            piece.result()
    finally:
        for piece in pieces:
            piece.cancel()  # after an error, what has not begun


def summary(result: Mapping[str, Any]) -> str:
    """The result for people: one line."""
    rate = f", {result['images_per_s']:.2f} images/s" if result["images_per_s"] else ""
    return f"{result['num_images']} images in {result['out']} ({result['made']} made now{rate}); {result['sheet']}"
