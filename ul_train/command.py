"""What ul-train does once its options are read."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ul_runtime import durable
from ul_runtime.errors import BadInputError, UsageError
from ul_runtime.pipeline import Control
from ul_runtime.progress import progress
from ul_runtime.signals import stop_on_signal
from ul_train import checkpoint as ckpt
from ul_train.config import Config
from ul_train.data import Splits, open_data
from ul_train.device import choose_device, choose_precision
from ul_train.runlog import RunLog
from ul_train.session import RunInfo, Session, check_resumable, create_run, read_run


@dataclass(frozen=True)
class TrainOptions:
    """The options of ul-train that are not part of the recipe."""

    out: Path | None
    data: str | None
    heldout: str | None
    stages: tuple[str, ...]
    resume: bool
    allow: list[str]
    device: str
    threads: int | None
    compile: bool
    cache: Path
    report_images: int


def open_splits(config: Config, data: str, heldout: str | None, cache: Path, say: Callable[[str], None]) -> Splits:
    """The images of a recipe, prepared or mapped; what was converted or set aside is said."""
    image = config.image
    with ExitStack() as stack:
        state: dict[str, Any] = {"advance": None, "done": 0}

        def show(done: int, total: int | None) -> None:
            if state["advance"] is None and total:
                state["advance"] = stack.enter_context(progress("preparing images", total, "images"))
            if state["advance"] is not None:
                state["advance"](done - state["done"])
                state["done"] = done

        splits = open_data(
            data,
            size=image.size,
            channels=image.channels,
            background=image.background,
            fit=image.fit,
            cache_dir=cache,
            heldout_source=heldout,
            classes="auto" if image.labels else "none",
            progress=show,
        )
    train = splits.train
    classes = f"{len(train.class_names)} classes" if train.class_names else "no classes"
    say(f"{len(train)} training and {len(splits.heldout)} held-out images of {image.size} px, {classes}, from {data}")
    for note in train.notes:
        say(f"note: {note}")
    if train.num_rejected:
        first = "; ".join(str(rejected) for rejected in train.rejected[:3])
        say(f"{train.num_rejected} images set aside, listed in {train.index_path}: {first}")
    if train.converted:
        say("converted: " + ", ".join(f"{count} {reason}" for reason, count in train.converted.items()))
    return splits


def _open_run(options: TrainOptions, out: Path, config: Config, data: str, splits: Splits) -> RunInfo:
    if options.resume:
        return check_resumable(out, config, splits, options.allow)
    if (out / "run.json").exists():
        raise UsageError(f"{out}: holds a run already; add --resume to go on with it, or choose another --out")
    durable.check_output_directory(out)
    if options.stages == ("base",):
        raise UsageError(f"{out}: holds no run; stage base needs a finished stage joint: train that first")
    return create_run(out, config, data, splits)


def train_command(config: Config, options: TrainOptions) -> dict[str, Any]:
    """Train the stages asked for; returns the figures of the held-out report."""
    out, data = options.out, options.data
    if out is None:
        raise UsageError("--out is missing; give the run directory to write")
    if data is None and options.resume:
        data = read_run(out)[1].data
    if data is None:
        raise UsageError("--data is missing; give a folder of images, an IDX folder, .npz, hf:NAME or shards")
    device = choose_device(options.device)
    precision = choose_precision(config.run.precision, device)
    if options.threads:
        torch.set_num_threads(options.threads)
    if not options.resume:
        durable.check_output_directory(out, ["run.json", "*"] if (out / "run.json").exists() else [])
    with stop_on_signal() as stop:
        splits = open_splits(config, data, options.heldout, options.cache, lambda text: print_line(text))
        with durable.lock_directory(out):
            info = _open_run(options, out, config, data, splits)
            log = RunLog(out, config.run.log_every)
            log.say(f"run {out}: {device}, {precision}, {torch.get_num_threads()} threads")
            session = Session(out, config, info, splits, device, precision, options.compile, stop, log)
            try:
                for stage in options.stages:
                    session.run_stage(stage)
                    if stage == "joint":
                        session.report(options.report_images, mean_of=4)
            finally:
                log.close()
    return _summary(out)


def print_line(text: str) -> None:
    """One line on stderr."""
    import sys

    print(text, file=sys.stderr, flush=True)


def _summary(run: Path) -> dict[str, Any]:
    import json

    figures = json.loads((run / "report.json").read_text()) if (run / "report.json").is_file() else {}
    bases = ckpt.list_checkpoints(run / "checkpoints", "base")
    return {"run": str(run), **figures, "base": bases[-1].name if bases else "none"}


def report_command(
    run: Path,
    data: str | None,
    heldout: str | None,
    images: int,
    mean_of: int,
    decoder_steps: int | None,
    threads: int | None,
    cache: Path,
    device_name: str,
) -> dict[str, Any]:
    """Measure a finished stage 1 on held-out images; writes report.json and report.png into the run."""
    config, info = read_run(run)
    if decoder_steps:
        config = config.model_copy(
            update={"sampling": config.sampling.model_copy(update={"decoder_steps": decoder_steps})}
        )
    device = choose_device(device_name)
    if threads:
        torch.set_num_threads(threads)
    splits = open_splits(config, data or info.data, heldout, cache, print_line)
    if splits.train.fingerprint != info.data_fingerprint:
        raise BadInputError(f"{run}: the training images are not those of the run; give the same --data")
    num_images = min(images, len(splits.heldout))
    with stop_on_signal() as stop, progress("decoding", num_images * mean_of, "decodes") as advance:
        log = RunLog(run, config.run.log_every)
        session = Session(run, config, info, splits, device, "fp32", False, stop, log)
        figures = session.report(num_images, mean_of, Control(stop=stop, progress=advance))
        log.close()
    return figures.as_dict()
