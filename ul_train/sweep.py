"""ul-train sweep: one short training of stage joint for each loss factor, and the rate-distortion curve they make."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ul_runtime import durable
from ul_runtime.errors import UsageError
from ul_runtime.loop import never
from ul_runtime.origin import commit, versions
from ul_train.command import open_splits
from ul_train.config import Config
from ul_train.heldout import yardstick
from ul_train.plots import figure_png, name_points
from ul_train.rate_distortion import gaussian_psnr_db
from ul_train.session import read_run
from ul_train.variants import Variants

FILES = ("results.json", "table.md", "plot.png")
_STEERED = ("objective.loss_factor", "objective.target_bits_per_pixel")
_PACKAGES = ("unified-latents", "numpy", "torch")
# figure -> column; a row each in the order of rate
_COLUMNS = {
    "loss_factor": "loss_factor",
    "bits_per_pixel": "bits/pixel",
    "psnr_db": "PSNR, one decode (dB)",
    "psnr_mean_db": "PSNR of the mean (dB)",
    "gaussian_psnr_db": "Gaussian at that rate (dB)",
}


@dataclass(frozen=True)
class SweepOptions:
    """What is asked for: `images` held-out images, `mean_of` decodes of each."""

    out: Path
    factors: Sequence[float]
    overrides: Sequence[str]
    images: int
    mean_of: int
    heldout: str | None
    cache: Path


def parse_factors(text: str) -> list[float]:
    """Positive numbers between commas, none twice; UsageError."""
    try:
        factors = [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--loss-factors {text}: expected numbers between commas, for example 1.5,2,3") from None
    if not all(0.0 < factor < float("inf") for factor in factors) or len(set(factors)) != len(factors):
        raise UsageError(f"--loss-factors {text}: expected numbers above 0, each once")
    return factors


def sweep(variants: Variants, options: SweepOptions, command: str) -> dict[str, Any]:
    """Train and measure every loss factor; writes FILES into `options.out` and returns what results.json holds."""
    for override in options.overrides:
        if (field := override.partition("=")[0].strip()) in _STEERED:
            raise UsageError(f"--set {field}: a sweep sets it for each run; give --loss-factors")
    durable.make_directory(options.out)
    durable.check_output_directory(options.out, (*FILES, "runs"))
    rows = []
    for factor in options.factors:
        run = variants.train(f"loss-factor-{factor:g}", [*options.overrides, f"objective.loss_factor={factor}"])
        rows.append({"loss_factor": factor, **variants.measured(run, options.images, options.mean_of)})
    config, info = read_run(run)
    record = {
        "command": command,
        "figures": rows,
        "config": config.model_dump(mode="json", exclude={"objective": {"loss_factor"}}),
        "data_fingerprint": info.data_fingerprint,
        "versions": versions(_PACKAGES),
        "commit": commit(),
        "gaussian_curve": _gaussian_curve(config, variants.data, options, rows),
    }
    durable.write_json(options.out / "results.json", record)
    durable.atomic_write(options.out / "table.md", sweep_table(record).encode())
    durable.atomic_write(options.out / "plot.png", _plot(record))
    return record


def _gaussian_curve(
    config: Config, data: str, options: SweepOptions, rows: list[dict[str, Any]]
) -> list[tuple[float, float]]:
    """(bits per pixel, PSNR) of the Gaussian rate-distortion function around the rates measured; [] if not computed."""
    splits = open_splits(config.image, data, options.heldout, options.cache, never)
    eigenvalues, _ = yardstick(splits.heldout, splits.train, rows[0]["num_images"])
    if eigenvalues is None:
        return []
    rates = [row["bits_per_pixel"] for row in rows]
    low, high = 0.8 * min(rates), 1.2 * max(rates)
    return [(float(r), gaussian_psnr_db(eigenvalues, r * config.image.size**2)) for r in np.linspace(low, high, 50)]


def _by_rate(record: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(record["figures"], key=lambda row: float(row["bits_per_pixel"]))


def sweep_table(record: dict[str, Any]) -> str:
    """Markdown, one row a loss factor, in the order of rate."""
    lines = ["| " + " | ".join(_COLUMNS.values()) + " |", "|" + "---|" * len(_COLUMNS)]
    for row in _by_rate(record):
        cells = [f"{row['loss_factor']:g}", f"{row['bits_per_pixel']:.4f}"]
        cells += [f"{row[name]:.2f}" if row.get(name) is not None else "" for name in list(_COLUMNS)[2:]]
        lines.append("| " + " | ".join(cells) + " |")
    first = record["figures"][0]
    how = f"{first['num_images']} held-out images, {first['decoder_steps']} decoder steps, mean of {first['mean_of']}"
    return "\n".join([*lines, "", f"{how}, seed {record['config']['seed']}. `{record['command']}`", ""])


def _plot(record: dict[str, Any]) -> bytes:
    """PNG: PSNR over bits per pixel, with the Gaussian rate-distortion function."""
    from matplotlib.figure import Figure

    rows = _by_rate(record)
    rates = [row["bits_per_pixel"] for row in rows]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    if record["gaussian_curve"]:
        axes.plot(
            *zip(*record["gaussian_curve"], strict=True), "--", color="grey", label="Gaussian of the same covariance"
        )
    axes.plot(rates, [row["psnr_mean_db"] for row in rows], "o-", label=f"mean of {rows[0]['mean_of']} decodes")
    axes.plot(rates, [row["psnr_db"] for row in rows], "s-", label="one decode")
    name_points(axes, ((row["bits_per_pixel"], row["psnr_mean_db"], f"{row['loss_factor']:g}") for row in rows))
    title = f"{record['config']['name']}: loss_factor at each point"
    axes.set(xlabel="bits per pixel", ylabel="PSNR (dB)", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    return figure_png(figure, 120)
