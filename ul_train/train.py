"""What ul-train does once its options are read."""

import json
import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ul_runtime import durable
from ul_runtime.errors import StoppedError, UsageError
from ul_runtime.pipeline import Pipeline
from ul_runtime.progress import UNWATCHED, Control, print_line, progress, stop_on_signal
from ul_train import checkpoint as ckpt
from ul_train.activations import warnings, watched
from ul_train.config import Config
from ul_train.data.imageset import Splits
from ul_train.data.prepare import open_splits
from ul_train.heldout import HeldoutFigures, measure, reconstruction_sheet, sample_sheet, yardstick
from ul_train.log import RunLog, drop_lines_after
from ul_train.model import joint_networks
from ul_train.run import REJECTED, Run, load_ema
from ul_train.stages import Stage, base_stage, joint_stage, missed
from ul_train.sweep import option_words, run_main
from ul_train.torch_backend import choose_device, choose_precision, torch_pipeline
from ul_train.trainer import Trainer


@dataclass
class Session:
    """A run in progress."""

    run: Run
    splits: Splits
    device: torch.device
    precision: str
    compile: bool
    stop: Callable[[], bool]
    log: RunLog
    export_check: int | None = None  # steps between two proofs that what is trained can be exported
    threads: int | None = None  # of those proofs
    # stage -> the largest magnitudes of its blocks at its last evaluation, and that step
    _largest: dict[str, tuple[dict[str, float], int]] = field(default_factory=dict)
    _warned: set[str] = field(default_factory=set)  # blocks that the run has been warned of

    def pipeline(self, encoder: nn.Module, prior: nn.Module, decoder: nn.Module, precision: str) -> Pipeline:
        """The runtime's pipeline over torch networks."""
        return torch_pipeline(self.run.manifest(), encoder, prior, decoder, self.device, precision)

    def run_stage(self, name: str) -> bool:
        """Train one stage from where its checkpoints stand; False if it was finished, it is then left as it is."""
        encoder_checkpoint = None
        if name == "joint":
            stage = joint_stage(self.run.config, self.device, self.precision)
        else:
            frozen = joint_networks(self.run.config)
            encoder_checkpoint = load_ema(self.run.finished_joint(), frozen, self.device).state_hash
            num_classes = len(self.run.info.class_names)
            stage = base_stage(self.run.config, num_classes, self.device, self.precision, frozen)
        trainer = Trainer(
            stage,
            self.splits.train,
            self.run.path,
            self.log,
            self.stop,
            self.evaluate,
            encoder_checkpoint,
            self.export_check,
            self.check_export,
        )
        found = self.run.checkpoints(name)
        if found:
            trainer.restore(found[-1])
            if trainer.step >= stage.settings.steps:
                self.log.say(f"stage {name} is finished at step {trainer.step}")
                return False
            self.log.say(f"stage {name} goes on from {found[-1].name}")
        drop_lines_after(self.run.path, name, trainer.step)
        if self.compile:
            stage.compute = {key: torch.compile(module) for key, module in stage.modules.items()}  # type: ignore[misc]
        trainer.train()
        return True

    def evaluate(self, stage: Stage, step: int) -> None:
        """Held-out figures, preview pictures and largest magnitudes of the averaged weights."""
        with watched(stage.ema) as largest:
            self._evaluate(stage, step)
        before, step_before = self._largest.get(stage.name, ({}, 0))
        for block, text in warnings(largest, step, before, step_before, stage.settings.steps):
            if block not in self._warned:
                self._warned.add(block)
                self.log.warn(f"stage {stage.name}, step {step}: {text}")
        self._largest[stage.name] = largest, step
        finite = {f"largest.{block}": value for block, value in largest.items() if math.isfinite(value)}
        self.log.write(stage.name, step, finite)

    def _evaluate(self, stage: Stage, step: int) -> None:
        joint = stage.name == "joint"
        nets = stage.ema if joint else {**stage.frozen, **stage.ema}
        encoder, decoder, prior = nets["encoder"], nets["decoder"], nets["prior" if joint else "base"]
        pipeline = self.pipeline(encoder, prior, decoder, self.precision)
        preview = self.run.path / "previews" / f"{stage.name}-{step:06d}.png"
        if joint:
            watch = Control(stop=self.stop)
            images, num_images = self.splits.heldout, self.run.config.run.eval_images
            figures = measure(pipeline, images, num_images, mean_of=1, bits_samples=4, control=watch)
            self.log.evaluation("joint", step, figures.as_dict())
            ramped = step > self.run.config.objective.prior_ramp_steps
            if figures.latent_died and ramped:
                self.log.warn(figures.obituary())
            title = f"step {step}: {figures.bits_per_pixel:.4f} bits/pixel, PSNR {figures.psnr_db:.2f} dB"
            picture = reconstruction_sheet(pipeline, self.splits.heldout, title)
        else:
            picture = sample_sheet(pipeline, f"samples at step {step}")
        durable.atomic_write(preview, picture)

    def check_export(self, stage: Stage, step: int) -> None:
        """Prove the export of the newest checkpoint by ul-export --check, in a process of its own.

        Ends this process with the exit code of ul-export where that fails; StoppedError on a signal.
        """
        where = f"stage {stage.name}, step {step}"
        try:
            said = run_main(
                "ul_export.cli",
                *(str(self.run.path), "--check", "--json"),
                *option_words({"--threads": self.threads}),
                name="ul-export",
            )
        except StoppedError:
            raise StoppedError(
                f"{where}: stopped in the export check, saved; go on with ul-train {self.run.path} --resume"
            ) from None
        except SystemExit:
            self.log.warn(f"{where}: the export check failed; the checkpoint is kept, training ends")
            raise
        self.log.write(stage.name, step, {f"export.{name}": value for name, value in json.loads(said).items()})

    def report(
        self, num_images: int, mean_of: int, control: Control = UNWATCHED, precision: str = "fp32"
    ) -> HeldoutFigures:
        """Held-out figures of the finished stage 1, written to report.json with a picture.

        StoppedError when asked to stop; BadInputError before stage 1 is finished.
        """
        nets = joint_networks(self.run.config)
        load_ema(self.run.finished_joint(), nets, self.device)
        pipeline = self.pipeline(nets["encoder"], nets["prior"], nets["decoder"], precision)
        num_images = min(num_images, len(self.splits.heldout))
        eigenvalues, of_what = yardstick(self.splits.heldout, self.splits.train, num_images)
        try:
            figures = measure(
                pipeline, self.splits.heldout, num_images, mean_of=mean_of, eigenvalues=eigenvalues, control=control
            )
        except StoppedError:
            raise StoppedError(
                f"{self.run.path}: stopped in the held-out report, stage joint is saved; "
                f"go on with ul-train {self.run.path} --resume or ul-train report {self.run.path}"
            ) from None
        if figures.latent_died:
            self.log.warn(figures.obituary())
        if said := missed(figures.bits_per_pixel, self.run.config.objective.target_bits_per_pixel):
            self.log.warn(said)
        record = {**figures.as_dict(), "gaussian_of": of_what, "precision": precision, "run_id": self.run.info.run_id}
        durable.write_json(self.run.path / "report.json", record)
        title = f"{figures.bits_per_pixel:.4f} bits/pixel, PSNR {figures.psnr_db:.2f} dB"
        durable.atomic_write(self.run.path / "report.png", reconstruction_sheet(pipeline, self.splits.heldout, title))
        return figures


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


