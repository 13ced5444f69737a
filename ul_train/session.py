"""A run from recipe and images to trained networks: its directory, its stages, resume, previews and held-out report.

RUN/  config.toml  run.json  set_aside.txt  checkpoints/  log.jsonl  tensorboard/  previews/  report.json
"""

import difflib
import hashlib
import json
import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn

from ul_runtime import __version__, durable
from ul_runtime.control import UNWATCHED, Control
from ul_runtime.errors import BadInputError, StoppedError, UsageError
from ul_runtime.manifest import is_bundle
from ul_runtime.pipeline import Pipeline
from ul_train import checkpoint as ckpt
from ul_train.activations import warnings, watched
from ul_train.config import Config, config_toml, load_config
from ul_train.data import Splits
from ul_train.describe import describe
from ul_train.heldout import HeldoutFigures, measure, reconstruction_sheet, sample_sheet, torch_pipeline, yardstick
from ul_train.model import joint_networks, make_base, make_decoder, make_encoder
from ul_train.processes import option_words, run_main
from ul_train.rate_control import missed
from ul_train.runlog import RunLog, drop_lines_after
from ul_train.stages import Stage, base_stage, joint_stage
from ul_train.trainer import Trainer

RUN_FORMAT, RUN_FORMAT_VERSION = "unified-latents-run", 1
SET_ASIDE = "set_aside.txt"  # training images that could not be used: one a line, the first 10,000
OPSET_UNEXPORTED = 18  # of a description that no export has filled in yet


@dataclass(frozen=True)
class RunInfo:
    """run.json: what a run is, apart from its recipe."""

    run_id: str
    data: str
    data_fingerprint: str
    class_names: tuple[str, ...]
    created: str
    code_version: str
    heldout: str | None = None  # --heldout
    earlier_recipes: tuple[str, ...] = ()  # SHA-256 of each config.toml that --resume --allow has replaced


def read_run(run: Path) -> tuple[Config, RunInfo]:
    """Recipe and run.json of a run directory; BadInputError if it is none."""
    file = run / "run.json"
    try:
        record = dict(json.loads(file.read_text()))
        if record.pop("format") != RUN_FORMAT:
            raise BadInputError(f"{file}: not a run of unified-latents; expected the file that ul-train wrote")
        version = record.pop("format_version")
        if version > RUN_FORMAT_VERSION:
            raise BadInputError(f"{file}: format version {version}, this program reads {RUN_FORMAT_VERSION}; upgrade")
        lists = {key: tuple(record.get(key, ())) for key in ("class_names", "earlier_recipes")}
        info = RunInfo(**{**record, **lists})
    except (FileNotFoundError, NotADirectoryError):
        what = "no run.json in it" if run.is_dir() else "no such folder"
        if is_bundle(run):
            what = "a bundle of ul-export, and no run"
        raise BadInputError(f"{run}: {what}; expected the directory that ul-train --out wrote") from None
    except (ValueError, KeyError, TypeError) as error:
        raise BadInputError(f"{file}: not readable ({error}); expected the file that ul-train wrote") from None
    if not (run / "config.toml").is_file():
        raise BadInputError(f"{run}/config.toml: missing; restore the file that ul-train wrote")
    return load_config(str(run / "config.toml"), []), info


def create_run(run: Path, config: Config, data: str, heldout: str | None, splits: Splits) -> RunInfo:
    """Write config.toml and run.json of a new run, and the list of images set aside if there are any."""
    info = RunInfo(
        run_id=str(uuid.uuid4()),
        data=data,
        data_fingerprint=splits.train.fingerprint,
        class_names=splits.train.class_names,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        code_version=__version__,
        heldout=heldout,
    )
    durable.make_directory(run)
    durable.atomic_write(run / "config.toml", config_toml(config).encode())
    _write_info(run, info)
    if splits.train.rejected:
        durable.atomic_write(run / SET_ASIDE, "".join(f"{image}\n" for image in splits.train.rejected).encode())
    for folder in (run / "previews", run / "checkpoints"):
        durable.make_directory(folder)
    return info


def _write_info(run: Path, info: RunInfo) -> None:
    record = {"format": RUN_FORMAT, "format_version": RUN_FORMAT_VERSION, **vars(info)}
    durable.write_json(run / "run.json", record)


