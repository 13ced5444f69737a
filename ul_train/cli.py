"""ul-train: a recipe and images to a run; report: a run's held-out figures; sweep: rate against distortion."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ul_runtime.cli.options import print_figures
from ul_runtime.errors import BadInputError, UsageError, require_packages, run_command
from ul_runtime.machine import cache_dir

train_app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
report_app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
sweep_app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

Data = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE", help="Images: folder (class = sub-folder), IDX folder, .npz, hf:NAME, WebDataset shards."
    ),
]
Heldout = Annotated[
    str | None, typer.Option(metavar="SOURCE", help="Held-out images; default: the source's own, or 5 %.")
]
SetFields = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of the recipe; repeatable.")
]
Images = Annotated[int, typer.Option(metavar="N", min=1, help="How many held-out images.")]
MeanOf = Annotated[int, typer.Option(metavar="K", min=1, help="Decodes averaged for the distortion.")]
AsJson = Annotated[bool, typer.Option("--json", help="Results as one JSON line on stdout.")]
Threads = Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads; all cores if not given.")]
TargetBits = Annotated[
    float | None,
    typer.Option(
        metavar="BITS", help="Steer loss_factor to this rate: short for --set objective.target_bits_per_pixel=BITS."
    ),
]
Cache = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Where prepared images are kept; default $UL_CACHE or the user's cache."),
]


@train_app.command(
    epilog="Example: ul-train fashion-32 --data fashion-mnist/ --out runs/fashion. "
    "Commands of their own: ul-train report RUN, ul-train sweep RECIPE (--help)."
)
def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="Preset name, TOML file, or a run directory to --resume.")
    ],
    data: Data = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Run directory to write.")] = None,
    heldout: Heldout = None,
    set_: SetFields = None,
    target_bits_per_pixel: TargetBits = None,
    stage: Annotated[str, typer.Option(metavar="joint|base|all", help="Which stage to train.")] = "all",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    allow: Annotated[
        list[str] | None, typer.Option(metavar="FIELD", help="A recipe field that --resume may change; repeatable.")
    ] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda[:N]", help="Where to compute.")] = "auto",
    threads: Threads = None,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Compile the networks: a minute first, then faster.")
    ] = False,
    cache: Cache = None,
    report_images: Annotated[int, typer.Option(metavar="N", min=1, help="Held-out images in the final report.")] = 512,
    export_check: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Every N steps, prove that the networks export (ul-export --check)."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show sizes, FLOPs, memory and the resolved recipe; write nothing.")
    ] = False,
    json_: AsJson = False,
) -> None:
    """Train a Unified Latents model: encoder, prior and decoder together, then the base prior on their latents."""
    require_packages("torch", extras="train")
    from ul_train.config import load_config

    run = _run_named(recipe, out, resume)
    config = load_config(str(run / "config.toml") if run else recipe, _overrides(set_, target_bits_per_pixel))
    if stage not in ("joint", "base", "all"):
        raise UsageError(f"--stage {stage}: expected joint, base or all")
    if dry_run:
        _dry_run(config, json_)
        return
    if export_check is not None:
        require_packages("onnx", "onnxscript", "onnxruntime", extras="export")
    from ul_train.train import TrainOptions, train_command

    options = TrainOptions(
        out=out or run,
        data=data,
        heldout=heldout,
        stages=("joint", "base") if stage == "all" else (stage,),
        resume=resume,
        allow=allow or [],
        device=device,
        threads=threads,
        compile=compile_,
        cache=cache_dir(cache),
        report_images=report_images,
        export_check=export_check,
    )
    print_figures(train_command(config, options), json_)


@report_app.command(epilog="Example: ul-train report runs/fashion --images 10000 --mean-of 16")
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory with a finished stage joint.")],
    data: Data = None,
    heldout: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Held-out images, as given to ul-train.")
    ] = None,
    images: Images = 1000,
    mean_of: MeanOf = 16,
    decoder_steps: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Decoder steps; default: the recipe's.")
    ] = None,
    threads: Threads = None,
    cache: Cache = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda[:N]", help="Where to compute.")] = "auto",
    precision: Annotated[
        str, typer.Option(metavar="fp32|bf16", help="What the networks compute in; bf16 is faster where it is native.")
    ] = "fp32",
    json_: AsJson = False,
) -> None:
    """Measure bits per pixel and reconstruction PSNR of a run on held-out images, beside the Gaussian bound."""
    require_packages("torch", extras="train")
    from ul_train.train import report_command

    figures = report_command(
        run, data, heldout, images, mean_of, decoder_steps, threads, cache_dir(cache), device, precision
    )
    print_figures(figures, json_)


@sweep_app.command(epilog="Example: ul-train sweep quickstart --data fashion-mnist/ --loss-factors 1.5,2,3 --out sweep")
def sweep(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Preset name or TOML file.")],
    data: Data = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for results.json, table.md and plot.png; runs go below.")
    ] = None,
    loss_factors: Annotated[str, typer.Option(metavar="A,B,...", help="In the order of training.")] = "1.5,2,3",
    heldout: Heldout = None,
    set_: SetFields = None,
    images: Images = 1000,
    mean_of: MeanOf = 16,
    threads: Threads = None,
    cache: Cache = None,
    json_: AsJson = False,
) -> None:
    """Train stage joint once for each loss factor, and draw the rate-distortion curve; run again, it goes on."""
    require_packages("torch", "matplotlib", extras="train")
    from ul_runtime.machine import anonymous
    from ul_train import sweep as sweeping
    from ul_train.config import load_config
    from ul_train.sweep import Variants, option_words

    if data is None or out is None:
        raise UsageError(f"{'--out' if data else '--data'} is missing; see ul-train sweep --help")
    overrides, factors = set_ or [], sweeping.parse_factors(loss_factors)
    load_config(recipe, overrides)  # a mistake in it is said at once
    shared = option_words({"--heldout": heldout, "--threads": threads, "--cache": cache})
    options = sweeping.SweepOptions(out, factors, overrides, images, mean_of, heldout, cache_dir(cache))
    command = anonymous("ul-train sweep", sys.argv[1:])
    record = sweeping.sweep(Variants(recipe, data, out / "runs", shared), options, command)
    print(json.dumps(record) if json_ else sweeping.sweep_table(record), end="\n" if json_ else "")


def _overrides(set_: list[str] | None, target_bits_per_pixel: float | None) -> list[str]:
    """--set, and what is short for it."""
    target = [] if target_bits_per_pixel is None else [f"objective.target_bits_per_pixel={target_bits_per_pixel}"]
    return [*(set_ or []), *target]


def _run_named(recipe: str, out: Path | None, resume: bool) -> Path | None:
    """The run directory that `recipe` names, None if it names a recipe; UsageError for other folders."""
    from ul_train.config import preset_names

    run = Path(recipe)
    if not run.is_dir() or (recipe in preset_names() and not resume):
        return None
    if not (run / "run.json").is_file():
        if recipe in preset_names():
            return None
        raise UsageError(f"{recipe}: is a folder that holds no run; give a preset, a TOML file or a run directory")
    if not resume:
        raise UsageError(f"{recipe}: is a run directory; add --resume to go on with it, or give a preset or TOML file")
    if not (run / "config.toml").is_file():
        raise BadInputError(f"{run}/config.toml: missing; restore the file that ul-train wrote")
    if out is not None and out.resolve() != run.resolve():
        raise UsageError(f"--out {out}: {recipe} goes on in its own directory; leave out --out")
    return run


def _dry_run(config: Any, as_json: bool) -> None:
    from dataclasses import asdict

    from rich.console import Console

    from ul_train.account import account, account_table
    from ul_train.config import config_toml

    figures = account(config, num_classes=10 if config.image.labels else 0)
    if as_json:
        print(json.dumps({"recipe": config.model_dump(mode="json"), "account": asdict(figures)}))
        return
    print(config_toml(config))
    Console().print(account_table(figures))


def main() -> None:
    """Console script: `ul-train report` and `ul-train sweep` are commands of their own, all else trains."""
    for name, app in (("report", report_app), ("sweep", sweep_app)):
        if sys.argv[1:2] == [name]:
            del sys.argv[1]
            run_command(app, f"ul-train {name}")
    run_command(train_app, "ul-train")
