"""ul-train and ul-train report: the stages of a run in their order, and its held-out figures."""

import json
import logging
import math
import os
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ul_runtime.errors import OutputError, StoppedError, UsageError
from ul_runtime.files import durable
from ul_runtime.files.json_file import read_if_whole
from ul_runtime.progress import Tick, progress, silent
from ul_runtime.settings import parse_counts
from ul_runtime.signals import check_stopped, stop_on_signal
from ul_train.account import Figures
from ul_train.activations import warnings, watched
from ul_train.checks import check_description, check_disk
from ul_train.config import METHODS, Config, apply_override, validate
from ul_train.data.imageset import ImageSet, Splits
from ul_train.data.prepare import open_splits
from ul_train.data.sources import user_path
from ul_train.fine_tune import begins_with, networks_of
from ul_train.heldout import HeldoutFigures, bound_eigenvalues, measure, reconstruction_sheet
from ul_train.log import RunLog, drop_lines_after
from ul_train.options import DistillOptions, ReportOptions, TrainOptions
from ul_train.plan import for_minutes, plan
from ul_train.run import REJECTED, Run
from ul_train.stage import Stage, missed
from ul_train.stages import Decoder, Joint, own_stages, stages_of, students_of
from ul_train.students import Student
from ul_train.sweep import option_words, run_script
from ul_train.torch_backend import choose_device, choose_precision, fix_threads, torch_pipeline
from ul_train.trainer import Trainer
from ul_train.trajectories import trajectories_of

logger = logging.getLogger(__name__)
REPORT = "report.json"
MEASURED = "measured"  # in it: the checkpoint that the decoder is of


def train(config: Config, options: TrainOptions) -> dict[str, Any]:
    """Train the stages asked for; returns the figures of the held-out report."""
    config = begins_with(config, options)
    out, stages = options.out, stages_of(config, options.stage)
    if out is None:
        raise UsageError("--out is missing; give the run directory to write")
    device = choose_device(options.device)
    fix_threads(options.threads)
    with ExitStack() as held:
        held.enter_context(stop_on_signal())
        there = out.is_dir()
        if there:  # a new directory is made only once the images are known to be good
            held.enter_context(durable.lock_directory(out))
        run = _run_to_resume(config, options, out)
        data = options.data or (run.info.data if run else "")
        heldout = options.heldout or (run.info.heldout if run else None)
        if run and (needed := stages[0].needs):
            replace(run, config=config).check_finished(needed)
        splits = open_splits(config.image, data, heldout, options.cache_folder)
        config = _checked(config, options, out, splits, device)
        networks = None if options.init is None else networks_of(options.init, config, splits.train.class_names)
        if not there:
            held.enter_context(durable.lock_directory(out))
            _run_to_resume(config, options, out)  # again: another process may have been faster
        if run is None:
            run = Run.create(out, config, _anywhere(data), heldout and _anywhere(heldout), splits)
            if splits.index.train.num_rejected:
                logger.info(f"the rejected images are listed in {out / REJECTED}")
        else:
            run.check_data(splits)
            run = run.adopt(config)
        if networks is not None:
            run.begin_with(networks)
        train_stages(run, stages, splits, options, device)
    figures = read_if_whole(out / REPORT) or {}
    later = {stage.name: run.checkpoints(stage.name) for stage in stages_of(config) if stage.needs}
    return {"run": str(out), **figures, **{name: found[-1].name if found else "none" for name, found in later.items()}}


def dry_run(config: Config, options: TrainOptions) -> tuple[Config, Figures]:
    """The recipe, for --minutes if given, and its plan; images are looked at, and prepared in the cache."""
    device, config = choose_device(options.device), begins_with(config, options)
    fix_threads(options.threads)
    if options.data is None:
        if options.minutes is not None:
            raise UsageError("--data is missing; --minutes is measured on your images")
        return config, plan(config, None, device)
    with stop_on_signal():
        splits = open_splits(config.image, options.data, options.heldout, options.cache_folder)
        config = _checked(config, options, options.out or Path(), splits, device)
        return config, plan(config, splits, device)


def _checked(config: Config, options: TrainOptions, out: Path, splits: Splits, device: torch.device) -> Config:
    """The recipe, for --minutes if given. UsageError, OutputError: what its end would be refused for."""
    if options.minutes is not None:
        config = for_minutes(config, options.minutes, splits.train, device)
        counts = ", ".join(f"{stage.name} {config.of_stage(stage.name).steps:,}" for stage in stages_of(config))
        logger.info(f"steps for {options.minutes:g} minutes: {counts}")
    check_description(config, splits.train.class_names)
    check_disk(config, splits.train.class_names, out, stages_of(config, options.stage))
    return config