def check_recipe(run: Path, config: Config, allow: list[str]) -> RunInfo:
    """The run's own facts; UsageError naming every recipe key that is not the run's and not in `allow`."""
    old, info = read_run(run)
    flat_old, flat_new = (_flatten(c.model_dump(mode="json")) for c in (old, config))
    for key in allow:
        if key not in flat_new:
            near = difflib.get_close_matches(key, list(flat_new), 1)
            raise UsageError(f"--allow {key}: the recipe has no such key" + (f"; did you mean {near[0]}?" * len(near)))
    differing = [key for key in flat_new if flat_new[key] != flat_old.get(key) and key not in allow]
    if differing:
        shown = ", ".join(f"{key} (run {flat_old.get(key)!r}, now {flat_new[key]!r})" for key in differing)
        raise UsageError(f"{run}: the recipe is not the run's: {shown}; use the run's, or --allow FIELD")
    return info


def check_data(run: Path, info: RunInfo, splits: Splits) -> None:
    """UsageError if the training images are not the run's."""
    if info.data_fingerprint != splits.train.fingerprint:
        raise UsageError(
            f"{run}: the data is not the run's: fingerprint {splits.train.fingerprint[:12]}..., "
            f"the run has {info.data_fingerprint[:12]}... of {info.data}; give the same images, or start a new run"
        )


def adopt_recipe(run: Path, config: Config, info: RunInfo) -> RunInfo:
    """Make a recipe that `check_recipe` let pass the run's own; checkpoints of the earlier one stay known."""
    file, text = run / "config.toml", config_toml(config).encode()
    before = file.read_bytes()
    if before == text:
        return info
    info = replace(info, earlier_recipes=(*info.earlier_recipes, hashlib.sha256(before).hexdigest()))
    _write_info(run, info)
    durable.atomic_write(file, text)
    return info


