"""ul-generate: a bundle to images, PNG files and a labelled contact sheet; --replay makes one of them again."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ul_runtime.cli import options
from ul_runtime.errors import UsageError, run_command
from ul_runtime.settings import check_count

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ul_runtime.batches import Images
    from ul_runtime.pipeline import Pipeline
    from ul_runtime.settings import Overrides, Settings


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(epilog="Example: ul-generate BUNDLE --num-images 64 --seed 0 --steps 32 --out pictures")
def generate(
    context: typer.Context,
    bundle: options.OptionalBundle = None,
    out: options.OptionalOutFolder = None,
    num_images: Annotated[int, typer.Option("--num-images", "-n", metavar="COUNT", help="How many images.")] = 64,
    seed: options.Seed = 0,
    label: options.Labels = None,
    steps: options.Steps = None,
    sampler: options.Sampler = None,
    grid: options.Grid = None,
    guidance: options.Guidance = None,
    guidance_interval: options.GuidanceInterval = None,
    guidance_rescale: options.GuidanceRescale = None,
    guide: options.GuideBundle = None,
    decoder_steps: options.DecoderSteps = None,
    decoder_sampler: options.DecoderSampler = None,
    decoder_grid: options.DecoderGrid = None,
    batch_size: options.BatchSize = None,
    threads: options.Threads = None,
    spinning: options.Spinning = True,
    backend: options.BackendName = "auto",
    precision: options.Precision = None,
    devices: options.Devices = None,
    engines: options.EngineFolder = None,
    require_graphs: options.RequireGraphs = False,
    replay: options.Replay = None,
    as_json: options.AsJson = False,
) -> None:
    """Generate images from a bundle: PNG files and a contact sheet; the same command goes on where it stopped."""
    cards = options.parse_devices(devices)
    machine: dict[str, Any] = {"precision": precision, "threads": threads, "spinning": spinning}
    machine |= {"device": cards[0] if cards else None, "engines": engines, "require_graphs": require_graphs}
    if replay is not None:
        return _replay(context, replay, bundle, guide, out, as_json, backend=backend, **machine)
    if out is None:
        raise UsageError("--out is missing; give the folder of the images")
    check_count("--num-images", num_images, most=2**63)  # an index is an int64
    interval = options.parse_interval(guidance_interval)
    import ul_runtime
    from ul_runtime.jobs import summary
    from ul_runtime.settings import Overrides
    from ul_runtime.workers import several_devices

    pipeline = ul_runtime.load(bundle, guide=guide, backend=backend, **machine)
    if pipeline.guide_hash == pipeline.hash:
        print("the guide is the bundle itself: guidance has no effect", file=sys.stderr, flush=True)
    prior = Overrides(steps=steps, sampler=sampler, grid=grid)
    guided = Overrides(guidance=guidance, guidance_interval=interval, guidance_rescale=guidance_rescale)
    decoder = Overrides(decoder_steps=decoder_steps, decoder_sampler=decoder_sampler, decoder_grid=decoder_grid)
    machine |= {"guide": guide, "backend": pipeline.backend.name}
    machine["engines"] = engines if pipeline.backend.name == "tensorrt" else None  # auto may have taken another
    with several_devices(pipeline, bundle, cards, **machine) as batches:
        result = _generate(pipeline, batches, out, num_images, seed, label, batch_size, prior | guided | decoder)
    print(json.dumps(result) if as_json else summary(result))


def _generate(
    pipeline: "Pipeline",
    generate: "Callable[..., Iterator[Images]]",
    out: Path,
    num_images: int,
    seed: int,
    label: list[str] | None,
    batch_size: int | None,
    overrides: "Overrides",
) -> dict[str, Any]:
    from ul_runtime.jobs import fill, job_of
    from ul_runtime.png import ALL_CLASSES, GenerateJob
    from ul_runtime.settings import NO_LABEL, label_cycle

    settings = pipeline.settings(**overrides)
    if batch_size is None:
        batch_size = pipeline.batch_of(num_images)  # of the job, not of what is left of it
    classes = [*pipeline.manifest.classes, NO_LABEL]
    names = [classes[number] for number in label_cycle(label, pipeline.manifest.classes)]
    labels = names if label else ALL_CLASSES
    return fill(
        out,
        job_of(pipeline, GenerateJob, seed, guide=pipeline.guide_hash, labels=labels, **settings.as_dict()),
        num_images,
        pipeline,
        lambda missing, control: generate(
            missing, seed=seed, labels=label or None, batch_size=batch_size, keep_x=False, control=control, **overrides
        ),
        _title(pipeline, seed, settings, names),
        names if len(names) > 1 else (),
    )


def _replay(
    context: typer.Context,
    image: Path,
    bundle: Path | None,
    guide: Path | None,
    out: Path | None,
    as_json: bool,
    **machine: Any,
) -> None:
    """The picture says how it was made: options that would say so too are refused."""
    allowed = {"bundle", "guide", "out", "replay", "as_json", "backend", "precision", "threads", "spinning"}
    allowed |= {"devices", "engines", "require_graphs"}
    for name in sorted(context.params.keys() - allowed):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise UsageError(f"--{name.replace('_', '-')}: cannot be given with --replay; the picture says it")
    from ul_runtime.cli.replay import check_equal, replay, said

    result = replay(image, bundle, guide, out, **machine)
    for line in said(result):
        print(f"ul-generate: {line}", file=sys.stderr)
    if as_json:
        print(json.dumps(result))
    line = check_equal(result)
    if not as_json:
        print(line)


def _title(pipeline: "Pipeline", seed: int, settings: "Settings", names: list[str]) -> str:
    prior, decoder = len(pipeline.prior_table(settings.prior)), len(pipeline.decoder_table(settings.decoder))
    loops = f"{prior} {settings.prior.sampler} + {decoder} {settings.decoder.sampler}"
    only = f"{names[0]}, " if len(names) == 1 and names[0] != "none" else ""
    by = f" by {pipeline.guide.manifest.name}" if pipeline.guide else ""
    guidance = f", guidance {settings.guidance:g}{by}" if settings.guidance != 1.0 else ""
    return f"{pipeline.manifest.name}, {only}seed {seed}, {loops} calls{guidance}"


def main() -> None:
    """Entry point of ul-generate."""
    run_command(app, "ul-generate")