def _run_to_resume(config: Config, options: TrainOptions, out: Path) -> Run | None:
    """None for a new run; all that can be refused before the images are opened is."""
    exists = (out / "run.json").exists()
    if options.resume:
        if not exists:
            raise UsageError(f"{out}: holds no run to resume; leave out --resume to start one there")
        run = Run.open(out)
        run.check_recipe(config, options.allow)
        return run
    if options.allow:
        raise UsageError(f"--allow {options.allow[0]}: is for --resume; a new run takes any recipe")
    if exists:
        raise UsageError(f"{out}: holds a run already; add --resume to go on with it, or choose another --out")
    durable.check_output_directory(out)
    first = stages_of(config, options.stage)[0]
    if first.needs and not config.init:
        raise UsageError(
            f"{out}: holds no run; stage {first.name} needs a finished stage {first.needs}: train that first"
        )
    if options.data is None:
        raise UsageError("--data is missing; give a folder of images, an IDX folder, .npz, hf:NAME or shards")
    return None


_STUDENT_STEPS = {"prior": 900, "decoder": 3000}
_STUDENT_BATCH = {"prior": 128, "decoder": 64}


def distill_run(path: Path, options: DistillOptions) -> dict[str, Any]:
    """Train the students asked for, from where they stand; returns the newest checkpoint of each.

    UsageError: none is asked for. BadInputError: the run is not finished, or a student is of another teacher.
    """
    run = Run.open(path)
    config, names = _with_students(run.config, options)
    for name, earlier in run.config.students.items():
        _check_unchanged(run, name, earlier.model_dump(), config.students[name].model_dump())
    for stage in own_stages(config):
        run.check_finished(stage.name)
    device = choose_device(options.device)
    fix_threads(options.threads)
    with ExitStack() as held:
        held.enter_context(stop_on_signal())
        held.enter_context(durable.lock_directory(path))
        data, heldout = options.data or run.info.data, options.heldout or run.info.heldout
        splits = open_splits(config.image, data, heldout, options.cache_folder)
        run.check_data(splits)
        kinds: list[type[Stage]] = [kind for kind in students_of(config) if kind.name in names]
        check_disk(config, splits.train.class_names, path, kinds)
        run = run.adopt(config)
        train_stages(run, kinds, splits, TrainOptions(threads=options.threads, compile=options.compile), device)
    return {"run": str(path), **{kind.name: run.checkpoints(kind.name)[-1].name for kind in kinds}}


def _check_unchanged(run: Run, name: str, earlier: dict[str, Any], now: dict[str, Any]) -> None:
    """UsageError if a student that has begun would be trained in another way, but for more steps."""
    changed = [key for key in now if now[key] != earlier[key] and key != "steps"]
    if changed and run.checkpoints(name):
        raise UsageError(
            f"{run.path}: students.{name}.{changed[0]} is {earlier[changed[0]]}, and it has checkpoints; to train it "
            f"in another way remove {name}-* from the run's checkpoints"
        )


def _with_students(config: Config, options: DistillOptions) -> tuple[Config, list[str]]:
    """The recipe with the students asked for, those that it has as they are; their names. UsageError."""
    if options.method not in METHODS:
        raise UsageError(f"--method {options.method}: expected {' or '.join(METHODS)}")
    for override in options.set:
        if not override.strip().startswith("students."):
            raise UsageError(f"--set {override}: distill changes students alone, such as students.prior-4.steps=900")
    calls = parse_counts("--prior-calls", options.prior_calls) if options.prior_calls is not None else []
    names = [f"prior-{number}" for number in calls] + (
        [f"decoder-{options.decoder_calls}"] if options.decoder_calls is not None else []
    )
    if not names and not config.students:
        raise UsageError("no student is asked for; give --prior-calls, --decoder-calls or both")
    values = config.model_dump(mode="json", exclude_none=True)
    for name in names or list(config.students):
        network = name.partition("-")[0]
        made: dict[str, Any] = {"steps": _STUDENT_STEPS[network], "batch_size": _STUDENT_BATCH[network]}
        sampling = config.sampling
        if network == "prior":
            made |= {"method": options.method, "grid": sampling.grid, "guidance": sampling.guidance}
        else:
            made |= {"examples": 20000, "grid": sampling.decoder_grid}
        student = values["students"].setdefault(name, made)
        if options.train_steps is not None:
            student["steps"] = options.train_steps
    for override in options.set:
        apply_override(values, override)
    return validate(values, "the recipe with its students"), names or list(config.students)