def _flatten(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def finished_joint(run: Path, config: Config) -> Path:
    """The last checkpoint of a completed stage 1; BadInputError without one."""
    found = ckpt.list_checkpoints(run / "checkpoints", "joint")
    done = ckpt.read_state(found[-1])[0].step if found else 0
    if done < config.joint.steps:
        raise BadInputError(
            f"{run}: stage joint is at step {done} of {config.joint.steps}; finish it with ul-train {run} --resume"
        )
    return found[-1]


def load_ema(path: Path, modules: dict[str, nn.Module], device: torch.device) -> ckpt.Checkpoint:
    """Put the averaged weights of a checkpoint into `modules`, frozen, in evaluation mode."""
    saved = ckpt.load_checkpoint(path)
    ckpt.load_tensors(modules, saved.ema, str(path))
    for module in modules.values():
        module.to(device).eval().requires_grad_(False)
    return saved


@dataclass
class Session:
    """A run in progress."""

    run: Path
    config: Config
    info: RunInfo
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
        info = self.info
        described = describe(self.config, info.class_names, info.run_id, info.data_fingerprint, 0, OPSET_UNEXPORTED)
        return torch_pipeline(described, encoder, prior, decoder, self.device, precision)

    def run_stage(self, name: str) -> bool:
        """Train one stage from where its checkpoints stand; False if it was finished, it is then left as it is."""
        encoder_checkpoint = None
        if name == "joint":
            stage = joint_stage(self.config, self.device, self.precision)
        else:
            frozen = joint_networks(self.config)
            encoder_checkpoint = load_ema(finished_joint(self.run, self.config), frozen, self.device).state_hash
            num_classes = len(self.info.class_names)
            stage = base_stage(self.config, num_classes, self.device, self.precision, frozen)
        trainer = Trainer(
            stage,
            self.splits.train,
            self.run,
            self.log,
            self.stop,
            self.evaluate,
            encoder_checkpoint,
            self.export_check,
            self.check_export,
        )
        found = ckpt.list_checkpoints(self.run / "checkpoints", name)
        if found:
            trainer.restore(found[-1])
            if trainer.step >= stage.settings.steps:
                self.log.say(f"stage {name} is finished at step {trainer.step}")
                return False
            self.log.say(f"stage {name} goes on from {found[-1].name}")
        drop_lines_after(self.run, name, trainer.step)
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
        preview = self.run / "previews" / f"{stage.name}-{step:06d}.png"
        if joint:
            watch = Control(stop=self.stop)
            images, num_images = self.splits.heldout, self.config.run.eval_images
            figures = measure(pipeline, images, num_images, mean_of=1, bits_samples=4, control=watch)
            self.log.evaluation("joint", step, figures.as_dict())
            ramped = step > self.config.objective.prior_ramp_steps
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
                *(str(self.run), "--check", "--json"),
                *option_words({"--threads": self.threads}),
                name="ul-export",
            )
        except StoppedError:
            raise StoppedError(
                f"{where}: stopped in the export check, saved; go on with ul-train {self.run} --resume"
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
        nets = joint_networks(self.config)
        load_ema(finished_joint(self.run, self.config), nets, self.device)
        pipeline = self.pipeline(nets["encoder"], nets["prior"], nets["decoder"], precision)
        num_images = min(num_images, len(self.splits.heldout))
        eigenvalues, of_what = yardstick(self.splits.heldout, self.splits.train, num_images)
        try:
            figures = measure(
                pipeline, self.splits.heldout, num_images, mean_of=mean_of, eigenvalues=eigenvalues, control=control
            )
        except StoppedError:
            raise StoppedError(
                f"{self.run}: stopped in the held-out report, stage joint is saved; go on with ul-train {self.run} "
                f"--resume or ul-train report {self.run}"
            ) from None
        if figures.latent_died:
            self.log.warn(figures.obituary())
        if said := missed(figures.bits_per_pixel, self.config.objective.target_bits_per_pixel):
            self.log.warn(said)
        record = {**figures.as_dict(), "gaussian_of": of_what, "precision": precision, "run_id": self.info.run_id}
        durable.write_json(self.run / "report.json", record)
        title = f"{figures.bits_per_pixel:.4f} bits/pixel, PSNR {figures.psnr_db:.2f} dB"
        durable.atomic_write(self.run / "report.png", reconstruction_sheet(pipeline, self.splits.heldout, title))
        return figures


def load_newest(run: Path) -> tuple[Config, RunInfo, dict[str, nn.Module], str, int]:
    """(recipe, run, averaged networks, stage, step) of a run as it stands, in the words of `load_networks`.

    Before stage base has a checkpoint, the prior is that of stage joint, and the run has no classes. BadInputError.
    """
    if ckpt.list_checkpoints(run / "checkpoints", "base"):
        config, info, networks, step = load_networks(run)
        return config, info, networks, "base", step
    config, info = read_run(run)
    found = ckpt.list_checkpoints(run / "checkpoints", "joint")
    if not found:
        raise BadInputError(f"{run}: has no checkpoint yet; train it first: ul-train {run} --resume")
    networks = joint_networks(config)
    saved = load_ema(found[-1], networks, torch.device("cpu"))
    return config, replace(info, class_names=()), networks, "joint", saved.state.step


def load_networks(run: Path) -> tuple[Config, RunInfo, dict[str, nn.Module], int]:
    """(recipe, run, averaged networks `encoder`, `prior` = base, `decoder`, base step) of a finished run, on the CPU.

    BadInputError where a stage is missing, or the base was trained on the latents of another encoder.
    """
    config, info = read_run(run)
    joint_path = finished_joint(run, config)
    nets: dict[str, nn.Module] = {"encoder": make_encoder(config), "decoder": make_decoder(config)}
    cpu = torch.device("cpu")
    joint = load_ema(joint_path, nets, cpu)
    found = ckpt.list_checkpoints(run / "checkpoints", "base")
    if not found:
        raise BadInputError(
            f"{run}: has no base stage, so nothing to sample from; run ul-train {run} --resume --stage base"
        )
    base: dict[str, nn.Module] = {"base": make_base(config, len(info.class_names))}
    saved = load_ema(found[-1], base, cpu)
    if saved.state.encoder_checkpoint != joint.state_hash:
        raise BadInputError(
            f"{found[-1]}: was trained on the latents of another encoder than {joint_path.name}; train stage base again"
        )
    recipe = hashlib.sha256((run / "config.toml").read_bytes()).hexdigest()
    if {joint.state.config_sha256, saved.state.config_sha256} - {recipe, *info.earlier_recipes}:
        raise BadInputError(
            f"{run}/config.toml: is not the recipe of the checkpoints; restore the file that ul-train wrote"
        )
    return (
        config,
        info,
        {"encoder": nets["encoder"], "prior": base["base"], "decoder": nets["decoder"]},
        saved.state.step,
    )
