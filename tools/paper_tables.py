#!/usr/bin/env python
"""The findings of Unified Latents (arXiv 2602.17270) on your own images: tables of runs that differ in one thing.

    python tools/paper_tables.py loss-factor --data fashion-mnist/ --runs runs/tables --out tools/results/tables/fashion

Each row is trained through all stages, exported and evaluated; run again, it goes on where it stopped. Rows of several
tables that are the same run are trained once. TABLES below has the rows, BUDGET what every run of a recipe is given.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from tool_tables import EvalOptions, evaluated, write_results

from ul_runtime.cli.command import run_command
from ul_runtime.cli.options import with_options
from ul_runtime.errors import UsageError

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
PACKAGES = ("unified-latents", "numpy", "onnxruntime", "torch")
UL = "UL"


@dataclass(frozen=True)
class Row:
    """A run by its changes of the recipe; `at_rate_of`: its bits are steered to those measured of another row."""

    label: str
    changes: tuple[str, ...] = ()
    at_rate_of: str | None = None


@dataclass(frozen=True)
class Table:
    """Rows, and what they show; `field`: the one that they differ in, of which other values may be asked for."""

    title: str
    rows: tuple[Row, ...]
    field: str | None = None


def _values(title: str, field: str, values: Sequence[float]) -> Table:
    return Table(title, tuple(Row(f"{value:g}", (f"{field}={value:g}",)) for value in values), field)


TABLES = {
    "loss-factor": _values("Loss factor", "objective.loss_factor", (1.5, 2.0, 3.0, 5.0)),
    "channels": _values("Latent channels", "latent_channels", (1, 2, 4, 8, 16)),
    "prior-and-reconstruction": Table(
        "Prior and reconstruction loss",
        (
            Row(UL),
            Row(
                "MSE: diffusion prior, decoder of one step",
                ("objective.reconstruction=mse", "sampling.decoder_steps=1"),
                at_rate_of=UL,
            ),
            Row("N(0, I): such a prior, diffusion decoder", ("objective.normal_weight=1.0",)),
        ),
    ),
    "ablations": Table(
        "Ablations",
        (
            Row(UL),
            Row(
                "A: no gradient of the prior, weak KL, a quarter of the channels",
                ("objective.normal_weight=0.1", "latent_channels=1"),
            ),
            Row("B: logsnr of z_0 10, not 5", ("objective.latent_logsnr=10.0",)),
            Row("D: learned variance of the encoder", ("objective.learned_variance=true",)),
        ),
    ),
}
# What each run is given: the same images, networks and steps, and so but for the latent's channels the same FLOPs.
BUDGET = {
    "quickstart": (
        "stages.joint.steps=700",
        "stages.joint.accumulate=2",
        "stages.base.steps=500",
        "stages.base.accumulate=2",
        "run.eval_every=700",
        "run.checkpoint_every=250",
    ),
}
# figure -> column, decimals
COLUMNS = {
    "bits_per_pixel": ("bits/pixel, stage-1 prior", 3),
    "bits_per_pixel_base": ("bits/pixel, base", 3),
    "psnr_db": ("PSNR, dB", 2),
    "psnr_mean_db": ("PSNR of mean, dB", 2),
    "gaussian_psnr_db": ("Gaussian at that rate, dB", 2),
    "rfd": ("rFD", 1),
    "gfd": ("gFD", 1),
    "precision": ("precision", 2),
    "recall": ("recall", 2),
}


@app.command()
@with_options
def table(
    name: Annotated[str, typer.Argument(metavar="TABLE", help=", ".join(TABLES))],
    data: Annotated[str, typer.Option(metavar="SOURCE", help="Images, as for ul-train.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where TABLE.json, TABLE.md and TABLE.png go.")],
    options: EvalOptions,
    heldout: Annotated[str | None, typer.Option(metavar="SOURCE", help="Held-out images, as for ul-train.")] = None,
    recipe: Annotated[str, typer.Option(metavar="RECIPE", help="Preset or TOML file.")] = "quickstart",
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Of every row.")] = None,
    seeds: Annotated[str, typer.Option(metavar="A,B,...", help="Seeds of training: one run a row and seed.")] = "0",
    values: Annotated[str | None, typer.Option(metavar="A,B,...", help="Rows by value or start of name.")] = None,
    runs: Annotated[Path, typer.Option(metavar="DIR", help="Where the runs go, one folder each.")] = Path("runs"),
    eval_seeds: Annotated[int, typer.Option(metavar="N", min=1, help="Seeds of sampling.")] = 2,
    mean_of: Annotated[int, typer.Option(metavar="K", min=1, help="Decodes averaged for the distortion.")] = 4,
) -> None:
    """Train, export and evaluate every row of a table, and write it."""
    from ul_runtime.files import durable
    from ul_runtime.machine import origin
    from ul_train.sweep import Variants, option_words

    rows = chosen_rows(name, values)
    held_out = option_words({"--heldout": heldout})
    variants = Variants(recipe, data, runs, [*held_out, *options.shared])
    common = [*BUDGET.get(recipe, ()), *(set_ or [])]
    ask = [*options.words(eval_seeds), *held_out]
    figures: list[dict[str, Any]] = []
    durable.make_directory(out)
    for row in rows:
        for seed in (int(each) for each in seeds.split(",")):
            changes = [*common, *steered(row, seed, figures)]
            name_ = run_name(row, seed, recipe, common)
            run = variants.train(name_, [*changes, f"seed={seed}"], "all")
            found = measured(variants, run, options.images, mean_of, ask)
            figures.append({"row": row.label, "seed": seed, "changes": changes, **found})
    made = origin("python tools/paper_tables.py", PACKAGES)
    record = {"table": name, "recipe": recipe, "figures": figures, **made}
    write_results(out, (f"{name}.json", f"{name}.md", f"{name}.png"), record, markdown(record), plot(record))


def chosen_rows(name: str, values: str | None) -> tuple[Row, ...]:
    """The table's rows, or those of its field at other values, or those whose names begin so; UsageError."""
    if name not in TABLES:
        raise UsageError(f"TABLE {name}: expected one of {', '.join(TABLES)}")
    chosen = TABLES[name]
    if values is None:
        return chosen.rows
    if chosen.field is None:
        starts = values.split(",")
        if unknown := [start for start in starts if not any(row.label.startswith(start) for row in chosen.rows)]:
            known = "; ".join(row.label for row in chosen.rows)
            raise UsageError(f"--values {values}: no row begins with {unknown[0]!r}; {name} has: {known}")
        return tuple(row for row in chosen.rows if row.label.startswith(tuple(starts)))
    try:
        return _values(chosen.title, chosen.field, [float(value) for value in values.split(",")]).rows
    except ValueError:
        raise UsageError(f"--values {values}: expected numbers between commas") from None


