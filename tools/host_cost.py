#!/usr/bin/env python
"""What the host does for a batch of images beside a device: the sampling path over a device that takes no time.

    python tools/host_cost.py --out tools/results/host-cost

No GPU is needed: engines compute nothing, copies between host and device are copies within the host's memory. What is
left is what a GPU would wait for, were it infinitely fast: seconds a batch that a GPU's own must be compared with.
"""

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from ul_runtime.cli.command import run_command
from ul_runtime.install import require_packages
from ul_runtime.machine import anonymous, commit, versions
from ul_runtime.settings import parse_counts

if TYPE_CHECKING:
    from ul_runtime.pipeline import Pipeline

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
PACKAGES = ("unified-latents", "numpy")


class NoTime:
    """A device that computes nothing: what goes to it and comes back is copied, what stays there costs a call."""

    kind = "none"
    number = 0

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._allocated = 0
        self._room = np.zeros(2**20, np.uint8)

    def use(self) -> None:
        """Nothing to do."""

    def allocate(self, size: int) -> int:
        """Addresses are told apart; nothing lies behind them."""
        self._allocated += 1
        return self._allocated

    def free(self, address: int) -> None:
        """Nothing lies there."""

    def upload(self, address: int, array: np.ndarray) -> None:
        """A copy to somewhere."""
        self._space(array.nbytes)[:] = array.reshape(-1).view(np.uint8)

    def download(self, address: int, array: np.ndarray) -> None:
        """A copy from somewhere."""
        array.reshape(-1).view(np.uint8)[:] = self._space(array.nbytes)

    def _space(self, size: int) -> np.ndarray:
        if len(self._room) < size:
            self._room = np.zeros(size, np.uint8)
        return self._room[:size]

    def copy(self, to: int, source: int, size: int) -> None:
        """Within the device."""

    def array(self, address: int, size: int) -> np.ndarray:
        """Somewhere."""
        return self._space(size)

    def clear(self, address: int, size: int) -> None:
        """Within the device."""

    def normals(self, to: int, seed: int, indices: int, rows: int, stream: int, size: int) -> None:
        """Within the device."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """A launch."""
        return lambda: None

    def wait(self) -> None:
        """Nothing to wait for."""


class NoEngine:
    """Computes nothing."""

    def enqueue(self) -> None:
        """A launch."""


@app.command()
def host_cost(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where host-cost.json goes.")],
    presets: Annotated[str, typer.Option(metavar="NAME,...", help="Whose shapes.")] = "imagenet-512,garments-32",
    batch_sizes: Annotated[str, typer.Option(metavar="N,...", help="Images a batch.")] = "64,8,1",
    repeats: Annotated[int, typer.Option(metavar="N", min=1, help="Batches timed after the first.")] = 5,
) -> None:
    """Measure, and write the seconds a batch as JSON."""
    from ul_runtime.files import durable

    require_packages("torch", extras="train")
    durable.make_directory(out)
    rows = []
    for preset in presets.split(","):
        pipeline = over_no_device(preset)
        for batch in parse_counts("--batch-sizes", batch_sizes):
            for sampler in ("dpmpp2m", "ancestral"):
                times = [seconds(pipeline, batch, sampler) for _ in range(repeats + 1)][1:]
                rows.append({"preset": preset, "sampler": sampler, "batch_size": batch, "seconds": times})
                print(f"{preset:>14} {sampler:>10} batch {batch:>3}: {1e3 * median(times):10.2f} ms", file=sys.stderr)
    command = anonymous("python tools/host_cost.py", sys.argv[1:])
    report = {"command": command, "versions": versions(PACKAGES), "commit": commit(), "rows": rows}
    durable.atomic_write(out / "host-cost.json", (json.dumps(report, indent=1) + "\n").encode())
    print(out / "host-cost.json")


def over_no_device(preset: str) -> "Pipeline":
    """The pipeline of a preset, over a device that takes no time."""
    from ul_runtime.backends.gpu_loop import DeviceBackend, DeviceLoop
    from ul_runtime.pipeline import Pipeline
    from ul_train.config import load_config
    from ul_train.run import Run

    info = Run.in_memory(load_config(preset, []), tuple(f"class {n}" for n in range(10))).manifest()
    backend: Any = DeviceBackend()
    backend.name, backend.precision, backend.threads = "none", "fp16", None
    backend.loop = DeviceLoop(NoTime(), info.graphs, lambda *_: NoEngine(), print)
    return Pipeline(info, backend)


def seconds(pipeline: "Pipeline", batch: int, sampler: str) -> float:
    """Of one batch by the preset's settings."""
    start = time.perf_counter()
    for _ in pipeline.generate(batch, batch_size=batch, keep_x=False, sampler=sampler, decoder_sampler=sampler):
        pass
    return time.perf_counter() - start


def main() -> None:
    """Console script."""
    run_command(app, "host_cost")


if __name__ == "__main__":
    main()
