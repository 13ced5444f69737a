"""ul-train: a recipe and images to a run; distill: students of it; report: its figures; sweep: rate and distortion."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ul_runtime.cli.command import run_command
from ul_runtime.cli.options import AsJson, print_figures, print_table, with_options
from ul_runtime.errors import BadInputError, UsageError
from ul_runtime.install import require_packages
from ul_train.options import DistillOptions, ReportOptions, SweepOptions, TrainOptions

if TYPE_CHECKING:
    from ul_train.config import Config

train_app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
report_app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
sweep_app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
distill_app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def _show_presets(asked: bool) -> None:
    if asked:
        require_packages("torch", extras="train")
        from ul_train.account import presets_table

        print_table(presets_table())
        raise typer.Exit


@train_app.command(
    epilog="Example: ul-train fashion-32 --data fashion-mnist/ --out runs/fashion. "
    "Commands of their own: ul-train distill RUN, ul-train report RUN, ul-train sweep RECIPE (--help)."
)
@with_options
def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="Preset name, TOML file, or a run directory to --resume.")
    ],
    options: TrainOptions,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Look at --data and show counts, epochs, time, sizes, FLOPs and memory; train nothing."
        ),
    ] = False,
    print_recipe: Annotated[
        bool, typer.Option("--print-recipe", help="Print the whole recipe as TOML, and end: > mine.toml")
    ] = False,
    presets: Annotated[
        bool,
        typer.Option("--presets", is_eager=True, callback=_show_presets, help="Show the presets, and end."),
    ] = False,
    json_: AsJson = False,
) -> None:
    """Train a Unified Latents model: encoder, prior and decoder together, then the decoder alone, then the base."""
    require_packages("torch", extras="train")
    from ul_train.config import config_toml, load_config
    from ul_train.stages import stages_of

    run = _run_called(recipe, options)
    config = load_config(str(run / "config.toml") if run else recipe, options.overrides)
    stages_of(config, options.stage)  # a mistake in it is said at once
    if print_recipe:
        return print(config_toml(config), end="")
    if dry_run:
        return _dry_run(config, _data_of(run, options), json_)
    if options.export_check is not None:
        require_packages("onnx", "onnxscript", "onnxruntime", extras="export")
    from ul_train.train import train

    print_figures(train(config, replace(options, out=options.out or run)), json_)


@report_app.command(epilog="Example: ul-train report runs/fashion --images 10000 --mean-of 16")
@with_options
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory with a finished stage joint.")],
    options: ReportOptions,
    json_: AsJson = False,
) -> None:
    """Measure bits per pixel and reconstruction PSNR of a run on held-out images, beside the Gaussian bound."""
    require_packages("torch", extras="train")
    from ul_train.train import report_run

    print_figures(report_run(run, options), json_)


@distill_app.command(epilog="Example: ul-train distill runs/photos --prior-calls 4 --decoder-calls 1")
@with_options
def distill(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Finished run directory.")],
    options: DistillOptions,
    json_: AsJson = False,
) -> None:
    """Train students of a finished run, which sample in few calls, for ul-export; run again, it goes on."""
    require_packages("torch", extras="train")
    from ul_train.train import distill_run

    print_figures(distill_run(run, options), json_)


@sweep_app.command(epilog="Example: ul-train sweep quickstart --data fashion-mnist/ --loss-factors 1.5,2,3 --out sweep")
@with_options
def sweep(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Preset name or TOML file.")],
    options: SweepOptions,
    json_: AsJson = False,
) -> None:
    """Train stage joint once for each loss factor, and draw the rate-distortion curve; run again, it goes on."""
    require_packages("torch", "matplotlib", extras="train")
    from ul_runtime.machine import anonymous
    from ul_train.sweep import sweep, sweep_table

    record = sweep(recipe, options, anonymous("ul-train sweep", sys.argv[1:]))
    print(json.dumps(record) if json_ else sweep_table(record), end="\n" if json_ else "")


def _run_called(recipe: str, options: TrainOptions) -> Path | None:
    """The run directory that `recipe` names, None if it names a recipe; UsageError for other folders."""
    from ul_train.config import preset_names

    run, out = Path(recipe), options.out
    if options.resume and not run.exists() and recipe not in preset_names():
        raise UsageError(f"{recipe}: no such run; give the directory that ul-train --out wrote")
    if not run.is_dir() or (recipe in preset_names() and not options.resume):
        return None
    if not (run / "run.json").is_file():
        if recipe in preset_names():
            return None
        raise UsageError(f"{recipe}: is a folder that holds no run; give a preset, a TOML file or a run directory")
    if not options.resume:
        raise UsageError(f"{recipe}: is a run directory; add --resume to go on with it, or give a preset or TOML file")
    if not (run / "config.toml").is_file():
        raise BadInputError(f"{run}/config.toml: missing; restore the file that ul-train wrote")
    if out is not None and out.resolve() != run.resolve():
        raise UsageError(f"--out {out}: {recipe} goes on in its own directory; leave out --out")
    return run


def _data_of(run: Path | None, options: TrainOptions) -> TrainOptions:
    """With the images of the run to resume, unless others are given."""
    if run is None:
        return options
    from ul_train.run import Run

    info = Run.open(run).info
    return replace(options, data=options.data or info.data, heldout=options.heldout or info.heldout)


def _dry_run(config: "Config", options: TrainOptions, as_json: bool) -> None:
    from ul_train.plan import plan_table
    from ul_train.train import dry_run

    config, figures = dry_run(config, options)
    if as_json:
        print(json.dumps({"recipe": config.model_dump(mode="json"), "account": figures}))
    else:
        print_table(plan_table(figures))


def main() -> None:
    """Console script: `ul-train distill`, `report` and `sweep` are commands of their own, all else trains."""
    for name, app in (("distill", distill_app), ("report", report_app), ("sweep", sweep_app)):
        if sys.argv[1:2] == [name]:
            del sys.argv[1]
            run_command(app, f"ul-train {name}")
    run_command(train_app, "ul-train")
