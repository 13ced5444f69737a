"""ul-export: a run directory to a verified bundle."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ul_export.options import EngineOptions, ExportOptions
from ul_runtime.cli.command import run_command
from ul_runtime.cli.options import AsJson, print_figures, with_options
from ul_runtime.errors import BadInputError, StoppedError, UsageError
from ul_runtime.install import require_packages

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(epilog="Example: ul-export runs/fashion --out fashion.bundle")
@with_options
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of ul-train; a bundle with --tensorrt.")],
    options: ExportOptions,
    engines: EngineOptions,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="The bundle to write.", show_default="--update: that one"),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Verify that RUN exports as it stands, finished or not; write nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Export a run's averaged networks as ONNX step graphs, verify them against torch, and write one hashed bundle."""
    build = _engine_builder(run, engines)
    plain = out is None and options == ExportOptions(threads=options.threads)
    if build is not None and _is_bundle(run):
        if check or not plain:
            raise UsageError(
                f"{run} is a bundle, whose engines are built as it is; give --tensorrt and its options only"
            )
        return print_figures(build(run), as_json)
    require_packages("torch", "onnx", "onnxscript", "matplotlib", extras="train,export")
    from ul_export.export import check_export, export_bundle

    if check:
        if build is not None or not plain:
            raise UsageError("--check writes nothing, in float32; leave out all but --threads and --json")
        return print_figures(check_export(run, options.threads), as_json)
    out = out or options.update
    if out is None:
        raise UsageError("--out is missing; see ul-export --help")
    figures = export_bundle(run, out, options)
    print_figures(figures | (_build_of(out, build) if build is not None else {}), as_json)


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


def _engine_builder(run: Path, options: EngineOptions) -> Callable[[Path], dict[str, Any]] | None:
    """What builds the engines of a bundle, checked before any work; None without --tensorrt."""
    if not options.tensorrt:
        if options != EngineOptions():
            raise UsageError("--target, --max-batch, --engines and --refittable are for --tensorrt; give that too")
        return None
    if not (run.exists() or _is_bundle(run)):
        raise BadInputError(f"{run}: no such run, bundle or model of the package")
    from ul_export.engines import build_engines, open_engines
    from ul_runtime.settings import check_count

    check_count("--max-batch", options.max_batch)

    opened = open_engines(options.target, options.max_batch, options.engines, options.refittable)
    return lambda bundle: build_engines(opened, bundle)


def _is_bundle(path: Path) -> bool:
    """A folder with a bundle's manifest, or the name of a model inside the package."""
    from ul_runtime.loading import shipped_names
    from ul_runtime.manifest import is_bundle

    return is_bundle(path) if path.exists() else str(path) in shipped_names()


def main() -> None:
    """Console script."""
    run_command(app, "ul-export")