def _anywhere(source: str) -> str:
    """A source as run.json keeps it: a path that holds in every working directory."""
    path = Path(source).expanduser()
    return os.path.abspath(path) if path.exists() else source


def _check_run(options: TrainOptions, out: Path, config: Config) -> Run | None:
    """The run to resume, or None for a new one; all that can be refused before the images are opened is."""
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
        run = _check_run(options, out, config)
        data = options.data or (run.info.data if run else "")
        heldout = options.heldout or (run.info.heldout if run else None)
        if run and options.stages == ("base",):
            replace(run, config=config).finished_joint()
        splits = open_splits(config.image, data, heldout, options.cache)
        if not there:
            held.enter_context(durable.lock_directory(out))
            _check_run(options, out, config)  # again: another process may have been faster
        if run is None:
            run = Run.create(out, config, _anywhere(data), heldout and _anywhere(heldout), splits)
            if splits.train.num_rejected:
                print_line(f"the rejected images are listed in {out / REJECTED}")
        else:
            run.check_data(splits)
            run = run.adopt(config)
        _train_stages(run, options, splits, device, stop)
    return _summary(out)


def _train_stages(
    run: Run,
    options: TrainOptions,
    splits: Splits,
    device: torch.device,
    stop: Callable[[], bool],
) -> None:
    out, recipe = run.path, run.config.run
    precision = choose_precision(recipe.precision, device)
    log = RunLog(out, recipe.log_every)
    log.say(f"training in {out} on {device}, {precision}, {torch.get_num_threads()} threads")
    session = Session(
        run,
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
    measured = Run.open(run)
    if decoder_steps:
        sampling = measured.config.sampling.model_copy(update={"decoder_steps": decoder_steps})
        measured = replace(measured, config=measured.config.model_copy(update={"sampling": sampling}))
    measured.finished_joint()
    info = measured.info
    device = choose_device(device_name)
    if precision not in ("fp32", "bf16"):
        raise UsageError(f"--precision {precision}: expected fp32 or bf16")
    if threads:
        torch.set_num_threads(threads)
    with stop_on_signal() as stop:
        splits = open_splits(measured.config.image, data or info.data, heldout or info.heldout, cache)
        measured.check_data(splits)
        log = RunLog(run, measured.config.run.log_every)
        session = Session(measured, splits, device, "fp32", False, stop, log)
        return _report(session, images, mean_of, precision).as_dict()
