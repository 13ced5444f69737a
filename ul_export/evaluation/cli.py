"""ul-eval: how good a bundle's samples and reconstructions are, each figure beside that of real images."""

import json

import typer

from ul_export.options import EvalOptions
from ul_runtime.cli.command import run_command
from ul_runtime.cli.options import AsJson, BundleArgument, SamplingOptions, with_options
from ul_runtime.install import require_packages
from ul_runtime.machine import OneGpuOptions

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(epilog="Example: ul-eval fashion.bundle --data fashion-mnist/ --images 1000 --out evaluation")
@with_options
def evaluate(
    bundle: BundleArgument,
    options: EvalOptions,
    sampling: SamplingOptions,
    machine: OneGpuOptions,
    as_json: AsJson = False,
) -> None:
    """Measure a bundle against real images: samples, reconstructions, bits, and whether samples are copies."""
    require_packages("torch", "scipy", extras="eval")
    from ul_export.evaluation.evaluate import run_eval
    from ul_export.evaluation.report import print_report

    result = run_eval(bundle, options, sampling, machine)
    if as_json:
        print(json.dumps(result))
    else:
        print_report(result)


def main() -> None:
    """Console script."""
    run_command(app, "ul-eval")
