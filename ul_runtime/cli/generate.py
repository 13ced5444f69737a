"""ul-generate: a bundle to images, PNG files and a contact sheet; --replay makes one of them again."""

import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ul_runtime.cli.command import run_command
from ul_runtime.cli.options import (
    AsJson,
    JobOptions,
    OptionalBundle,
    OptionalOutFolder,
    SamplingOptions,
    with_options,
)
from ul_runtime.errors import UsageError
from ul_runtime.machine import MachineOptions
from ul_runtime.settings import option

if TYPE_CHECKING:
    from ul_runtime.pipeline import Pipeline
    from ul_runtime.settings import SamplerSettings, Settings

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class GenerateOptions(JobOptions):
    """Which images."""

    num_images: int = option(64, "How many images.", "--num-images", "-n", metavar="COUNT")
    label: list[str] = option(
        [],
        "Class of the images; repeat it for several in turn. Quote a number: '#3'.",
        metavar="NAME|#NUMBER|none",
        shown="all classes in turn",
    )


Guide = Annotated[
    Path | None,
    typer.Option(
        "--guide",
        metavar="BUNDLE",
        help="Weaker model for autoguidance (Karras et al. 2024).",
        show_default="none: guidance is classifier-free",
    ),
]
Replay = Annotated[
    Path | None,
    typer.Option("--replay", metavar="IMAGE", help="Make this PNG of ul-generate again; exit code 1 if not equal."),
]


@app.command(epilog="Example: ul-generate BUNDLE --num-images 64 --seed 0 --steps 32 --out images")
@with_options
def generate(
    context: typer.Context,
    options: GenerateOptions,
    sampling: SamplingOptions,
    machine: MachineOptions,
    bundle: OptionalBundle = None,
    out: OptionalOutFolder = None,
    guide: Guide = None,
    replay: Replay = None,
    as_json: AsJson = False,
) -> None:
    """Generate images from a bundle: PNG files and a contact sheet. Run the same command again to resume."""
    if replay is not None:
        _refuse_beside_replay(context)
        return _replay(replay, bundle, guide, out, machine, as_json)
    if out is None:
        raise UsageError("--out is missing; give the folder of the images")
    overrides = sampling.overrides
    from ul_runtime.images.png import ALL_CLASSES, GenerateJob
    from ul_runtime.jobs import fill, job_of, summary
    from ul_runtime.loading import open_pipeline
    from ul_runtime.settings import MOST_IMAGES, check_count, label_cycle, no_label
    from ul_runtime.workers import generate_on_gpus

    check_count("--num-images", options.num_images, most=MOST_IMAGES)
    pipeline = open_pipeline(bundle, machine, guide)
    if pipeline.guide_hash == pipeline.hash:
        print("the guide is the bundle itself: guidance has no effect", file=sys.stderr, flush=True)
    settings = pipeline.settings(**overrides)
    classes = [*pipeline.manifest.classes, no_label(pipeline.manifest.classes)]
    names = [classes[number] for number in label_cycle(options.label or None, pipeline.manifest.classes)]
    labels = names if options.label else ALL_CLASSES
    batch_size = options.batch_size  # of the job, not of what is left of it
    given: dict[str, Any] = {
        "seed": options.seed,
        "labels": options.label or None,
        "batch_size": pipeline.batch_of(options.num_images) if batch_size is None else batch_size,
        "keep_x": False,
        **overrides,
    }
    with generate_on_gpus(pipeline, bundle, machine, guide) as batches:
        result = fill(
            out,
            job_of(pipeline, GenerateJob, options.seed, guide=pipeline.guide_hash, labels=labels, **settings.as_dict()),
            options.num_images,
            pipeline,
            lambda missing, tick: batches(missing, tick=tick, **given),
            _title(pipeline, options.seed, settings, names),
            names if len(names) > 1 else (),
        )
    print(json.dumps(result) if as_json else summary(result))


def _refuse_beside_replay(context: typer.Context) -> None:
    """UsageError for an option that the image itself answers."""
    for field in (*fields(GenerateOptions), *fields(SamplingOptions)):
        source = context.get_parameter_source(field.name)
        if source is not None and source.name == "COMMANDLINE":
            name = field.name.replace("_", "-")
            raise UsageError(f"--{name}: cannot be given with --replay; the image says it")


def _replay(
    image: Path, bundle: Path | None, guide: Path | None, out: Path | None, machine: MachineOptions, as_json: bool
) -> None:
    from ul_runtime.cli.replay import changes, check_equal, replay

    result = replay(image, bundle, guide, out, machine)
    for line in changes(result):
        print(f"ul-generate: {line}", file=sys.stderr)
    if as_json:
        print(json.dumps(result))
    line = check_equal(result)
    if not as_json:
        print(line)


def _title(pipeline: "Pipeline", seed: int, settings: "Settings", names: list[str]) -> str:
    from ul_runtime.settings import no_label

    prior, decoder = len(pipeline.prior_table(settings.prior)), len(pipeline.decoder_table(settings.decoder))
    loops = f"{prior} {_by(settings.prior)} + {decoder} {_by(settings.decoder)}"
    only = f"{names[0]}, " if len(names) == 1 and names[0] != no_label(pipeline.manifest.classes) else ""
    by = f" by {pipeline.guide.manifest.name}" if pipeline.guide else ""
    guidance = f", guidance {settings.guidance:g}{by}" if settings.guidance != 1.0 else ""
    return f"{pipeline.manifest.name}, {only}seed {seed}, {loops} calls{guidance}"


def _by(sampler: "SamplerSettings") -> str:
    return f"by {sampler.student}" if sampler.student else sampler.sampler


def main() -> None:
    """Entry point of ul-generate."""
    run_command(app, "ul-generate")
