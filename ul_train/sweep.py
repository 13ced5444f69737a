"""ul-train sweep: one short training of stage joint for each loss factor, and the rate-distortion curve they make."""

import json
import logging
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ul_runtime.errors import StoppedError, UsageError
from ul_runtime.files import durable
from ul_runtime.files.json_file import read_if_whole
from ul_runtime.install import install
from ul_runtime.machine import commit, versions
from ul_runtime.signals import asked_to_stop, check_stopped, stop_on_signal, waiting_for_a_command
from ul_train.config import Config, load_config
from ul_train.data.prepare import open_splits
from ul_train.heldout import bound_eigenvalues, gaussian_psnr_db
from ul_train.log import figure_png, name_points
from ul_train.options import SweepOptions
from ul_train.run import Run

logger = logging.getLogger(__name__)


def option_words(given: Mapping[str, object]) -> list[str]:
    """The options that are given, and their values, as words of a command."""
    return [str(word) for name, value in given.items() if value is not None for word in (name, value)]


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table in Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (columns, *rows)]
    return [lines[0], "|" + "---|" * len(columns), *lines[1:]]


_ASK_S = 0.2  # between two questions whether to stop


def run_script(name: str, *words: str) -> str:
    """A console script that is installed beside this Python, in a process of its own; see run_to_end. UsageError."""
    program = shutil.which(name, path=str(Path(sys.executable).parent))
    if program is None:
        raise UsageError(f"{name} is not installed beside {sys.executable}; {install()} there")
    logger.info(" ".join((name, *words)))
    return run_to_end([program, *words])


def run_to_end(program: Sequence[str]) -> str:
    """stdout of a command in a process of its own, whose progress goes to stderr; ends this one with its exit code.

    A signal is passed on to the command, which saves what it has; then StoppedError.
    """
    printed, told = None, False
    with (
        stop_on_signal(),
        waiting_for_a_command(),
        subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process,
    ):
        while printed is None:
            try:
                printed, _ = process.communicate(timeout=_ASK_S)
            except subprocess.TimeoutExpired:
                if asked_to_stop() and not told:  # a terminal has told it too; this signal is never a second one
                    process.send_signal(signal.SIGUSR1)
                    told = True
        check_stopped()
    if process.returncode == StoppedError.exit_code:
        raise StoppedError("stopped; run the same command again to go on")
    if process.returncode:
        sys.exit(process.returncode)  # the command has printed why
    return printed


_REPORT_IMAGES = 16  # in the report at the end of training, which is not the one that counts


@dataclass(frozen=True)
class Variants:
    """A recipe, its images, the folder `runs` with a run directory in it each, and options that all commands share."""

    recipe: str
    data: str
    runs: Path
    shared: Sequence[str] = ()  # of ul-train and ul-train report: --threads, --cache, --heldout

    def train(self, name: str, overrides: Sequence[str], stage: str = "joint") -> Path:
        """The run called `name`, trained through `stage` (joint or all). A run of another recipe there is refused.

        Ends this process with the exit code of ul-train where that fails.
        """
        run = self.runs / name
        changes = [word for override in overrides for word in ("--set", override)]
        going_on = ["--resume"] if (run / "run.json").is_file() else []
        options = ["--out", str(run), "--stage", stage, "--report-images", str(_REPORT_IMAGES)]
        run_script("ul-train", self.recipe, "--data", self.data, *options, *changes, *self.shared, *going_on)
        return run

    def measured(self, run: Path, images: int, mean_of: int) -> dict[str, Any]:
        """Held-out figures of a run by ul-train report, kept in measured.json with how they were taken."""
        file, asked = run / "measured.json", {"images": images, "mean_of": mean_of}
        record = read_if_whole(file) or {}
        if record.get("asked") != asked:
            options = ["--images", str(images), "--mean-of", str(mean_of)]
            run_script("ul-train", "report", str(run), "--data", self.data, *options, *self.shared)
            record = {"asked": asked, "figures": json.loads((run / "report.json").read_bytes())}
            durable.atomic_write(file, json.dumps(record).encode())
        return dict(record["figures"])


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


def parse_factors(text: str) -> list[float]:
    """Positive numbers between commas, none twice; UsageError."""
    try:
        factors = [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--loss-factors {text}: expected numbers between commas, for example 1.5,2,3") from None
    if not all(0.0 < factor < float("inf") for factor in factors) or len(set(factors)) != len(factors):
        raise UsageError(f"--loss-factors {text}: expected numbers above 0, each once")
    return factors


def sweep(recipe: str, options: SweepOptions, command: str) -> dict[str, Any]:
    """Train and measure every loss factor; writes FILES into `options.out` and returns what results.json holds."""
    data, out = options.data, options.out
    if data is None or out is None:
        raise UsageError(f"{'--out' if data else '--data'} is missing; see ul-train sweep --help")
    factors = parse_factors(options.loss_factors)
    load_config(recipe, options.set)  # a mistake in it is said at once
    for override in options.set:
        if (name := override.partition("=")[0].strip()) in _STEERED:
            raise UsageError(f"--set {name}: a sweep sets it for each run; give --loss-factors")
    durable.make_directory(out)
    durable.check_output_directory(out, (*FILES, "runs"))
    shared = {"--heldout": options.heldout, "--threads": options.threads, "--cache": options.cache}
    variants, rows = Variants(recipe, data, out / "runs", option_words(shared)), []
    for factor in factors:
        run = variants.train(f"loss-factor-{factor:g}", [*options.set, f"objective.loss_factor={factor}"])
        rows.append({"loss_factor": factor, **variants.measured(run, options.images, options.mean_of)})
    trained = Run.open(run)
    record = {
        "command": command,
        "figures": rows,
        "config": trained.config.model_dump(mode="json", exclude={"objective": {"loss_factor"}}),
        "data_fingerprint": trained.info.data_fingerprint,
        "versions": versions(_PACKAGES),
        "commit": commit(),
        "gaussian_curve": _gaussian_curve(trained.config, data, options, rows),
    }
    durable.write_json(out / "results.json", record)
    durable.atomic_write(out / "table.md", sweep_table(record).encode())
    durable.atomic_write(out / "plot.png", _plot(record))
    return record


def _gaussian_curve(
    config: Config, data: str, options: SweepOptions, rows: list[dict[str, Any]]
) -> list[tuple[float, float]]:
    """(bits per pixel, PSNR) of the Gaussian rate-distortion function around the rates measured; [] if not computed."""
    splits = open_splits(config.image, data, options.heldout, options.cache_folder)
    eigenvalues, _ = bound_eigenvalues(splits.heldout, splits.train, rows[0]["num_images"])
    if eigenvalues is None:
        return []
    rates = [row["bits_per_pixel"] for row in rows]
    low, high = 0.8 * min(rates), 1.2 * max(rates)
    return [(float(r), gaussian_psnr_db(eigenvalues, r * config.image.size**2)) for r in np.linspace(low, high, 50)]


def _by_rate(record: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(record["figures"], key=lambda row: float(row["bits_per_pixel"]))


def sweep_table(record: dict[str, Any]) -> str:
    """Markdown, one row a loss factor, in the order of rate."""
    rows = []
    for row in _by_rate(record):
        cells = [f"{row['loss_factor']:g}", f"{row['bits_per_pixel']:.4f}"]
        rows.append(cells + [f"{row[name]:.2f}" if row.get(name) is not None else "" for name in list(_COLUMNS)[2:]])
    lines = markdown_table(list(_COLUMNS.values()), rows)
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
