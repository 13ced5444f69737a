"""ul-decode: latents to images, PNG files and a contact sheet."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ul_runtime.cli import options
from ul_runtime.errors import BadInputError, run_command

if TYPE_CHECKING:
    import numpy as np

    from ul_runtime.latents import Latents
    from ul_runtime.pipeline import Pipeline

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(epilog="Example: ul-decode bundle latents.safetensors --out reconstructions")
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
    options.check_count("--mean-of", mean_of)
    card = options.one_card(devices, engines)
    import ul_runtime
    from ul_runtime.cli.fill import fill, job_of, summary
    from ul_runtime.latents import read_latents
    from ul_runtime.provenance import DecodeJob
    from ul_runtime.settings import Overrides

    file = read_latents(latents)
    machine = {"precision": precision, "threads": threads, "allow_spinning": spinning, **card}
    pipeline = ul_runtime.load(bundle, backend=backend, **machine)
    options.say_choice(backend, precision, pipeline)
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
    made_by = file.info.get("bundle", pipeline.bundle.hash)
    if made_by != pipeline.bundle.hash:
        message = f"made with bundle {str(made_by)[:12]}, this is {pipeline.bundle.hash[:12]}"
        raise BadInputError(f"{path}: {message}; encode the images again with this one")


def _within(label: "np.ndarray", num_classes: int) -> bool:
    return bool((label >= 0).all() and (label <= num_classes).all())


def main() -> None:
    """Entry point of ul-decode."""
    run_command(app, "ul-decode")
