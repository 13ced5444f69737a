"""What ul-train, ul-train report and ul-train sweep can be told."""

from dataclasses import dataclass
from pathlib import Path

from ul_runtime.errors import UsageError
from ul_runtime.machine import cache_dir
from ul_runtime.settings import option


@dataclass(frozen=True)
class DataOptions:
    """Which images, and how many threads."""

    data: str | None = option(
        None, "Images: folder (class = sub-folder), IDX folder, .npz, hf:NAME, WebDataset shards.", metavar="SOURCE"
    )
    heldout: str | None = option(None, "Held-out images.", metavar="SOURCE", shown="the source's own, or 5 %")
    cache: Path | None = option(
        None, "Where prepared images are kept.", metavar="DIR", shown="$UL_CACHE or the user's cache"
    )
    threads: int | None = option(None, "CPU threads.", metavar="COUNT", shown="as cores are free", min=1)

    @property
    def cache_folder(self) -> Path:
        """Where prepared images are kept."""
        return cache_dir(self.cache)


@dataclass(frozen=True)
class RecipeOptions:
    """What changes a recipe."""

    set: list[str] = option([], "Change a field of the recipe; repeatable.", metavar="FIELD=VALUE")


@dataclass(frozen=True)
class DeviceOptions:
    """What computes."""

    device: str = option("auto", "Where to compute.", metavar="auto|cpu|cuda[:N]")


@dataclass(frozen=True)
class TrainOptions(RecipeOptions, DeviceOptions, DataOptions):
    """What is trained, where, and what is looked at on the way."""

    out: Path | None = option(None, "Run directory to write.", metavar="DIR")
    target_bits_per_pixel: float | None = option(
        None,
        "Steer loss_factor to this rate: short for --set objective.target_bits_per_pixel=BITS.",
        metavar="BITS",
    )
    minutes: float | None = option(
        None,
        "Scale the recipe's steps to about so many minutes on this machine, measured by some steps.",
        metavar="MINUTES",
        shown="the recipe's steps",
    )
    stage: str = option("all", "Which stage of the recipe to train, by the name of its section.", metavar="NAME")
    init: str | None = option(
        None,
        "Begin with the networks of a bundle of the same shapes and classes, and without stage joint.",
        metavar="BUNDLE",
        shown="fresh networks",
    )
    resume: bool = option(False, "Go on from the last checkpoint in --out.", "--resume")
    allow: list[str] = option([], "A recipe field that --resume may change; repeatable.", metavar="FIELD")
    compile: bool = option(False, "Compile the networks: a minute first, then faster.", "--compile")
    report_images: int = option(512, "Held-out images in the final report.", metavar="COUNT", min=1)
    export_check: int | None = option(
        None,
        "At step 1 and every so many steps, check that the networks export (ul-export --check).",
        metavar="STEPS",
        min=1,
    )

    def __post_init__(self) -> None:
        if self.init is not None and self.resume:
            raise UsageError("--init: is for a new run; a run to --resume has its networks")
        if self.minutes is not None and self.resume:
            raise UsageError("--minutes: is for a new run; the recipe of a run to --resume has its steps")
        if self.minutes is not None and not 0.0 < self.minutes < float("inf"):
            raise UsageError(f"--minutes {self.minutes:g}: expected a number above 0")

    @property
    def overrides(self) -> list[str]:
        """--set, and what is short for it."""
        target = self.target_bits_per_pixel
        return self.set if target is None else [*self.set, f"objective.target_bits_per_pixel={target}"]


@dataclass(frozen=True)
class DistillOptions(RecipeOptions, DeviceOptions, DataOptions):
    """Which students of a run, and how they are trained."""

    prior_calls: str | None = option(
        None, "Students of the prior, by their calls, such as 4,2.", metavar="A,B,...", shown="none"
    )
    decoder_calls: int | None = option(None, "A student of the decoder: 1 call.", metavar="1", shown="none")
    method: str = option("trajectory", "How the prior's students learn.", metavar="trajectory|moments")
    train_steps: int | None = option(
        None, "Optimiser steps of each student.", metavar="COUNT", shown="the run's own, or 900 and 3000", min=1
    )
    compile: bool = option(False, "Compile the networks: a minute first, then faster.", "--compile")


@dataclass(frozen=True)
class MeasureOptions(DataOptions):
    """How encoder and decoder are measured."""

    images: int = option(1000, "How many held-out images.", metavar="COUNT", min=1)
    mean_of: int = option(16, "Decodes averaged for the distortion.", metavar="COUNT", min=1)


@dataclass(frozen=True)
class ReportOptions(DeviceOptions, MeasureOptions):
    """Of a run."""

    decoder_steps: int | None = option(None, "Decoder steps.", metavar="COUNT", shown="the recipe's", min=1)
    precision: str = option(
        "fp32", "What the networks compute in; bf16 is faster where it is native.", metavar="fp32|bf16"
    )


@dataclass(frozen=True)
class SweepOptions(RecipeOptions, MeasureOptions):
    """Of one recipe at several loss factors."""

    out: Path | None = option(None, "Folder for results.json, table.md and plot.png; runs go below.", metavar="DIR")
    loss_factors: str = option("1.5,2,3", "In the order of training.", metavar="A,B,...")
