"""ul-tune: finds the cheapest settings of a bundle, and writes them into it as presets."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ul_export.options import TuneOptions
from ul_runtime.cli.command import run_command
from ul_runtime.cli.options import AsJson, BundleArgument, print_table, with_options
from ul_runtime.install import require_packages
from ul_runtime.machine import OneGpuOptions

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(epilog="Example: ul-tune photos.bundle --data photos/ --out tuned.bundle")
@with_options
def tune(
    bundle: BundleArgument,
    out: Annotated[Path, typer.Option("--out", metavar="BUNDLE", help="Where the bundle with its presets goes.")],
    options: TuneOptions,
    machine: OneGpuOptions,
    as_json: AsJson = False,
) -> None:
    """Find the cheapest settings that are as good as the bundle's own, and write presets draft, balanced and best."""
    require_packages("torch", "scipy", "matplotlib", extras="eval")
    from ul_export.tune.report import tables
    from ul_export.tune.tune import run_tune

    result = run_tune(bundle, out, options, machine)
    if as_json:
        print(json.dumps(result))
    else:
        print_table(*tables(result))


def main() -> None:
    """Console script."""
    run_command(app, "ul-tune")
