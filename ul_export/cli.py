"""ul-export: a run directory to a verified bundle."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ul_runtime.cli.options import print_figures
from ul_runtime.errors import BadInputError, StoppedError, UsageError, require_packages, run_command

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
    int | None,
    typer.Option(
        metavar="18|20|22|23",
        help="ONNX opset of the graphs; from 23 on attention is one operator.",
        show_default="20; --bf16: 22",
    ),
]
Weights = Annotated[
    str, typer.Option(metavar="fp32|fp16", help="How weights are stored where graphs compute in float32.")
]

Tensorrt = Annotated[
    bool, typer.Option("--tensorrt", help="Build TensorRT engines too; RUN may be a finished bundle, then only these.")
]
Target = Annotated[
    list[str] | None,
    typer.Option(metavar="SM", help="Build for this architecture (sm89); repeatable.", show_default="this card's"),
]
MaxBatch = Annotated[int, typer.Option(metavar="IMAGES", min=1, help="Largest batch that the engines take.")]
Refittable = Annotated[
    bool, typer.Option("--refittable", help="Engines that take newer weights in seconds; may run slower.")
]
EngineFolder = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Where engines are kept: a folder of your own.", show_default="the user's cache"),
]

_ENGINES_ONLY = "give --tensorrt and its options only"


@app.command(epilog="Example: ul-export runs/fashion --out fashion.bundle")
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of ul-train; a bundle with --tensorrt.")],
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
    tensorrt: Tensorrt = False,
    target: Target = None,
    max_batch: MaxBatch = 64,
    refittable: Refittable = False,
    engines: EngineFolder = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="CPU threads; all cores if not given.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(metavar="DIR", help="Prepared images, as for ul-train.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle at --out.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Results as one JSON line on stdout.")] = False,
) -> None:
    """Export a run's averaged networks as ONNX step graphs, prove them equal to torch, and write one hashed bundle."""
    build = _engine_builder(run, tensorrt, target, max_batch, engines, refittable)
    kind = _precision({"fp16": fp16, "bf16": bf16, "int8": int8})
    changed = kind != "fp32" or opset is not None or weights != "fp32" or calibrate is not None
    if build is not None and _is_bundle(run):
        if changed or check or update is not None or out is not None or overwrite:
            raise UsageError(f"{run} is a bundle, whose engines are built as it is; {_ENGINES_ONLY}")
        return print_figures(build(run), json_)
    require_packages("torch", "onnx", "onnxscript", "matplotlib", extras="train,export")
    from ul_export.export import ExportOptions, export_bundle
    from ul_runtime.machine import cache_dir
    from ul_runtime.progress import print_line

    if check:
        if changed or build is not None or update is not None or out is not None or overwrite:
            raise UsageError("--check writes nothing, in float32; leave out all but --threads and --json")
        from ul_export.export import check_export

        return print_figures(check_export(run, threads, print_line), json_)
    if update is not None:
        if kind != "fp32" or opset is not None or weights != "fp32":
            raise UsageError("--update keeps the bundle's precision and opset; leave them out")
        from ul_export.export import update_bundle

        out = out or update
        figures = update_bundle(run, update, out, threads, print_line, calibrate=calibrate, cache=cache_dir(cache))
    elif out is None:
        raise UsageError("--out is missing; see ul-export --help")
    else:
        options = ExportOptions(opset, kind, weights, calibrate, cache_dir(cache), threads, overwrite)
        figures = export_bundle(run, out, options, print_line)
    print_figures(figures | (_build_of(out, build) if build is not None else {}), json_)


def _build_of(bundle: Path, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """The engines of a bundle that was just written; an error says that it is whole."""
    try:
        return build(bundle)
    except BadInputError as error:
        raise BadInputError(f"{error}; the bundle {bundle} is whole") from error
    except StoppedError as error:
        done = str(error).partition("; run the same")[0]
        how = f"go on with ul-export {bundle} --tensorrt and the options for engines that you gave"
        raise StoppedError(f"{done}; the bundle {bundle} is whole: {how}") from None


def _precision(given: dict[str, bool]) -> Any:
    """The one that is asked for, or fp32."""
    asked = [kind for kind, wanted in given.items() if wanted]
    if len(asked) > 1:
        raise UsageError(f"--{asked[0]} and --{asked[1]}: give one of them")
    return asked[0] if asked else "fp32"


def _engine_builder(
    run: Path, tensorrt: bool, target: list[str] | None, max_batch: int, engines: Path | None, refittable: bool
) -> Callable[[Path], dict[str, Any]] | None:
    """What builds the engines of a bundle, checked before any work; None without --tensorrt."""
    if not tensorrt:
        if target or engines is not None or refittable:
            raise UsageError("--target, --engines and --refittable are for --tensorrt; give that too")
        return None
    if not (run.exists() or _is_bundle(run)):
        raise BadInputError(f"{run}: no such run, bundle or model of the package")
    from ul_export.engines import build_engines, open_engines

    opened = open_engines(target or [], max_batch, engines, refittable)
    return lambda bundle: build_engines(opened, bundle)


def _is_bundle(path: Path) -> bool:
    """A folder with a bundle's manifest, or the name of a model inside the package."""
    from ul_runtime.loading import shipped_names
    from ul_runtime.manifest import is_bundle

    return is_bundle(path) if path.exists() else str(path) in shipped_names()


def main() -> None:
    """Console script."""
    run_command(app, "ul-export")
