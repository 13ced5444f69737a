"""ul-encode: images to latents, with the bits of each."""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from ul_runtime.cli import options
from ul_runtime.errors import BadInputError, NonFiniteError, UsageError, run_command
from ul_runtime.settings import check_count

if TYPE_CHECKING:
    import numpy as np

    from ul_runtime.latents import Latents
    from ul_runtime.pipeline import Pipeline
    from ul_runtime.progress import Control


decode_app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@decode_app.command(epilog="Example: ul-decode bundle latents.safetensors --out reconstructions")
def decode(
    bundle: options.BundleArgument,
    latents: Annotated[Path, typer.Argument(metavar="LATENTS", help="File of ul-encode, or any with z_0 n c h w.")],
    out: options.OutFolder,
    seed: options.Seed = 0,
    mean_of: Annotated[
        int,
        typer.Option("--mean-of", metavar="COUNT", help="Decodes (seed, seed + 1, ...) to average: closer, softer."),
    ] = 1,
    decoder_steps: options.DecoderSteps = None,
    decoder_sampler: options.DecoderSampler = None,
    decoder_grid: options.DecoderGrid = None,
    batch_size: options.BatchSize = None,
    threads: options.Threads = None,
    spinning: options.Spinning = True,
    backend: options.BackendName = "auto",
    precision: options.Precision = None,
    devices: options.OneDevice = None,
    engines: options.EngineFolder = None,
    as_json: options.AsJson = False,
) -> None:
    """Decode latents to images: PNG files and a contact sheet; of ul-encode's latents, the reconstructions."""
    check_count("--mean-of", mean_of)
    card = options.one_card(devices, engines)
    import ul_runtime
    from ul_runtime.jobs import fill, job_of, summary
    from ul_runtime.latents import read_latents
    from ul_runtime.png import DecodeJob
    from ul_runtime.settings import Overrides

    file = read_latents(latents)
    machine = {"precision": precision, "threads": threads, "spinning": spinning, **card}
    pipeline = ul_runtime.load(bundle, backend=backend, **machine)
    _check_fits(latents, file, pipeline)
    overrides = Overrides(decoder_steps=decoder_steps, decoder_sampler=decoder_sampler, decoder_grid=decoder_grid)
    sampler = pipeline.settings(**overrides).decoder
    settings = {f"decoder_{key}": value for key, value in asdict(sampler).items()}
    z_0, label = file.arrays["z_0"], file.arrays.get("label")
    calls = len(pipeline.decoder_table(sampler))
    average = f", mean of {mean_of}" if mean_of > 1 else ""
    result = fill(
        out,
        job_of(pipeline, DecodeJob, seed, latents=file.sha256, mean_of=mean_of, **settings),
        len(z_0),
        pipeline,
        lambda missing, control: pipeline.decode(
            z_0[missing],
            seed=seed,
            indices=missing,
            labels=None if label is None else label[missing],
            mean_of=mean_of,
            batch_size=pipeline.batch_of(len(z_0)) if batch_size is None else batch_size,
            keep_x=False,
            control=control,
            **overrides,
        ),
        f"{pipeline.manifest.name}, decoded, seed {seed}, {calls} {sampler.sampler} calls{average}",
    )
    print(json.dumps(result) if as_json else summary(result))


def _check_fits(path: Path, file: "Latents", pipeline: "Pipeline") -> None:
    shape, expected = file.arrays["z_0"].shape, pipeline.latent_shape
    if shape[1:] != expected:
        raise BadInputError(f"{path}: z_0 is {list(shape)}, the bundle expects {['n', *expected]}; encode again")
    label, num_classes = file.arrays.get("label"), pipeline.num_classes
    if label is not None and (label.shape != shape[:1] or label.dtype.kind != "i" or not _within(label, num_classes)):
        raise BadInputError(f"{path}: label must be {shape[0]} numbers from 0 to {num_classes}; encode again")
    made_by = file.info.get("bundle", pipeline.hash)
    if made_by != pipeline.hash:
        message = f"made with bundle {str(made_by)[:12]}, this is {pipeline.hash[:12]}"
        raise BadInputError(f"{path}: {message}; encode the images again with this one")


def _within(label: "np.ndarray", num_classes: int) -> bool:
    return bool((label >= 0).all() and (label <= num_classes).all())


def decode_main() -> None:
    """Entry point of ul-decode."""
    run_command(decode_app, "ul-decode")


encode_app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

BitsSamples: TypeAlias = Annotated[
    int,
    typer.Option(
        "--bits-samples",
        metavar="COUNT",
        help="Noise levels an image for its bits: a bound under the bundle's base prior, valid but looser than the "
        "training log's (the base has a sigmoid weighting).",
    ),
]


