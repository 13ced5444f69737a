#!/usr/bin/env python
"""A sweep of the loss factor: one short training of stage joint a value, then bits and PSNR as JSON, table and plot.

    python tools/loss_factor_sweep.py fashion-32 --data fashion-mnist/ --values 1.5,2,3 --set joint.steps=500 \
        --out tools/results/fashion-loss-factor

Run it again to go on: runs that are finished and measured are kept.
"""

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ul_runtime.errors import UsageError, run_command

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
COMMAND = (sys.executable, "-c", "from ul_train.cli import main; main()")
FIGURES = ("loss_factor", "bits_per_pixel", "psnr_db", "psnr_mean_db", "gaussian_psnr_db")


@app.command()
def sweep(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Preset or TOML file, as for ul-train.")],
    data: Annotated[str, typer.Option(metavar="SOURCE", help="Images, as for ul-train.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where results.json, table.md and plot.png go.")],
    values: Annotated[str, typer.Option(metavar="A,B,...", help="Loss factors, in the order of training.")] = "1.5,2,3",
    heldout: Annotated[str | None, typer.Option(metavar="SOURCE", help="Held-out images, as for ul-train.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="As for ul-train.")] = None,
    runs: Annotated[Path, typer.Option(metavar="DIR", help="Where the runs go, one folder each.")] = Path("runs/sweep"),
    images: Annotated[int, typer.Option(metavar="N", min=1, help="Held-out images measured.")] = 1000,
    mean_of: Annotated[int, typer.Option(metavar="K", min=1, help="Decodes averaged for the distortion.")] = 16,
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads.")] = None,
    cache: Annotated[Path | None, typer.Option(metavar="DIR", help="Prepared images, as for ul-train.")] = None,
) -> None:
    """Train once for each loss factor and measure rate against distortion."""
    from ul_runtime import durable

    factors = parse_values(values)
    options = {"--threads": threads, "--cache": cache, "--heldout": heldout}
    shared = [str(word) for name, value in options.items() if value is not None for word in (name, value)]
    rows = []
    for factor in factors:
        run = runs / f"loss-factor-{factor:g}"
        train(run, recipe, data, [*(set_ or []), f"objective.loss_factor={factor}"], shared)
        rows.append({"loss_factor": factor, **measured(run, data, images, mean_of, shared)})
    record = {"command": anonymous(sys.argv), "figures": rows, **origin(runs / f"loss-factor-{factors[0]:g}")}
    record["gaussian_curve"] = gaussian_curve(runs / f"loss-factor-{factors[0]:g}", data, heldout, cache, rows)
    durable.make_directory(out)
    durable.atomic_write(out / "results.json", (json.dumps(record, indent=1) + "\n").encode())
    durable.atomic_write(out / "table.md", table(record).encode())
    durable.atomic_write(out / "plot.png", plot(record))
    print(table(record), end="")


def parse_values(text: str) -> list[float]:
    """Positive numbers between commas, none twice; UsageError."""
    try:
        factors = [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--values {text}: expected numbers between commas, for example 1.5,2,3") from None
    if not all(0.0 < factor < float("inf") for factor in factors) or len(set(factors)) != len(factors):
        raise UsageError(f"--values {text}: expected numbers above 0, each once")
    return factors


def ul_train(*arguments: object) -> None:
    """Run the command in a process of its own; ends this one with its exit code if it fails."""
    words = [str(argument) for argument in arguments]
    print("ul-train", *words, file=sys.stderr, flush=True)
    code = subprocess.run([*COMMAND, *words], stdout=subprocess.DEVNULL).returncode
    if code:
        sys.exit(code)


def train(run: Path, recipe: str, data: str, overrides: list[str], shared: list[str]) -> None:
    """Stage joint of one run, from where it stands; another recipe than the run's is refused by ul-train."""
    changes = [word for override in overrides for word in ("--set", override)]
    going_on = ["--resume"] if (run / "run.json").is_file() else []
    if going_on and (run / "measured.json").is_file():
        from ul_train.config import load_config
        from ul_train.session import read_run

        if read_run(run)[0] == load_config(recipe, overrides):
            print(f"{run}: finished before", file=sys.stderr)
            return
    # The report of 16 images at the end of training is not the one that counts: see `measured`.
    ul_train(
        recipe, "--data", data, "--out", run, "--stage", "joint", "--report-images", 16, *changes, *shared, *going_on
    )


def measured(run: Path, data: str, images: int, mean_of: int, shared: list[str]) -> dict[str, Any]:
    """Held-out figures of a finished run by ul-train report, kept in measured.json with how they were taken."""
    from ul_runtime import durable

    file, asked = run / "measured.json", {"images": images, "mean_of": mean_of}
    if file.is_file():
        record = json.loads(file.read_text())
        if record["asked"] == asked:
            return dict(record["figures"])
    ul_train("report", run, "--data", data, "--images", images, "--mean-of", mean_of, *shared)
    figures = json.loads((run / "report.json").read_text())
    durable.atomic_write(file, json.dumps({"asked": asked, "figures": figures}).encode())
    return dict(figures)


def anonymous(arguments: list[str]) -> str:
    """The command without the folders of this machine."""
    short = [Path(word).name if Path(word).is_absolute() else word for word in arguments[1:]]
    return " ".join(["python tools/loss_factor_sweep.py", *short])


def origin(run: Path) -> dict[str, Any]:
    """Recipe of the first run, seed, data, versions and commit."""
    import numpy
    import torch

    from ul_runtime import __version__
    from ul_train.session import read_run

    config, info = read_run(run)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return {
        "config": config.model_dump(mode="json"),
        "seed": config.seed,
        "data_fingerprint": info.data_fingerprint,
        "versions": {
            "unified-latents": __version__,
            "commit": commit.stdout.strip() or None,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
        },
    }


def gaussian_curve(
    run: Path, data: str, heldout: str | None, cache: Path | None, rows: list[dict[str, Any]]
) -> list[tuple[float, float]]:
    """(bits per pixel, PSNR) of the Gaussian rate-distortion function around the rates measured; [] if not computed."""
    import numpy as np

    from ul_runtime.loop import never
    from ul_train.cli import cache_dir
    from ul_train.command import open_splits
    from ul_train.heldout import yardstick
    from ul_train.rate_distortion import gaussian_psnr_db
    from ul_train.session import read_run

    config = read_run(run)[0]
    splits = open_splits(config.image, data, heldout, cache_dir(cache), never)
    eigenvalues, _ = yardstick(splits.heldout, splits.train, rows[0]["num_images"])
    if eigenvalues is None:
        return []
    rates = [row["bits_per_pixel"] for row in rows]
    low, high = 0.8 * min(rates), 1.2 * max(rates)
    return [(float(r), gaussian_psnr_db(eigenvalues, r * config.image.size**2)) for r in np.linspace(low, high, 50)]


def table(record: dict[str, Any]) -> str:
    """Markdown, one row a value, in the order of rate."""
    names = (
        "loss_factor",
        "bits/pixel",
        "PSNR, one decode (dB)",
        "PSNR of the mean (dB)",
        "Gaussian at that rate (dB)",
    )
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in sorted(record["figures"], key=lambda row: row["loss_factor"]):
        cells = [f"{row['loss_factor']:g}", f"{row['bits_per_pixel']:.4f}"]
        cells += [f"{row[name]:.2f}" if row.get(name) is not None else "" for name in FIGURES[2:]]
        lines.append("| " + " | ".join(cells) + " |")
    first = record["figures"][0]
    how = f"{first['num_images']} held-out images, {first['decoder_steps']} decoder steps, mean of {first['mean_of']}"
    return "\n".join([*lines, "", f"{how}, seed {record['seed']}. `{record['command']}`", ""])


def plot(record: dict[str, Any]) -> bytes:
    """PNG: PSNR over bits per pixel, with the Gaussian rate-distortion function."""
    from io import BytesIO

    from matplotlib.figure import Figure

    rows = sorted(record["figures"], key=lambda row: row["bits_per_pixel"])
    rates = [row["bits_per_pixel"] for row in rows]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    if record["gaussian_curve"]:
        axes.plot(
            *zip(*record["gaussian_curve"], strict=True), "--", color="grey", label="Gaussian of the same covariance"
        )
    axes.plot(rates, [row["psnr_mean_db"] for row in rows], "o-", label=f"mean of {rows[0]['mean_of']} decodes")
    axes.plot(rates, [row["psnr_db"] for row in rows], "s-", label="one decode")
    for row in rows:
        axes.annotate(
            f"{row['loss_factor']:g}", (row["bits_per_pixel"], row["psnr_mean_db"]), (4, 6), textcoords="offset points"
        )
    axes.set(
        xlabel="bits per pixel", ylabel="PSNR (dB)", title=f"{record['config']['name']}: loss_factor at each point"
    )
    axes.legend()
    axes.grid(alpha=0.3)
    data = BytesIO()
    figure.savefig(data, format="png", dpi=120, metadata={"Software": None})
    return data.getvalue()


if __name__ == "__main__":
    run_command(app, "loss_factor_sweep")
