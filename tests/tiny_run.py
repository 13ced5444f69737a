"""Small images and runs of the preset `tiny`, in this process: seconds on one core."""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from command import Runner

from ul_runtime.errors import StoppedError
from ul_runtime.progress import Tick, silent
from ul_train import checkpoint as ckpt
from ul_train.cli import main
from ul_train.config import Config, load_config
from ul_train.data.imageset import ImageSet, Splits
from ul_train.heldout import HeldoutFigures
from ul_train.log import RunLog
from ul_train.options import TrainOptions
from ul_train.run import Run
from ul_train.stages import stages_of
from ul_train.train import report, train_stage

CPU = torch.device("cpu")
SHORT = [  # options of ul-train: four steps a stage
    *("--set", "stages.joint.steps=4", "--set", "stages.base.steps=4", "--set", "stages.joint.batch_size=4"),
    *("--set", "stages.base.batch_size=4", "--set", "run.checkpoint_every=2", "--set", "run.eval_every=100"),
    *("--set", "run.eval_images=2", "--set", "run.log_every=1", "--report-images", "2"),
]


def blobs(num: int, size: int = 16, channels: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Bright discs (class 0) and bars (class 1) at random places: uint8 n c h w and labels."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size]
    at = random.uniform(0.3, 0.7, (num, 2, 1, 1)) * size
    labels = np.arange(num) % 2
    disc = np.hypot(y - at[:, 0], x - at[:, 1])
    bar = np.abs(x - at[:, 1]) * 1.5 + np.zeros((num, size, size))
    far = np.where(labels[:, None, None] == 0, disc, bar)
    images = np.clip(255 * (1.0 - far / (0.4 * size)), 0, 255).astype(np.uint8)
    return np.repeat(images[:, None], channels, axis=1), labels.astype(np.int64)


def image_set(num: int = 40, size: int = 16, channels: int = 1) -> ImageSet:
    """These images as a set in memory."""
    images, labels = blobs(num, size, channels)
    return ImageSet(
        images=images,
        labels=labels,
        class_names=("disc", "bar"),
        fingerprint=hashlib.sha256(images.tobytes()).hexdigest(),
    )


def splits() -> Splits:
    """40 images to train on, 12 held out, none rejected."""
    index: Any = SimpleNamespace(train=SimpleNamespace(rejected=()))
    return Splits(image_set(40), image_set(12), index)


def write_npz(path: Path, num: int = 40, channels: int = 1) -> Path:
    """The same images as a source of ul-train."""
    images, labels = blobs(num, channels=channels)
    np.savez(path, images=images, labels=labels, class_names=np.array(["disc", "bar"]))
    return path


def tiny(*overrides: str) -> Config:
    """The preset `tiny`, 6 steps a stage, a checkpoint every 3, logged at each step."""
    steps = ["stages.joint.steps=6", "stages.base.steps=6", "objective.prior_ramp_steps=4"]
    rhythm = ["run.checkpoint_every=3", "run.eval_every=100", "run.log_every=1", "run.eval_images=4"]
    return load_config("tiny", [*steps, *rhythm, *overrides])


def new_run(path: Path, config: Config) -> Run:
    """A run on `splits()` that has not begun."""
    return Run.create(path, config, "blobs", None, splits())


def train(run: Run, *stages: str, tick: Tick = silent) -> list[bool]:
    """Train these stages on `splits()`, from where their checkpoints stand; whether there was something to do."""
    log = RunLog(run.path, run.config.run.log_every)
    kinds = [kind for name in stages for kind in stages_of(run.config, name)]
    return [train_stage(run.stage(kind, CPU, "fp32"), run, splits(), log, TrainOptions(), tick) for kind in kinds]


def measured(run: Run) -> HeldoutFigures:
    """The held-out report of a run, of four images."""
    return report(run, splits(), RunLog(run.path, 1), CPU, num_images=4, mean_of=1)


def stop_at(step: int) -> Tick:
    """A tick that raises StoppedError from the `step`-th step on (evaluation not counted)."""
    calls = iter(range(1, 10_000))

    def tick(amount: float) -> None:
        if next(calls) >= step:
            raise StoppedError("stopped")

    return tick


def contents(path: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def same_tensors(a: Path, b: Path) -> bool:
    """Whether weights, averages and optimiser of two checkpoints are equal bit for bit."""
    first, second = ckpt.load_checkpoint(a), ckpt.load_checkpoint(b)
    parts: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (getattr(first, part), getattr(second, part)) for part in ("weights", "ema", "optimizer")
    ]
    return all(x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x) for x, y in parts)


def tree(path: Path) -> dict[str, bytes | None]:
    """Everything below a folder."""
    return {str(at.relative_to(path)): at.read_bytes() if at.is_file() else None for at in path.rglob("*")}


def refuses(command: Runner, tmp_path: Path, code: int, message: str, *arguments: Any, data_said: bool = False) -> None:
    """Exit code; one line on stderr (after what was said of the data); nothing on stdout; nothing written."""
    before = tree(tmp_path)
    result = command(main, *arguments)
    assert (result.code, result.out) == (code, ""), result
    of_data = (" held-out images of ", "images of each class: ")
    lines = [line for line in result.err.splitlines() if not (data_said and any(word in line for word in of_data))]
    assert len(lines) == 1, result.err
    assert lines[0].startswith("ul-train")
    assert message in lines[0]
    assert tree(tmp_path) == before
