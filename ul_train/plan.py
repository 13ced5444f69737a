"""What a run will be: its images, epochs and hours on this machine; and a recipe for the minutes that there are."""

import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ul_runtime.errors import UsageError
from ul_train.account import Figures, account, account_table
from ul_train.config import Config, validate
from ul_train.data.imageset import ImageSet, Splits
from ul_train.log import RunLog
from ul_train.stage import Stage
from ul_train.stages import fresh_stages, own_stages
from ul_train.torch_backend import choose_precision
from ul_train.trainer import Trainer

_MOST_FLOPS_ON_CPU = 2e12  # of a measured step on a CPU: some seconds
_MOST_ON_CPU = 16  # images of a measured step on a CPU, where a step of more takes longer in proportion
_MOST_SECONDS, _MOST_STEPS = 2.0, 8  # of a stage's measurement, after a first step that is not counted
_TRAINING_SHARE = 0.85  # of the minutes given; the rest is for evaluations and the report
_LEAST_STEPS = 10  # of a stage


def plan(config: Config, splits: Splits | None, device: torch.device) -> Figures:
    """The account of a recipe and, with images, how many there are, epochs and seconds of each stage. As JSON."""
    if splits is None:
        return account(config, num_classes=10 if config.image.labels else 0)
    figures = account(config, num_classes=len(splits.index.class_names))
    stages = {stage.name: config.of_stage(stage.name) for stage in own_stages(config)}
    seconds = seconds_of_stages(config, splits.train, device, figures)
    return figures | {
        "data": {
            "source": splits.index.source,
            "num_train": len(splits.train),
            "num_heldout": len(splits.heldout),
            "class_counts": splits.index.train.class_counts,
            "rejected": splits.index.train.reasons,
            "converted": splits.index.train.converted,
            "epochs": {name: stage.steps * stage.batch_size / len(splits.train) for name, stage in stages.items()},
            "seconds": seconds,  # of training steps, without evaluations; None: not measured
            "measured_on": f"{device}, {torch.get_num_threads()} threads",
        }
    }


def plan_table(figures: Figures) -> Group:
    """The plan for a terminal."""
    table = Table(title="images, epochs, time", title_justify="left", show_header=False)
    if (data := figures.get("data")) is None:
        table.add_row("images", "not looked at: give --data")
        return Group(account_table(figures), table)
    table.add_row("images", f"{data['num_train']:,} to train on, {data['num_heldout']:,} held out")
    for title, counts in (("classes", "class_counts"), ("rejected", "rejected"), ("converted", "converted")):
        table.add_row(title, Text(_counted(data[counts])))
    for name, epochs in data["epochs"].items():
        table.add_row(f"stage {name}", f"{epochs:,.4g} epochs, {_took(data, name)}")
    return Group(account_table(figures), table)


def _counted(counts: dict[str, int], most: int = 20) -> str:
    shown = [f"{name} {count:,}" for name, count in list(counts.items())[:most]]
    return ", ".join(shown + [f"and {len(counts) - most:,} more"] * (len(counts) > most)) or "none"


def _took(data: dict[str, Any], stage: str) -> str:
    if data["seconds"] is None:
        return "time not measured: a step is too large for a CPU"
    took = timedelta(seconds=round(data["seconds"][stage]))
    return f"about {took} on this machine by some steps ({data['measured_on']}), evaluations not counted"


def seconds_of_stages(
    config: Config, images: ImageSet, device: torch.device, figures: Figures
) -> dict[str, float] | None:
    """Seconds of all steps of each stage, without evaluations, from some steps of untrained networks.

    None where one image alone keeps a CPU busy for long; `figures` are of `account`.
    """
    names = [stage.name for stage in own_stages(config)]
    most = max(figures[name]["flops_per_image"] for name in names)
    if device.type == "cpu" and most * _MOST_ON_CPU > _MOST_FLOPS_ON_CPU:
        return None
    precision = choose_precision(config.run.precision, device)
    stages = fresh_stages(config, device, precision, len(images.class_names))
    return {stage.name: stage.settings.steps * _seconds_of_a_step(stage, images) for stage in stages}


def _seconds_of_a_step(stage: Stage, images: ImageSet) -> float:
    settings = stage.settings
    size = settings.batch_size // settings.accumulate
    if stage.device.type == "cpu":
        size = min(size, _MOST_ON_CPU)
    stage.settings = settings.model_copy(update={"batch_size": size, "accumulate": 1})
    with tempfile.TemporaryDirectory() as folder:  # for a warning in its log
        trainer, took, steps = Trainer(stage, images, Path(folder), RunLog(Path(folder), 1)), 0.0, -1
        while steps < 1 or (took < _MOST_SECONDS and steps < _MOST_STEPS):
            start = time.perf_counter()
            trainer.train_step()  # ends with figures that are read back, so a GPU is done too
            steps += 1
            took += (time.perf_counter() - start) if steps else 0.0
    stage.settings = settings
    return took / steps * settings.batch_size / size


def for_minutes(config: Config, minutes: float, images: ImageSet, device: torch.device) -> Config:
    """The recipe with the steps of all stages, and what is counted in steps, scaled to take so many minutes here.

    UsageError: a stage would have less than ten steps, or its time cannot be measured.
    """
    seconds = seconds_of_stages(config, images, device, account(config, len(images.class_names)))
    if seconds is None:
        raise UsageError(
            f"--minutes {minutes:g}: a step of {config.name} is too large for a CPU; take a smaller preset"
        )
    scale = 60.0 * minutes * _TRAINING_SHARE / sum(seconds.values())
    values = config.model_dump(mode="json", exclude_none=True)
    scaled = [(values["stages"][name], "steps") for name in seconds]
    scaled += [(values["stages"][name], "warmup_steps") for name in seconds]
    scaled += [(values["objective"], "prior_ramp_steps"), (values["run"], "eval_every")]
    for table, field in scaled:
        table[field] = max(1, round(table[field] * scale))
    if min(values["stages"][name]["steps"] for name in seconds) < _LEAST_STEPS:
        needed = sum(seconds.values()) / 60.0
        raise UsageError(
            f"--minutes {minutes:g}: the recipe {config.name} takes {needed:,.0f} minutes on this machine, and too few "
            "steps would be left of it; give more minutes, or a smaller preset (ul-train --presets)"
        )
    return validate(values, f"--minutes {minutes:g}")
