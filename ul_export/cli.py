"""ul-export: a run directory to a verified bundle."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ul_runtime.errors import UsageError, require_packages, run_command

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

Calibrate = Annotated[
    str | None,
    typer.Option(metavar="SOURCE", help="Images for lower precisions.", show_default="the run's held-out images"),
]
Update = Annotated[
    Path | None,
    typer.Option(metavar="BUNDLE", help="Put RUN's weights into this bundle's graphs, in its precision, and prove."),
]
Check = Annotated[
    bool, typer.Option("--check", help="Prove that RUN exports as it stands, finished or not; write nothing.")
]
Opset = Annotated[
    int | None, typer.Option(metavar="18|20|22", help="ONNX opset of the graphs.", show_default="20; --bf16: 22")
]
Weights = Annotated[
    str, typer.Option(metavar="fp32|fp16", help="How weights are stored where graphs compute in float32.")
]


@app.command(epilog="Example: ul-export runs/fashion --out fashion.bundle")
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of ul-train.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The bundle to write.", show_default="--update: that one")
    ] = None,
    fp16: Annotated[bool, typer.Option("--fp16", help="Compute in float16 wherever that is proved to hold.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16 wherever that is proved to hold.")] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Products and convolutions in int8 wherever that is proved to hold.")
    ] = False,
    calibrate: Calibrate = None,
    update: Update = None,
    check: Check = False,
    opset: Opset = None,
    weights: Weights = "fp32",
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="CPU threads; all cores if not given.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(metavar="DIR", help="Prepared images, as for ul-train.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle at --out.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Results as one JSON line on stdout.")] = False,
) -> None:
    """Export a run's averaged networks as ONNX step graphs, prove them equal to torch, and write one hashed bundle."""
    require_packages("torch", "onnx", "onnxscript", "matplotlib", extras="train,export")
    from ul_export.command import ExportOptions, export_bundle
    from ul_export.precision.kinds import KINDS
    from ul_train.cli import cache_dir
    from ul_train.command import print_line

    asked = [kind for kind, given in zip(KINDS, (fp16, bf16, int8), strict=True) if given]
    if len(asked) > 1:
        raise UsageError(f"--{asked[0]} and --{asked[1]}: give one of them")

    changed = asked or opset is not None or weights != "fp32" or calibrate is not None
    if check:
        if changed or update is not None or out is not None or overwrite:
            raise UsageError("--check writes nothing, in float32; leave out all but --threads and --json")
        from ul_export.command import check_export

        _say(check_export(run, threads, print_line), json_)
        return
    if update is not None:
        if changed:
            raise UsageError("--update keeps the bundle's precision and opset; leave out all but --out and --threads")
        from ul_export.update import update_bundle

        _say(update_bundle(run, update, update if out is None else out, threads, print_line), json_)
        return
    if out is None:
        raise UsageError("--out is missing; see ul-export --help")
    options = ExportOptions(
        opset, asked[0] if asked else "fp32", weights, calibrate, cache_dir(cache), threads, overwrite
    )
    _say(export_bundle(run, out, options, print_line), json_)


def _say(figures: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:>24}  {f'{value:.4g}' if isinstance(value, float) else value}")


def main() -> None:
    """Console script."""
    run_command(app, "ul-export")
