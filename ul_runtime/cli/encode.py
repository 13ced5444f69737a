"""ul-encode: images to latents, with the bits of each."""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from ul_runtime.cli import options
from ul_runtime.errors import NonFiniteError, UsageError, run_command

if TYPE_CHECKING:
    import numpy as np

    from ul_runtime.control import Control
    from ul_runtime.pipeline import Pipeline

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

BitsSamples: TypeAlias = Annotated[
    int,
    typer.Option(
        "--bits-samples",
        metavar="COUNT",
        help="Noise levels an image for its bits: a bound under the bundle's base prior, valid but looser than the "
        "training log's (the base has a sigmoid weighting).",
    ),
]


@app.command(epilog="Example: ul-encode bundle photos --out latents.safetensors")
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
    options.check_count("--bits-samples", bits_samples)
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
    machine = {"precision": precision, "threads": threads, "allow_spinning": spinning, **card}
    pipeline = ul_runtime.load(bundle, backend=backend, **machine)
    options.say_choice(backend, precision, pipeline)
    if batch_size is not None:
        options.check_count("--batch-size", batch_size)
    durable.make_directory(out.parent)
    arrays, converted = _encode_files(pipeline, files, seed, bits_samples, batch_size or pipeline.default_batch_size)
    info = {
        "bundle": pipeline.bundle.hash,
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

    from ul_runtime.control import Control
    from ul_runtime.images import load_image
    from ul_runtime.progress import progress
    from ul_runtime.signals import stop_on_signal

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


def main() -> None:
    """Entry point of ul-encode."""
    run_command(app, "ul-encode")
