"""ul-bench: how fast a bundle runs here, beside other backends and the same networks in torch."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from ul_runtime.cli import options
from ul_runtime.errors import UsageError, require_packages, run_command

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


BatchSizes: TypeAlias = Annotated[
    str | None, typer.Option(metavar="IMAGES,...", help="Batch sizes.", show_default="1,8,64; with --quick 1,8")
]
Run: TypeAlias = Annotated[
    Path | None, typer.Option(metavar="RUN", help="Run directory of the bundle, for the torch peers.")
]


@app.command(epilog="Example: ul-bench fashion.bundle --peers openvino,openvino-bf16,torch --run runs/fashion")
def bench(
    bundle: options.BundleAlone,
    peers: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="Measured in turn with ort-cpu: openvino, openvino-bf16, torch, torch-compile, torch-loop "
            "(sampling as a user writes it), and these three with -bf16.",
            show_default="none",
        ),
    ] = "",
    run: Run = None,
    batch_sizes: BatchSizes = None,
    repeats: Annotated[int, typer.Option(metavar="COUNT", help="Measurements of each step.")] = 20,
    image_repeats: Annotated[int, typer.Option(metavar="COUNT", help="Measurements of whole batches of images.")] = 5,
    steps: options.Steps = None,
    decoder_steps: options.DecoderSteps = None,
    guidance: options.Guidance = None,
    threads: options.Threads = None,
    start_up: Annotated[
        bool, typer.Option("--start-up/--no-start-up", help="Measure import, load and first image in fresh processes.")
    ] = True,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw images/s against batch size (needs matplotlib).")
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="One or two measurements of each: to see that it works, not for figures."),
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Measure prior step, decoder step, whole images and start-up of a bundle, against this machine's own ceiling."""
    _check_plot(plot)
    from ul_export.bench.bench import BenchOptions, run_bench
    from ul_runtime.settings import Overrides

    sizes = ("1,8" if quick else "1,8,64") if batch_sizes is None else batch_sizes
    wanted = BenchOptions(
        peers=names("--peers", peers),
        run=run,
        batch_sizes=[_number("--batch-sizes", word) for word in names("--batch-sizes", sizes)],
        repeats=min(repeats, 2) if quick else repeats,
        image_repeats=min(image_repeats, 1) if quick else image_repeats,
        ceiling_s=0.02 if quick else 0.3,
        threads=threads,
        start_up=start_up,
        overrides=Overrides(steps=steps, decoder_steps=decoder_steps, guidance=guidance),
    )
    result = run_bench(bundle, wanted) | {"command": shlex.join(["ul-bench", *sys.argv[1:]])}
    from ul_export.bench import report

    if plot is not None:
        report.write_plot(result, plot)
    if as_json:
        print(json.dumps(result))
    else:
        report.print_report(result)


def _check_plot(plot: Path | None) -> None:
    """UsageError before anything is measured."""
    if plot is not None:
        require_packages("matplotlib", extras="train")
        if plot.suffix != ".png" or not plot.parent.is_dir():
            raise UsageError(f"--plot {plot}: expected a name that ends in .png, in a folder that exists")


def names(option: str, text: str) -> list[str]:
    """The parts of a list with commas; UsageError for one that occurs twice or is empty."""
    parts = [part.strip() for part in text.split(",")] if text else []
    if "" in parts or len(set(parts)) != len(parts):
        raise UsageError(f"{option} {text!r}: expected different names with commas between them")
    return parts


def _number(option: str, word: str) -> int:
    if not word.isdecimal():
        raise UsageError(f"{option}: {word!r} is not a number; expected numbers with commas between them")
    return int(word)


def main() -> None:
    """Console script."""
    run_command(app, "ul-bench")
