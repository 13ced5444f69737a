"""What ul-train does once its options are read."""

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ul_runtime import durable
from ul_runtime.control import Control
from ul_runtime.errors import StoppedError, UsageError
from ul_runtime.progress import print_line, progress
from ul_runtime.signals import stop_on_signal
from ul_train import checkpoint as ckpt
from ul_train.config import Config, ImageConfig
from ul_train.data import Splits, open_data
from ul_train.device import choose_device, choose_precision
from ul_train.heldout import HeldoutFigures
from ul_train.runlog import RunLog
from ul_train.session import (
    SET_ASIDE,
    RunInfo,
    Session,
    adopt_recipe,
    check_data,
    check_recipe,
    create_run,
    finished_joint,
    read_run,
)


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
    export_check: int | None = None  # every so many steps


def open_splits(image: ImageConfig, data: str, heldout: str | None, cache: Path, stop: Callable[[], bool]) -> Splits:
    """The images, prepared or mapped; what was converted or set aside is said. StoppedError."""
    with ExitStack() as stack:
        advance: Callable[[float], None] | None = None
        shown = 0

        def show(done: int, total: int | None) -> None:
            nonlocal advance, shown
            if stop():
                raise StoppedError("stopped while preparing the images; run the same command again")
            if advance is None and total:
                advance = stack.enter_context(progress("preparing images", total, "images"))
            if advance is not None:
                advance(done - shown)
                shown = done

        splits = open_data(
            data,
            size=image.size,
            channels=image.channels,
            background=image.background,
            fit=image.fit,
            cache_dir=cache,
            heldout_source=heldout,
            classes="auto" if image.labels else "none",
            max_rejected_share=image.max_rejected_share,
            progress=show,
        )
    _describe(splits, image.size, data)
    return splits


def _describe(splits: Splits, size: int, data: str) -> None:
    train = splits.train
    classes = f"{len(train.class_names)} classes" if train.class_names else "no classes"
    print_line(f"{len(train)} training and {len(splits.heldout)} held-out images of {size} px, {classes}, from {data}")
    for note in train.notes:
        print_line(f"note: {note}")
    if train.num_rejected:
        first = "; ".join(str(rejected) for rejected in train.rejected[:3])
        print_line(f"set aside: {train.num_rejected}: {first}{'; ...' * (train.num_rejected > 3)}")
    if train.converted:
        print_line("converted: " + ", ".join(f"{count} {reason}" for reason, count in train.converted.items()))


def _anywhere(source: str) -> str:
    """A source as run.json keeps it: a path that holds in every working directory."""
    path = Path(source).expanduser()
    return os.path.abspath(path) if path.exists() else source


def _check_run(options: TrainOptions, out: Path, config: Config) -> RunInfo | None:
    """The run to resume, or None for a new one; all that can be refused before the images are opened is."""
    exists = (out / "run.json").exists()
    if options.resume:
        if not exists:
            raise UsageError(f"{out}: holds no run to resume; leave out --resume to start one there")
        return check_recipe(out, config, options.allow)
    if options.allow:
        raise UsageError(f"--allow {options.allow[0]}: is for --resume; a new run takes any recipe")
    if exists:
        raise UsageError(f"{out}: holds a run already; add --resume to go on with it, or choose another --out")
    durable.check_output_directory(out)
    if options.stages == ("base",):
        raise UsageError(f"{out}: holds no run; stage base needs a finished stage joint: train that first")
    if options.data is None:
        raise UsageError("--data is missing; give a folder of images, an IDX folder, .npz, hf:NAME or shards")
    return None


def train_command(config: Config, options: TrainOptions) -> dict[str, Any]:
    """Train the stages asked for; returns the figures of the held-out report."""
    out = options.out
    if out is None:
        raise UsageError("--out is missing; give the run directory to write")
    device = choose_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    with ExitStack() as held:
        stop = held.enter_context(stop_on_signal())
        there = out.is_dir()
        if there:  # a new directory is made only once the images are known to be good
            held.enter_context(durable.lock_directory(out))
        info = _check_run(options, out, config)
        data = options.data or (info.data if info else "")
        heldout = options.heldout or (info.heldout if info else None)
        if options.stages == ("base",):
            finished_joint(out, config)
        splits = open_splits(config.image, data, heldout, options.cache, stop)
        if not there:
            held.enter_context(durable.lock_directory(out))
            _check_run(options, out, config)  # again: another process may have been faster
        if info is None:
            info = create_run(out, config, _anywhere(data), heldout and _anywhere(heldout), splits)
            if splits.train.num_rejected:
                print_line(f"the images set aside are listed in {out / SET_ASIDE}")
        else:
            check_data(out, info, splits)
            info = adopt_recipe(out, config, info)
        _train_stages(config, options, out, info, splits, device, stop)
    return _summary(out)


def _train_stages(
    config: Config,
    options: TrainOptions,
    out: Path,
    info: RunInfo,
    splits: Splits,
    device: torch.device,
    stop: Callable[[], bool],
) -> None:
    precision = choose_precision(config.run.precision, device)
    log = RunLog(out, config.run.log_every)
    log.say(f"training in {out} on {device}, {precision}, {torch.get_num_threads()} threads")
    session = Session(
        out,
        config,
        info,
        splits,
        device,
        precision,
        options.compile,
        stop,
        log,
        export_check=options.export_check,
        threads=options.threads,
    )
    try:
        for stage in options.stages:
            trained = session.run_stage(stage)
            if stage == "joint" and (trained or not (out / "report.json").is_file()):
                _report(session, options.report_images, mean_of=4)
    finally:
        log.close()


def _report(session: Session, num_images: int, mean_of: int, precision: str = "fp32") -> HeldoutFigures:
    num_images = min(num_images, len(session.splits.heldout))
    with progress("held-out report", num_images * mean_of, "decodes") as advance:
        return session.report(num_images, mean_of, Control(stop=session.stop, progress=advance), precision)


def _summary(run: Path) -> dict[str, Any]:
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
    precision: str,
) -> dict[str, Any]:
    """Measure a finished stage 1 on held-out images; writes report.json and report.png into the run."""
    config, info = read_run(run)
    if decoder_steps:
        config = config.model_copy(
            update={"sampling": config.sampling.model_copy(update={"decoder_steps": decoder_steps})}
        )
    finished_joint(run, config)
    device = choose_device(device_name)
    if precision not in ("fp32", "bf16"):
        raise UsageError(f"--precision {precision}: expected fp32 or bf16")
    if threads:
        torch.set_num_threads(threads)
    with stop_on_signal() as stop:
        splits = open_splits(config.image, data or info.data, heldout or info.heldout, cache, stop)
        check_data(run, info, splits)
        log = RunLog(run, config.run.log_every)
        session = Session(run, config, info, splits, device, "fp32", False, stop, log)
        return _report(session, images, mean_of, precision).as_dict()
