"""What ul-generate and ul-decode share: fill a folder with one job's images, then draw its contact sheet."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import ul_runtime
from ul_runtime.errors import BadInputError, NonFiniteError
from ul_runtime.image_folder import ImageFolder, open_image_folder
from ul_runtime.pipeline import UNWATCHED, Control, Images, Pipeline
from ul_runtime.progress import progress
from ul_runtime.signals import stop_on_signal

Batches: TypeAlias = Callable[[list[int], Control], Iterator[Images]]


def job_of(pipeline: Pipeline, command: str, **settings: Any) -> dict[str, Any]:
    """All that an image of the command depends on beside its index, JSON-ready."""
    return {
        "command": command,
        "bundle": pipeline.bundle.hash,
        **({} if pipeline.guide is None else {"guide": pipeline.guide.bundle.hash}),
        **settings,
        "backend": pipeline.backend.name,
        "precision": pipeline.backend.precision,
    }


def fill(
    out: Path,
    job: Mapping[str, Any],
    num_images: int,
    pipeline: Pipeline,
    batches: Batches,
    title: str,
    columns: Sequence[str] = (),
) -> dict[str, Any]:
    """Make the images that `out` lacks, then the sheet; returns the command's result.

    StoppedError on a signal: what is written is whole. NonFiniteError after all other images are written.
    """
    if (channels := pipeline.manifest.image.channels) not in (1, 3, 4):
        raise BadInputError(f"{pipeline.bundle.path}: images have {channels} channels; PNG takes 1, 3 or 4")
    batches([], UNWATCHED)  # refuses what cannot be before anything is written
    failed: NonFiniteError | None = None
    job_name = f"{job['command'].removeprefix('ul-')}.json"
    with stop_on_signal() as stop, open_image_folder(out, job, num_images, job_name) as folder:
        missing = folder.missing()
        start, made = time.monotonic(), 0
        try:
            with progress(job_name.removesuffix(".json"), len(missing), "images") as advance:
                for batch in batches(missing, Control(stop, advance)):
                    _write(folder, batch, pipeline)
                    made += len(batch.indices)
        except NonFiniteError as error:
            failed = error
        seconds = time.monotonic() - start
        sheet = folder.write_sheet(title, columns)
    if failed is not None:
        raise failed
    rate = round(made / seconds, 3) if made else None
    counts = {"num_images": num_images, "made": made, "seconds": round(seconds, 3), "images_per_s": rate}
    return {"out": str(out), "sheet": str(sheet), **counts, "fingerprint": folder.fingerprint, **job}


def _write(folder: ImageFolder, batch: Images, pipeline: Pipeline) -> None:
    """The images of a batch, each with its provenance as PNG text."""
    names = [*pipeline.manifest.classes, "none"]
    shared = {key: _text(value) for key, value in folder.job.items() if key != "labels"}
    shared |= {"Software": f"unified-latents {ul_runtime.__version__}", "bundle_name": pipeline.manifest.name}
    for index, label, image in zip(batch.indices.tolist(), batch.labels.tolist(), batch.images, strict=True):
        folder.write(index, image, {**shared, "label": names[label]})


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def summary(result: Mapping[str, Any]) -> str:
    """The result for people: one line."""
    rate = f", {result['images_per_s']:.2f} images/s" if result["images_per_s"] else ""
    return f"{result['num_images']} images in {result['out']} ({result['made']} made now{rate}); {result['sheet']}"
