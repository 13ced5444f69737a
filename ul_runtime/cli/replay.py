"""ul-generate --replay: an image made again from its own info, and compared."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ul_runtime import loading
from ul_runtime.backends import BACKENDS, TORCH
from ul_runtime.errors import BadInputError, DifferentError, UsageError
from ul_runtime.files import durable
from ul_runtime.images.png import (
    SOFTWARE,
    DecodeJob,
    GenerateJob,
    ImageInfo,
    as_pil,
    image_name,
    png_bytes,
    read_info,
    read_png,
)
from ul_runtime.machine import MachineOptions
from ul_runtime.manifest import is_bundle
from ul_runtime.pipeline import Pipeline
from ul_runtime.progress import progress
from ul_runtime.settings import Overrides, no_label
from ul_runtime.signals import stop_on_signal


def replay(
    image: Path, bundle: Path | None, guide: Path | None, out: Path | None, machine: MachineOptions
) -> dict[str, Any]:
    """Make `image` again from `bundle` (into the folder `out`, if given); what agrees and what does not.

    Backend "auto" is the one that made it, with its precision and threads unless they are given.
    UsageError: no such file, or an image of that name in `out`.
    BadInputError: not an image of ul-generate, or of another bundle.
    """
    if not image.is_file():
        raise UsageError(f"{image}: {'is not a file; give one image' if image.exists() else 'no such file'}")
    stored = read_png(image)
    info = read_info(stored.texts, str(image))
    job, index = _generated(image, info)
    if machine.backend == "auto":
        if job.backend not in BACKENDS:
            raise BadInputError(f"{image}: made by backend {job.backend!a}; choose one of this version by --backend")
        precision, threads = machine.precision or job.precision, machine.threads or job.threads
        machine = replace(machine, backend=job.backend, precision=precision, threads=threads)
    target = None if out is None else out / image_name(index)
    if target is not None and target.exists():
        raise UsageError(f"{target}: exists; choose another folder")
    if machine.backend == TORCH and bundle is not None and is_bundle(bundle):
        raise BadInputError(f"{image}: made by backend torch from a run; give that run in place of {bundle}")
    pipeline = loading.open_pipeline(bundle, machine, guide)
    again, written = _make(image, info, job, index, pipeline)
    if target is not None:
        durable.make_directory(target.parent)
        durable.atomic_write(target, written, overwrite=False)
    found = {"out": None if target is None else str(target), "bytes_equal": stored.data == written}
    facts = {"image": str(image), "index": index, "label": info.label, "seed": job.seed}
    return facts | {"changed": _changed(info, pipeline)} | _compare(stored.pixels, again) | found


def _generated(image: Path, info: ImageInfo) -> tuple[GenerateJob, int]:
    """Job and index of an image of ul-generate; BadInputError for another."""
    if info.index is None:
        raise BadInputError(f"{image}: is a contact sheet; choose one image of the job")
    if isinstance(info.job, DecodeJob):
        latents = info.job.latents[:12]
        message = f"made by ul-decode from a file of latents (SHA-256 {latents}...) that it does not hold"
        raise BadInputError(f"{image}: {message}; give that file to ul-decode again")
    return info.job, info.index


def _make(image: Path, info: ImageInfo, job: GenerateJob, index: int, pipeline: Pipeline) -> tuple[np.ndarray, bytes]:
    """The image made again, uint8 `h w c`, and its file as this program writes it today."""
    if job.bundle != pipeline.hash:
        message = f"made from bundle {job.bundle}, and this one is {pipeline.hash}"
        raise BadInputError(f"{image}: {message}; give the bundle that made it")
    if job.guide != pipeline.guide_hash:
        message = f"guided by {_guide(job.guide)}, --guide gives {_guide(pipeline.guide_hash)}"
        raise BadInputError(f"{image}: {message}; give the guide that made it, none if there was none")
    classes = pipeline.manifest.classes
    if info.label is None or info.label not in (*classes, no_label(classes)):
        raise BadInputError(f"{image}: label {info.label!a} is not a class of the bundle")
    overrides = _overrides(job)
    try:
        settings = pipeline.settings(**overrides)
    except UsageError as error:
        raise BadInputError(f"{image}: cannot be made again: {error}") from error
    if not settings.as_dict().items() <= job.as_dict().items():
        raise BadInputError(f"{image}: its settings are not what this bundle makes of them; they were changed")
    with stop_on_signal(), progress("replay", 1, "images") as tick:
        (made,) = pipeline.generate(
            [index], seed=job.seed, labels=info.label, batch_size=info.batch, tick=tick, **overrides
        )
    today = job.model_copy(update=pipeline.computed_by)
    written = ImageInfo(
        job=today, bundle_name=pipeline.manifest.name, index=index, label=info.label, batch=made.computed_as
    )
    return made.images[0], png_bytes(as_pil(made.images[0]), written)


def _overrides(job: GenerateJob) -> Overrides:
    """All settings of the job, so that none is left to the bundle's defaults."""
    students = [student for student in (job.prior_student, job.decoder_student) if student is not None]
    own = job.prior_student is None  # guidance is part of a student
    return Overrides(
        students=students,
        steps=job.prior_num_steps,
        sampler=job.prior_sampler,
        grid=job.prior_grid,
        guidance=job.guidance if own else None,
        guidance_interval=(job.guidance_interval or (-np.inf, np.inf)) if own else None,
        guidance_rescale=job.guidance_rescale if own else None,
        decoder_steps=job.decoder_num_steps,
        decoder_sampler=job.decoder_sampler,
        decoder_grid=job.decoder_grid,
    )


def _changed(info: ImageInfo, pipeline: Pipeline) -> dict[str, tuple[Any, Any]]:
    """What is not as it was when the image was made: was, now."""
    was, now = info.job.model_dump() | {"software": info.software}, pipeline.computed_by | {"software": SOFTWARE}
    pairs = {name: (was[name], now[name]) for name in now}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _compare(was: np.ndarray, now: np.ndarray) -> dict[str, Any]:
    """Two images, uint8 `h w c`: how many pixels differ, and by how much at most (None: not of one shape)."""
    if was.shape != now.shape or was.dtype != now.dtype:
        return {"pixels_equal": False, "pixels_differing": None, "largest_difference": None, "shape": list(was.shape)}
    apart = np.abs(was.astype(int) - now)
    differing = int(apart.any(axis=-1).sum())
    return {"pixels_equal": differing == 0, "pixels_differing": differing, "largest_difference": int(apart.max())}


def _guide(bundle_hash: str | None) -> str:
    return f"bundle {bundle_hash}" if bundle_hash else "no bundle"


def changes(result: Mapping[str, Any]) -> list[str]:
    """What has changed since the image was made, one line each."""
    changed = {name: ["any" if value is None else value for value in pair] for name, pair in result["changed"].items()}
    return [f"{result['image']}: {name} was {was}, is {now}" for name, (was, now) in changed.items()]


def check_equal(result: Mapping[str, Any]) -> str:
    """The result for people: one line. DifferentError if the pixels differ."""
    where = f" (in {result['out']})" if result["out"] else ""
    if not result["pixels_equal"]:
        if result["pixels_differing"] is None:
            raise DifferentError(f"{result['image']}: has another shape or depth than the image made again{where}")
        message = f"{result['pixels_differing']} pixels differ, by at most {result['largest_difference']} of 255"
        raise DifferentError(f"{result['image']}: is not the image made again{where}: {message}")
    same = "the same file, byte for byte" if result["bytes_equal"] else "the same pixels in other bytes of the file"
    return f"{result['image']}: made again{where}, {same}"