def _anywhere(source: str) -> str:
    """A source as run.json keeps it: a path that holds in every working directory."""
    path = user_path(source)
    return os.path.abspath(path) if path.exists() else source


def train_stages(
    run: Run, stages: list[type[Stage]], splits: Splits, options: TrainOptions, device: torch.device
) -> None:
    """Train each from where its checkpoints stand, and measure reconstructions after each that trains the decoder."""
    precision = choose_precision(run.config.run.precision, device)
    logger.info(f"training in {run.path} on {device}, {precision}, {torch.get_num_threads()} threads")
    log = RunLog(run.path, run.config.run.log_every)
    try:
        for number, kind in enumerate(stages, start=1):
            log.place = f" of stage {number}/{len(stages)}" if len(stages) > 1 else ""
            trained = train_stage(run.stage(kind, device, precision), run, splits, log, options, check_stopped)
            reconstructs = "decoder" in kind.places.values() and not issubclass(kind, Student)
            if reconstructs and (trained or not _is_reported(run, kind)):
                report(run, splits, log, device, num_images=options.report_images, mean_of=4)
    except OutputError as error:  # "run again" would be refused: the run is there
        raise OutputError(f"{error}; to go on: ul-train {run.path} --resume") from error
    finally:
        log.close()


def _is_reported(run: Run, stage: type[Stage]) -> bool:
    """Whether the report is there, and not of an earlier stage than this."""
    record = read_if_whole(run.path / REPORT)
    return record is not None and record.get(MEASURED, Joint.name).partition("-")[0] in (stage.name, Decoder.name)


def train_stage(
    stage: Stage, run: Run, splits: Splits, log: RunLog, options: TrainOptions, tick: Tick = silent
) -> bool:
    """Train one stage from where its checkpoints stand; False if it was finished, it is then left as it is."""
    trainer, found = Trainer(stage, splits.train, run.path, log), run.checkpoints(stage.name)
    if found:
        trainer.restore(found[-1])
        if trainer.step >= stage.settings.steps:
            logger.info(f"stage {stage.name} is finished at step {trainer.step}")
            return False
        logger.info(f"stage {stage.name} goes on from {found[-1].name}")
    if isinstance(stage, Student):
        trainer.images = trajectories_of(stage, run, splits.train, tick)
    drop_lines_after(run.path, _order_of_log(run.config, stage.name), stage.name, trainer.step)
    if options.compile:
        fix_threads(options.threads or torch.get_num_threads())  # compiled code is for one number of them
        stage.compute = {key: torch.compile(module) for key, module in stage.modules.items()}  # type: ignore[misc]
    evaluation = Evaluation(stage, run, splits.heldout, log, tick)
    due = trainer.step > 0 and trainer.step % run.config.run.eval_every == 0
    trainer.evaluated = not due or evaluation.preview_of(trainer.step).exists()  # or else a stop has cut it off
    check = partial(check_export, stage, run, log, options.threads)
    trainer.train(evaluation, check, options.export_check, tick)
    return True


def _order_of_log(config: Config, stage: str) -> list[str]:
    """Stages whose lines a training of this stage leaves alone, the stage, and those that begin from it."""
    after = {stage}
    for each in stages_of(config):  # one that needs another comes after it
        after |= {each.name} if each.needs in after else set()
    names = [each.name for each in stages_of(config)]
    return [*(n for n in names if n not in after), stage, *(n for n in names if n in after and n != stage)]