@encode_app.command(epilog="Example: ul-encode bundle photos --out latents.safetensors")
def encode(
    bundle: options.BundleArgument,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES...", help="Picture files or folders of them.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="New file of latents, .safetensors or .npz.")],
    seed: options.Seed = 0,
    bits_samples: BitsSamples = 16,
    batch_size: options.BatchSize = None,
    threads: options.Threads = None,
    spinning: options.Spinning = True,
    backend: options.BackendName = "auto",
    precision: options.Precision = None,
    devices: options.OneDevice = None,
    engines: options.EngineFolder = None,
    as_json: options.AsJson = False,
) -> None:
    """Encode images to latents (z_0, z_clean), their labels (class folders) and the bits of each."""
    check_count("--bits-samples", bits_samples)
    card = options.one_card(devices, engines)
    import ul_runtime
    from ul_runtime import durable
    from ul_runtime.images import list_images
    from ul_runtime.latents import SUFFIXES, latents_bytes

    if out.suffix not in SUFFIXES:
        raise UsageError(f"{out}: expected a name that ends in {' or '.join(SUFFIXES)}")
    if out.exists():
        raise UsageError(f"{out}: exists; choose another name or remove it")
    files = list_images(images)
    machine = {"precision": precision, "threads": threads, "spinning": spinning, **card}
    pipeline = ul_runtime.load(bundle, backend=backend, **machine)
    if batch_size is not None:
        check_count("--batch-size", batch_size)
    durable.make_directory(out.parent)
    arrays, converted = _encode_files(pipeline, files, seed, bits_samples, batch_size or pipeline.default_batch_size)
    info = {
        "bundle": pipeline.hash,
        "seed": seed,
        **pipeline.computed_by,
        "bits_samples": bits_samples,
        "classes": list(pipeline.manifest.classes),
        "names": [str(file) for file in files],
    }
    durable.atomic_write(out, latents_bytes(out.suffix, arrays, info))
    mean = float(arrays["bits"].mean())
    result = {
        "out": str(out),
        "num_images": len(files),
        "bits_per_image": round(mean, 3),
        "bits_per_pixel": round(mean / pipeline.manifest.image.size**2, 6),
    }
    if converted:
        counts = ", ".join(f"{count} {change}" for change, count in converted.items())
        print(f"converted: {counts}", file=sys.stderr)
    text = f"{len(files)} images in {out}: {mean:.1f} bits/image, {result['bits_per_pixel']:.4f} bits/pixel"
    print(json.dumps(result) if as_json else text)


def _encode_files(
    pipeline: "Pipeline", files: Sequence[Path], seed: int, bits_samples: int, batch_size: int
) -> tuple[dict[str, "np.ndarray"], Counter[str]]:
    """Arrays of the file of latents (z_0, z_clean `n c h w`, label `n`, bits `n`), and what had to be converted."""
    import numpy as np

    from ul_runtime.images import load_image
    from ul_runtime.progress import Control, progress, stop_on_signal

    parts: dict[str, list[Any]] = {"z_0": [], "z_clean": [], "label": [], "bits": []}
    converted: Counter[str] = Counter()
    with stop_on_signal() as stop, progress("encoding", len(files), "images") as advance:
        for first in range(0, len(files), batch_size):
            control = Control(stop, advance)
            at = range(first, len(files))[:batch_size]
            images, changes = zip(*(load_image(files[i], pipeline.manifest.image) for i in at), strict=True)
            converted.update(chain.from_iterable(changes))
            batch = _encode_batch(pipeline, files, at, np.stack(images), seed, bits_samples, control)
            for name, part in batch.items():
                parts[name].append(part)
    return {name: np.concatenate(part) for name, part in parts.items()}, converted


def _encode_batch(
    pipeline: "Pipeline",
    files: Sequence[Path],
    batch: range,
    x: "np.ndarray",
    seed: int,
    bits_samples: int,
    control: "Control",
) -> dict[str, "np.ndarray"]:
    import numpy as np

    classes = pipeline.manifest.classes
    indices = np.array(batch)
    encoded = pipeline.encode(x, seed=seed, indices=indices)
    finite = np.isfinite(encoded.z_clean).reshape(len(x), -1).all(axis=1)
    if not finite.all():
        first = files[int(indices[~finite][0])]
        raise NonFiniteError(f"{first}: its latent is not finite; check the bundle, nothing was written")
    bits = pipeline.bits(encoded.z_clean, seed=seed, indices=indices, num_samples=bits_samples, control=control)
    names = [files[i].parent.name for i in batch]
    label = np.array([classes.index(name) if name in classes else len(classes) for name in names], np.int64)
    return {"z_0": encoded.z_0, "z_clean": encoded.z_clean, "label": label, "bits": bits}


def encode_main() -> None:
    """Entry point of ul-encode."""
    run_command(encode_app, "ul-encode")