def steered(row: Row, seed: int, figures: list[dict[str, Any]]) -> list[str]:
    """The row's changes; with `at_rate_of`, the rate that was measured of that row at this seed."""
    if row.at_rate_of is None:
        return list(row.changes)
    other = next(each for each in figures if (each["row"], each["seed"]) == (row.at_rate_of, seed))
    return [*row.changes, f"objective.target_bits_per_pixel={other['bits_per_pixel']:.3f}"]


def run_name(row: Row, seed: int, recipe: str, common: list[str]) -> str:
    """A folder name that is the same for the same run in every table."""
    from ul_train.config import load_config

    same = load_config(recipe, [*common, *row.changes]) == load_config(recipe, common)
    pairs = [change.split("=") for change in row.changes]
    words = "_".join(f"{field.rpartition('.')[2]}-{value}" for field, value in pairs)
    return f"{'ul' if same else words}_seed-{seed}"


def measured(variants: Any, run: Path, images: int, mean_of: int, ask: list[str]) -> dict[str, Any]:
    """What ul-train report and ul-eval say of a run; kept in the run's folder."""
    from ul_export.evaluation.report import summary
    from ul_runtime.files import durable
    from ul_train.sweep import run_script

    report = variants.measured(run, images, mean_of)
    file, bundle = run / "evaluated.json", run / "bundle"
    record = json.loads(file.read_bytes()) if file.is_file() else {}
    if record.get("asked") != ask:
        if not bundle.exists():
            run_script("ul-export", str(run), "--out", str(bundle))
        record = {"asked": ask, "figures": evaluated(bundle, variants.data, ask)}
        durable.atomic_write(file, json.dumps(record).encode())
    kept = ("bits_per_pixel", "psnr_db", "psnr_mean_db", "gaussian_psnr_db", "latent_std", "decoder_steps", "mean_of")
    of_base = summary(record["figures"])
    of_base["bits_per_pixel_base"] = of_base.pop("bits_per_pixel")
    return {
        **of_base,
        **{key: report.get(key) for key in kept},
        "num_images": report["num_images"],
        "flops": flops(run),
        "settings": record["figures"]["settings"],
    }