@dataclass
class Evaluation:
    """What is looked at every so many steps: held-out figures, a preview, magnitudes of the averaged weights."""

    stage: Stage
    run: Run
    heldout: ImageSet
    log: RunLog
    tick: Tick = silent
    largest: dict[str, float] = field(default_factory=dict)  # magnitude of each block at step `step`
    step: int = 0
    warned: set[str] = field(default_factory=set)  # blocks

    def preview_of(self, step: int) -> Path:
        """The preview's file."""
        return self.run.path / "previews" / f"{self.stage.name}-{step:06d}.png"

    def __call__(self, step: int) -> None:
        """At this step. StoppedError."""
        stage = self.stage
        with watched(stage.ema) as largest:
            students = {name: step for name in stage.sampled if name in stage.config.students}
            described = self.run.manifest(students=students)
            pipeline = torch_pipeline(described, stage.sampled, stage.device, stage.precision)
            preview = stage.preview(pipeline, self.heldout, step, self.log, self.tick)
        durable.atomic_write(self.preview_of(step), preview)
        for block, text in warnings(largest, step, self.largest, self.step, stage.settings.steps):
            if block not in self.warned:
                self.warned.add(block)
                self.log.warn(f"stage {stage.name}, step {step}: {text}", stage.name, step)
        self.largest, self.step = largest, step
        finite = {f"largest.{block}": value for block, value in largest.items() if math.isfinite(value)}
        self.log.write(stage.name, step, finite)


def check_export(stage: Stage, run: Run, log: RunLog, threads: int | None, step: int) -> None:
    """Check the export of the newest checkpoint by ul-export --check, in a process of its own.

    Ends this process with the exit code of ul-export where that fails; StoppedError on a signal.
    """
    where = f"stage {stage.name}, step {step}"
    try:
        printed = run_script("ul-export", str(run.path), "--check", "--json", *option_words({"--threads": threads}))
    except StoppedError:
        raise StoppedError(
            f"{where}: stopped in the export check, saved; go on with ul-train {run.path} --resume"
        ) from None
    except SystemExit:
        log.warn(f"{where}: the export check failed; the checkpoint is kept, training ends", stage.name, step)
        raise
    log.write(stage.name, step, {f"export.{name}": value for name, value in json.loads(printed).items()})


def report(
    run: Run,
    splits: Splits,
    log: RunLog,
    device: torch.device,
    *,
    num_images: int,
    mean_of: int,
    precision: str = "fp32",
) -> HeldoutFigures:
    """Held-out figures of the newest encoder and decoder, written to report.json with a contact sheet.

    StoppedError on a signal; BadInputError before stage joint is finished.
    """
    run.check_finished(Joint.name)
    found = run.reconstructing(device)
    pipeline = torch_pipeline(run.manifest(), found.networks, device, precision)
    num_images = min(num_images, len(splits.heldout))
    eigenvalues, of_what = bound_eigenvalues(splits.heldout, splits.train, num_images)
    try:
        with progress("held-out report", num_images * mean_of, "decodes") as tick:
            figures = measure(pipeline, splits.heldout, num_images, mean_of=mean_of, eigenvalues=eigenvalues, tick=tick)
    except StoppedError:
        raise StoppedError(
            f"{run.path}: stopped in the held-out report, stage {found.stage} is saved; "
            f"go on with ul-train {run.path} --resume or ul-train report {run.path}"
        ) from None
    if figures.latent_died:
        log.warn(figures.collapse_warning)
    if text := missed(figures.bits_per_pixel, run.config.objective.target_bits_per_pixel):
        log.warn(text)
    measured = {MEASURED: f"{found.stage}-{found.step:06d}"}
    record = {
        **figures.as_dict(),
        **measured,
        "gaussian_of": of_what,
        "precision": precision,
        "run_id": run.info.run_id,
    }
    durable.write_json(run.path / REPORT, record)
    durable.atomic_write(run.path / "report.png", reconstruction_sheet(pipeline, splits.heldout, figures.in_short))
    return figures


def report_run(path: Path, options: ReportOptions) -> dict[str, Any]:
    """Measure encoder and decoder on held-out images; writes report.json and report.png into the run."""
    run = Run.open(path)
    if options.decoder_steps:
        sampling = run.config.sampling.model_copy(update={"decoder_steps": options.decoder_steps})
        run = replace(run, config=run.config.model_copy(update={"sampling": sampling}))
    run.check_finished(Joint.name)
    device, precision = choose_device(options.device), options.precision
    if precision not in ("fp32", "bf16"):
        raise UsageError(f"--precision {precision}: expected fp32 or bf16")
    fix_threads(options.threads)
    with stop_on_signal():
        data, heldout = options.data or run.info.data, options.heldout or run.info.heldout
        splits = open_splits(run.config.image, data, heldout, options.cache_folder)
        run.check_data(splits)
        log, images = RunLog(path, run.config.run.log_every), options.images
        figures = report(run, splits, log, device, num_images=images, mean_of=options.mean_of, precision=precision)
        return figures.as_dict()
