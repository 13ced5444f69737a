"""ul-eval: how good a bundle's samples and reconstructions are, each figure beside that of real images."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from ul_runtime.cli import options
from ul_runtime.errors import require_packages, run_command

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


Data: TypeAlias = Annotated[str, typer.Option("--data", metavar="SOURCE", help="Real images, as given to ul-train.")]
Heldout: TypeAlias = Annotated[
    str | None, typer.Option(metavar="SOURCE", help="Held-out images.", show_default="the source's own, or 5 %")
]
Out: TypeAlias = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder for eval.json, report.html and pictures.")
]
Features: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME|FILE.onnx",
        help="efficientnet-lite0 (ImageNet), classifier, pixels, or an ONNX file: x b c h w in [-1, 1] -> b d. "
        "Repeat it for several; the first one finds neighbours.",
        show_default="classifier for grey images with classes, else efficientnet-lite0; and pixels",
    ),
]
Classifier: TypeAlias = Annotated[
    Path | None,
    typer.Option(metavar="FILE.safetensors", help="Keeps the classifier: trained on --data if it is not there."),
]
TrainImages: TypeAlias = Annotated[
    int | None, typer.Option(metavar="COUNT", help="Training images searched for neighbours.", show_default="all")
]
Cache: TypeAlias = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Prepared images.", show_default="$UL_CACHE or the user's cache")
]


@app.command(epilog="Example: ul-eval fashion.bundle --data fashion-mnist/ --images 1000 --out evaluation")
def evaluate(
    bundle: options.BundleArgument,
    data: Data,
    heldout: Heldout = None,
    out: Out = None,
    images: Annotated[int, typer.Option(metavar="COUNT", help="Samples a seed, and real images beside them.")] = 1000,
    seeds: Annotated[int, typer.Option(metavar="COUNT", help="Repetitions, for the spread.")] = 3,
    seed: Annotated[int, typer.Option(metavar="INT", help="The first of the seeds.")] = 0,
    features: Features = None,
    classifier: Classifier = None,
    classifier_steps: Annotated[int, typer.Option(metavar="COUNT", help="Its training steps, of 64 images.")] = 1500,
    train_images: TrainImages = None,
    bits_samples: Annotated[int, typer.Option(metavar="COUNT", help="Noise levels an image for its bits.")] = 16,
    steps: options.Steps = None,
    sampler: options.Sampler = None,
    grid: options.Grid = None,
    guidance: options.Guidance = None,
    guidance_interval: options.GuidanceInterval = None,
    guidance_rescale: options.GuidanceRescale = None,
    decoder_steps: options.DecoderSteps = None,
    decoder_sampler: options.DecoderSampler = None,
    decoder_grid: options.DecoderGrid = None,
    threads: options.Threads = None,
    backend: options.BackendName = "auto",
    precision: options.Precision = None,
    devices: options.OneDevice = None,
    engines: options.EngineFolder = None,
    cache: Cache = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure a bundle against real images: samples, reconstructions, bits, and whether samples are copies."""
    require_packages("torch", "scipy", extras="eval")
    from ul_export.evaluation.evaluate import EvalOptions, run_eval
    from ul_runtime.machine import anonymous, cache_dir
    from ul_runtime.settings import Overrides

    interval = options.parse_interval(guidance_interval)
    prior = Overrides(steps=steps, sampler=sampler, grid=grid)
    guided = Overrides(guidance=guidance, guidance_interval=interval, guidance_rescale=guidance_rescale)
    decoder = Overrides(decoder_steps=decoder_steps, decoder_sampler=decoder_sampler, decoder_grid=decoder_grid)
    wanted = EvalOptions(
        data=data,
        heldout=heldout,
        num_images=images,
        num_seeds=seeds,
        seed=seed,
        features=features or [],
        classifier=classifier,
        classifier_steps=classifier_steps,
        train_images=train_images,
        bits_samples=bits_samples,
        machine={"backend": backend, "precision": precision, "threads": threads} | options.one_card(devices, engines),
        cache=cache_dir(cache),
        out=out,
        overrides=prior | guided | decoder,
    )
    _say(run_eval(bundle, wanted, anonymous("ul-eval", sys.argv[1:])), as_json)


def _say(result: dict[str, Any], as_json: bool) -> None:
    from ul_export.evaluation.report import print_report

    if as_json:
        print(json.dumps(result))
    else:
        print_report(result)


def main() -> None:
    """Console script."""
    run_command(app, "ul-eval")