def flops(run: Path) -> dict[str, int]:
    """Of training, each stage."""
    from ul_train.account import account
    from ul_train.run import Run
    from ul_train.stages import own_stages

    trained = Run.open(run)
    figures = account(trained.config, len(trained.info.class_names))
    return {stage.name: figures[stage.name]["flops_of_stage"] for stage in own_stages(trained.config)}


def averaged(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry a row: means over the seeds of training, and their standard deviation where there are several."""
    from statistics import fmean, stdev

    rows: dict[str, list[dict[str, Any]]] = {}
    for each in record["figures"]:
        rows.setdefault(each["row"], []).append(each)
    result = []
    for label, runs in rows.items():
        known = {key: [run[key] for run in runs if run[key] is not None] for key in COLUMNS}
        entry: dict[str, Any] = {"row": label}
        entry |= {key: fmean(values) if values else None for key, values in known.items()}
        entry |= {f"{key}_spread": stdev(values) for key, values in known.items() if len(values) > 1}
        result.append(entry)
    return result


def markdown(record: dict[str, Any]) -> str:
    """The table and what it was made with."""
    from ul_train.sweep import markdown_table

    table_ = TABLES[record["table"]]
    columns = [table_.title.lower(), *(title for title, _ in COLUMNS.values())]
    lines = markdown_table(columns, ([row["row"], *(cell(row, key) for key in COLUMNS)] for row in averaged(record)))
    first = record["figures"][0]
    teraflops = sum(first["flops"].values()) / 1e12
    seeds = ", ".join(str(seed) for seed in sorted({each["seed"] for each in record["figures"]}))
    how = (
        f"rFD and gFD: Frechet distance of {first['count']} images, {first['space']} features; of real images to as "
        f"many others: {first['gfd_real']:.1f}. PSNR of {first['num_images']} held-out images, "
        f"{first['decoder_steps']} decoder steps, mean of {first['mean_of']} decodes. {teraflops:.0f} TFLOP of "
        f"training a row, seeds {seeds}."
    )
    return "\n".join([*lines, "", how, "", f"`{record['command']}`", ""])


def cell(row: dict[str, Any], key: str) -> str:
    """A value with its spread over the seeds, as Markdown."""
    decimals = COLUMNS[key][1]
    if row[key] is None:
        return ""
    spread = row.get(f"{key}_spread")
    return f"{row[key]:.{decimals}f}" + (f" ± {spread:.{decimals}f}" if spread is not None else "")


def plot(record: dict[str, Any]) -> bytes:
    """PNG: PSNR, rFD and gFD over the rate; a line where the rows are values of one field."""
    from matplotlib.figure import Figure

    from ul_train.log import figure_png, name_points

    rows = sorted(averaged(record), key=lambda row: float(row["bits_per_pixel"]))
    rates = [row["bits_per_pixel"] for row in rows]
    line = "-" if TABLES[record["table"]].field else ""
    figure = Figure(figsize=(12, 4), layout="constrained")
    first, second, third = figure.subplots(1, 3)
    if all(row["gaussian_psnr_db"] is not None for row in rows):
        first.plot(rates, [row["gaussian_psnr_db"] for row in rows], "--", color="grey", label="Gaussian at that rate")
    first.plot(rates, [row["psnr_mean_db"] for row in rows], f"o{line}", label="mean of several decodes")
    first.plot(rates, [row["psnr_db"] for row in rows], f"s{line}", label="one decode")
    first.legend()
    second.plot(rates, [row["rfd"] for row in rows], f"o{line}")
    third.plot(rates, [row["gfd"] for row in rows], f"o{line}")
    third.axhline(record["figures"][0]["gfd_real"], color="grey", linestyle="--", label="real images")
    third.legend()
    for axes, key, title in (
        (first, "psnr_mean_db", "PSNR, dB"),
        (second, "rfd", "Frechet distance of reconstructions"),
        (third, "gfd", "Frechet distance of samples"),
    ):
        name_points(axes, ((row["bits_per_pixel"], row[key], row["row"].partition(":")[0]) for row in rows))
        axes.set(xlabel="bits per pixel, stage-1 prior", title=title)
        axes.margins(x=0.3, y=0.15)  # room for names
        axes.grid(alpha=0.3)
    return figure_png(figure, 110)


if __name__ == "__main__":
    run_command(app, "paper_tables")
