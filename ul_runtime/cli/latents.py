"""ul-encode: images to latents, with the bits of each. ul-decode: latents to images."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from ul_runtime.cli.command import run_command
from ul_runtime.cli.options import (
    AsJson,
    BundleArgument,
    DecoderOptions,
    JobOptions,
    OutFolder,
    option,
    with_options,
)
from ul_runtime.errors import BadInputError, NonFiniteError, UsageError, visible
from ul_runtime.machine import OneGpuOptions

if TYPE_CHECKING:
    import numpy as np

    from ul_runtime.images.decode import Rejected
    from ul_runtime.images.find import Found
    from ul_runtime.latents import Latents
    from ul_runtime.pipeline import Pipeline
    from ul_runtime.progress import Tick

decode_app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
encode_app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


_USUAL_BITS = "heldout_bits_per_image"  # in the quality of a bundle that ul-export made of a run with a report
_UNUSUAL = 1.5  # times those bits; the bound under the base is otherwise within a tenth of them


@dataclass(frozen=True)
class DecodeOptions(JobOptions):
    """How latents are decoded, beside the sampler."""

    mean_of: int = option(
        1, "Average the decodes of so many seeds (seed, seed + 1, ...): closer, softer.", metavar="COUNT"
    )


@dataclass(frozen=True)
class EncodeOptions(JobOptions):
    """How images are encoded."""

    bits_samples: int = option(
        16,
        "Noise levels for the bits of an image: a bound under the bundle's base prior, valid but looser than the "
        "training log's (the base has a sigmoid weighting).",
        metavar="COUNT",
    )


@decode_app.command(epilog="Example: ul-decode bundle latents.safetensors --out reconstructions")
@with_options
def decode(
    bundle: BundleArgument,
    latents: Annotated[Path, typer.Argument(metavar="LATENTS", help="File of ul-encode, or any with z_0 n c h w.")],
    out: OutFolder,
    options: DecodeOptions,
    sampling: DecoderOptions,
    machine: OneGpuOptions,
    as_json: AsJson = False,
) -> None:
    """Decode latents to images: PNG files and a contact sheet. Latents of ul-encode give reconstructions."""
    from ul_runtime.images.png import DecodeJob
    from ul_runtime.jobs import fill, job_of, summary
    from ul_runtime.latents import read_latents
    from ul_runtime.loading import open_pipeline
    from ul_runtime.settings import check_count

    check_count("--mean-of", options.mean_of)
    file = read_latents(latents)
    pipeline = open_pipeline(bundle, machine)
    _check_fits(latents, file, pipeline)
    sampler = pipeline.settings(**sampling.overrides).decoder
    settings = {f"decoder_{key}": value for key, value in asdict(sampler).items()}
    z_0, label = file.arrays["z_0"], file.arrays.get("label")
    calls = len(pipeline.decoder_table(sampler))
    average = f", mean of {options.mean_of}" if options.mean_of > 1 else ""
    result = fill(
        out,
        job_of(pipeline, DecodeJob, options.seed, latents=file.sha256, mean_of=options.mean_of, **settings),
        len(z_0),
        pipeline,
        lambda missing, tick: pipeline.decode(
            z_0[missing],
            seed=options.seed,
            indices=missing,
            labels=None if label is None else label[missing],
            mean_of=options.mean_of,
            batch_size=pipeline.batch_of(len(z_0)) if options.batch_size is None else options.batch_size,
            keep_x=False,
            tick=tick,
            **sampling.overrides,
        ),
        f"{pipeline.manifest.name}, decoded, seed {options.seed}, {calls} {sampler.sampler} calls{average}",
        captions=_names(file),
    )
    print(json.dumps(result) if as_json else summary(result))


def _names(file: "Latents") -> list[str]:
    """Names of the images that the latents are of, without their folders, if the file says them."""
    names = file.info.get("names")
    if not isinstance(names, list) or len(names) != len(file.arrays["z_0"]):
        return []
    return [Path(str(name)).name for name in names]


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


@encode_app.command(epilog="Example: ul-encode bundle photos --out latents.safetensors")
@with_options
def encode(
    bundle: BundleArgument,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES...", help="Image files or folders of them.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="New file of latents, .safetensors or .npz.")],
    options: EncodeOptions,
    machine: OneGpuOptions,
    as_json: AsJson = False,
) -> None:
    """Encode images to latents (z_0, z_clean), their labels (class folders) and the bits of each.

    Images that cannot be read are left out and listed; the exit code is then 65.
    """
    from ul_runtime.files import durable
    from ul_runtime.images.find import find_images, first_three, in_words
    from ul_runtime.latents import SUFFIXES, latents_bytes
    from ul_runtime.loading import open_pipeline
    from ul_runtime.settings import check_count

    check_count("--bits-samples", options.bits_samples)
    if options.batch_size is not None:
        check_count("--batch-size", options.batch_size)
    if out.suffix not in SUFFIXES:
        raise UsageError(f"{out}: expected a name that ends in {' or '.join(SUFFIXES)}")
    if out.exists():
        raise UsageError(f"{out}: exists; choose another name or remove it")
    durable.make_directory(out.parent)
    durable.check_output_directory(out.parent, ["*"])
    files, ignored = find_images(images)
    if ignored:
        print(f"no images, not looked at: {in_words(ignored)}", file=sys.stderr)
    pipeline = open_pipeline(bundle, machine)
    arrays, encoded, rejected = _encode_files(pipeline, files, options)
    if not encoded:
        raise BadInputError(f"no image can be read: {first_three(rejected)}; nothing was written")
    info = {
        "bundle": pipeline.hash,
        "seed": options.seed,
        **pipeline.computed_by,
        "bits_samples": options.bits_samples,
        "classes": list(pipeline.manifest.classes),
        "names": [str(file.path) for file in encoded],
    }
    durable.atomic_write(out, latents_bytes(out.suffix, arrays, info), overwrite=False)
    _say_encoded(pipeline, out, arrays["bits"], rejected, as_json)
    if rejected:
        found = f"{len(rejected)} of {len(files)} images cannot be read; the others are in {out}"
        raise BadInputError(found)


def _say_encoded(
    pipeline: "Pipeline", out: Path, bits: "np.ndarray", rejected: "list[Rejected]", as_json: bool
) -> None:
    """What was written, on stdout; on stderr what was left out, and a warning where images take unusually many bits."""
    mean = float(bits.mean())
    result = {
        "out": str(out),
        "num_images": len(bits),
        "rejected": [str(each) for each in rejected],
        "bits_per_image": round(mean, 3),
        "bits_per_pixel": round(mean / pipeline.manifest.image.size**2, 6),
    }
    text = f"{len(bits)} images in {out}: {mean:.1f} bits/image, {result['bits_per_pixel']:.4f} bits/pixel"
    print(json.dumps(result) if as_json else text)
    usual = pipeline.manifest.quality.get(_USUAL_BITS)
    if isinstance(usual, int | float) and mean > _UNUSUAL * usual:
        known = f"held-out images of its training took {usual:.0f}"
        print(f"warning: {mean:.0f} bits/image, {known}: it may not reconstruct such images", file=sys.stderr)
    for each in rejected:
        print(f"left out: {visible(str(each))}", file=sys.stderr)


_Encoded: TypeAlias = "tuple[dict[str, np.ndarray], list[Found], list[Rejected]]"


def _encode_files(pipeline: "Pipeline", files: "list[Found]", options: EncodeOptions) -> _Encoded:
    """Arrays of the file of latents (z_0, z_clean `n c h w`, label `n`, bits `n`), the files that these are of, and
    those that cannot be read. Says what had to be converted."""
    import numpy as np

    from ul_runtime.batches import halved_where_short
    from ul_runtime.images.decode import quiet_decoders
    from ul_runtime.images.find import in_words
    from ul_runtime.images.pixels import nearly_black_note
    from ul_runtime.progress import progress
    from ul_runtime.signals import stop_on_signal

    parts: dict[str, list[Any]] = {"z_0": [], "z_clean": [], "label": [], "bits": []}
    converted: Counter[str] = Counter()
    encoded: list[Found] = []
    rejected: list[Rejected] = []
    size = options.batch_size or pipeline.default_batch_size
    with stop_on_signal(), quiet_decoders(), progress("encoding", len(files), "images") as tick:
        images = _read(files, pipeline, converted, rejected)
        while batch := list(islice(images, size)):
            at = np.arange(len(encoded), len(encoded) + len(batch))
            encoded += [file for file, _ in batch]
            x = np.stack([pixels for _, pixels in batch])

            def encode(part: np.ndarray, most: int, at: np.ndarray = at, x: np.ndarray = x) -> dict[str, np.ndarray]:
                return _encode_batch(pipeline, encoded, at[part], x[part], options, tick)  # noqa: B023

            for arrays in halved_where_short(len(batch), len(batch), encode):
                for name, part in arrays.items():
                    parts[name].append(part)
    if note := nearly_black_note(converted, len(encoded)):
        print(f"note: {note}", file=sys.stderr)
    if converted:
        print(f"converted: {in_words(converted)}", file=sys.stderr)
    return {name: np.concatenate(part) for name, part in parts.items() if part}, encoded, rejected


def _read(
    files: "list[Found]", pipeline: "Pipeline", converted: Counter[str], rejected: "list[Rejected]"
) -> "Iterator[tuple[Found, np.ndarray]]":
    """The images that can be read, as x `c h w`; counts what was converted, and lists the others."""
    from ul_runtime.images.convert import load_image
    from ul_runtime.images.decode import ImageRejectedError
    from ul_runtime.images.find import printable

    for file in files:
        try:
            if file.problem is not None:
                raise file.problem
            x, changes = load_image(file.path, pipeline.manifest.image)
        except ImageRejectedError as problem:
            rejected.append(problem.at(printable(file.path)))
            continue
        converted.update(changes)
        yield file, x


def _encode_batch(
    pipeline: "Pipeline",
    files: "list[Found]",
    indices: "np.ndarray",
    x: "np.ndarray",
    options: EncodeOptions,
    tick: "Tick",
) -> dict[str, "np.ndarray"]:
    """Those of x `b c h w`, the files `indices`."""
    import numpy as np

    from ul_runtime.images.find import class_name, class_of

    encoded = pipeline.encode(x, seed=options.seed, indices=indices)
    finite = np.isfinite(encoded.z_clean).reshape(len(x), -1).all(axis=1)
    if not finite.all():
        first = files[int(indices[~finite][0])].path
        raise NonFiniteError(f"{first}: its latent is not finite; check the bundle, nothing was written")
    bits = pipeline.bits(
        encoded.z_clean, seed=options.seed, indices=indices, num_samples=options.bits_samples, tick=tick
    )
    numbers = {class_name(name): number for number, name in enumerate(pipeline.manifest.classes)}
    names = [class_of(files[i], numbers) for i in indices]
    label = np.array([len(numbers) if name is None else numbers[name] for name in names], np.int64)
    return {"z_0": encoded.z_0, "z_clean": encoded.z_clean, "label": label, "bits": bits}


def decode_main() -> None:
    """Entry point of ul-decode."""
    run_command(decode_app, "ul-decode")


def encode_main() -> None:
    """Entry point of ul-encode."""
    run_command(encode_app, "ul-encode")
