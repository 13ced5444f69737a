"""ul-export: a run directory to a verified bundle."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ul_runtime.errors import require_packages, run_command

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(epilog="Example: ul-export runs/fashion --out fashion.bundle")
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of ul-train, both stages trained.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The bundle to write.")],
    opset: Annotated[int, typer.Option(metavar="18|20", help="ONNX opset of the graphs.")] = 20,
    weights: Annotated[
        str, typer.Option(metavar="fp32|fp16", help="How weights are stored; graphs compute in float32 either way.")
    ] = "fp32",
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="CPU threads; all cores if not given.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle at --out.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Results as one JSON line on stdout.")] = False,
) -> None:
    """Export a run's averaged networks as ONNX step graphs, prove them equal to torch, and write one hashed bundle."""
    require_packages("torch", "onnx", "onnxscript", extras="train,export")
    from ul_export.command import export_bundle

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    figures = export_bundle(run, out, opset=opset, weights=weights, threads=threads, overwrite=overwrite, say=say)
    if json_:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:>24}  {f'{value:.4g}' if isinstance(value, float) else value}")


def main() -> None:
    """Console script."""
    run_command(app, "ul-export")
