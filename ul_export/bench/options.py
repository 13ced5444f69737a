"""What ul-bench can be told."""

from dataclasses import dataclass
from pathlib import Path

from ul_runtime.cli.options import option


@dataclass(frozen=True)
class BenchOptions:
    """What is measured, how often, and beside what."""

    peers: str = option(
        "",
        "Measured in turn with ort-cpu: openvino, openvino-bf16, torch, torch-compile, torch-loop "
        "(sampling as a user writes it), and these three with -bf16.",
        metavar="NAME,...",
        shown="none",
    )
    run: Path | None = option(None, "Run directory of the bundle, for the torch peers.", metavar="RUN")
    batch_sizes: str | None = option(None, "Batch sizes.", metavar="IMAGES,...", shown="1,8,64; with --quick 1,8")
    repeats: int = option(20, "Measurements of each step.", metavar="COUNT")
    image_repeats: int = option(5, "Measurements of whole batches of images.", metavar="COUNT")
    threads: int | None = option(None, "CPU threads.", metavar="COUNT", shown="one per core")
    start_up: bool = option(
        True, "Measure import, load and first image in fresh processes.", "--start-up/--no-start-up"
    )
    plot: Path | None = option(None, "Draw images/s against batch size (needs matplotlib).", metavar="FILE.png")
    quick: bool = option(False, "One or two measurements of each: to see that it works, not for figures.")
