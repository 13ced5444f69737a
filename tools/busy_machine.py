#!/usr/bin/env python
"""Training and sampling on an idle machine and beside a program that keeps one core busy, by number of threads.

    python tools/busy_machine.py --rounds 3

Each figure is of a process of its own, in turn; without a number of threads, as many compute as cores are free. The
first seconds, in which a process finds out, are in the figures. Run it on a machine that does nothing else.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from ul_runtime.cli.command import run_command
from ul_runtime.install import require_packages
from ul_runtime.machine import origin
from ul_runtime.settings import parse_counts

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
PACKAGES = ("unified-latents", "onnxruntime", "openvino", "torch")
PRESET = "quickstart"


def train(threads: int | None, seconds: float) -> float:
    """Images/s of stage joint of the preset, on the digits of scikit-learn."""
    from ul_train.config import load_config
    from ul_train.data.prepare import open_splits
    from ul_train.log import RunLog
    from ul_train.run import Run
    from ul_train.stages import Joint
    from ul_train.torch_backend import choose_device, fix_threads
    from ul_train.trainer import Trainer

    fix_threads(threads)
    config = load_config(PRESET, [])
    with tempfile.TemporaryDirectory() as folder:
        images = open_splits(config.image, "sklearn-digits", None, Path(folder) / "cache").train
        stage = Run.in_memory(config, images.class_names).stage(Joint, choose_device("cpu"), "fp32")
        trainer = Trainer(stage, images, Path(folder), RunLog(Path(folder), config.run.log_every))

        def step() -> int:
            trainer.train_step()
            trainer.step += 1
            return stage.settings.batch_size

        return rate(step, seconds)


def sample(backend: str, threads: int | None, seconds: float) -> float:
    """Images/s of the model inside the package at batch 1."""
    import ul_runtime

    pipeline = ul_runtime.load(backend=backend, threads=threads)
    return rate(lambda: sum(len(batch.indices) for batch in pipeline.generate(1)), seconds)


def rate(work: Callable[[], int], seconds: float) -> float:
    """What `work` counts, a second; its first call is not counted."""
    work()
    started, done = time.monotonic(), 0
    while time.monotonic() - started < seconds:
        done += work()
    return done / (time.monotonic() - started)


KINDS: dict[str, Callable[[int | None, float], float]] = {
    "train": train,
    "ort-cpu": lambda threads, seconds: sample("ort-cpu", threads, seconds),
    "openvino": lambda threads, seconds: sample("openvino", threads, seconds),
}


def measured(kind: str, threads: int, seconds: float, busy: bool) -> float:
    """Images/s in a process of its own; 0 threads: as many as cores are free."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        words = [sys.executable, __file__, "--one", kind, "--threads", str(threads), "--seconds", str(seconds)]
        return float(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout)
    finally:
        if other is not None:
            other.kill()
            other.wait()


@app.command()
def busy_machine(
    kinds: Annotated[str, typer.Option(metavar="A,B,...", help="Of train, ort-cpu, openvino.")] = ",".join(KINDS),
    threads: Annotated[str, typer.Option(metavar="N,...", help="Numbers of threads; 0: as cores are free.")] = "0,1,2",
    seconds: Annotated[float, typer.Option(metavar="S", help="Of each measurement.")] = 8.0,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Measurements of each.")] = 3,
    one: Annotated[str | None, typer.Option(hidden=True)] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON file to write.")] = None,
) -> None:
    """Measure images/s, idle and beside a busy core."""
    from ul_runtime.files import durable

    if one is not None:
        print(KINDS[one](int(threads) or None, seconds))
        return
    require_packages("torch", "openvino", extras="train,openvino")
    counts = [0 if word == "0" else parse_counts("--threads", word)[0] for word in threads.split(",")]
    found: dict[tuple[str, bool, int], list[float]] = {}
    for _ in range(rounds):
        for key in ((kind, busy, count) for kind in kinds.split(",") for busy in (False, True) for count in counts):
            found.setdefault(key, []).append(measured(key[0], key[2], seconds, key[1]))
    rows: list[dict[str, Any]] = []
    for (kind, busy, count), rates in found.items():
        rows.append({"work": kind, "busy": busy, "threads": count or None, "images_per_s": rates})
        where = "beside a busy core" if busy else "idle"
        print(f"{kind:>9}  {where:<19} {count or 'free':>5} threads  {median(rates):8.2f} images/s")
    if out is not None:
        durable.write_json(out, {"preset": PRESET, "rows": rows, **origin("busy_machine.py", PACKAGES)})
    print(json.dumps(rows), file=sys.stderr)


def main() -> None:
    """Entry point."""
    run_command(app, "busy_machine.py")


if __name__ == "__main__":
    main()
