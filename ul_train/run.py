"""A training run on disk: its recipe, its facts, its checkpoints, and what a bundle of it says."""

import difflib
import hashlib
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import ConfigDict
from torch import nn

from ul_runtime.errors import BadInputError, UsageError, one_line
from ul_runtime.files import durable
from ul_runtime.files.json_file import checked, read_if_whole, read_object
from ul_runtime.images.convert import rgb
from ul_runtime.machine import VERSION
from ul_runtime.manifest import (
    GRAPH_NAMES,
    BundleInfo,
    DecoderDefaults,
    Defaults,
    Graph,
    GraphName,
    ImageFormat,
    LatentFormat,
    LogsnrRange,
    PriorDefaults,
    Provenance,
    TensorFormat,
    dtype_of,
    interface,
    is_bundle,
)
from ul_runtime.manifest import Student as StudentEntry
from ul_train import checkpoint as ckpt
from ul_train.config import Config, config_hash, config_toml, load_config
from ul_train.data.imageset import Splits
from ul_train.model import sampled_networks, weights_sha256
from ul_train.stage import Stage
from ul_train.stages import Joint, own_stages, stages_of, students_of
from ul_train.students import Student, grid_of, guidance_of, sampler_of

FORMAT, FORMAT_VERSION = "unified-latents-run", 1
REJECTED = "rejected.txt"  # training images that could not be used: one a line, the first 10,000
QUALITY = ("bits_per_image", "psnr_db", "psnr_mean_db")  # of report.json, in a bundle
INIT = "init"  # the stage of the checkpoint that --init makes
OPSET = 20  # of a manifest that no export has filled in


@dataclass(frozen=True)
class RunInfo:
    """run.json: what a run is, apart from its recipe."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    run_id: str
    data: str
    data_fingerprint: str
    class_names: tuple[str, ...]
    created: str
    code_version: str
    heldout: str | None = None  # --heldout
    earlier_recipes: tuple[str, ...] = ()  # SHA-256 of each config.toml that --resume --allow has replaced


@dataclass(frozen=True)
class Run:
    """A run directory as ul-train writes it, and the recipe in it."""

    path: Path
    config: Config
    info: RunInfo
    recipe_sha256: str  # of config.toml

    @classmethod
    def open(cls, path: Path) -> "Run":
        """The run at `path`; BadInputError if it is none."""
        info, recipe = _read_info(path), path / "config.toml"
        if not recipe.is_file():
            raise BadInputError(f"{recipe}: missing; restore the file that ul-train wrote")
        return cls(path, load_config(str(recipe), []), info, hashlib.sha256(recipe.read_bytes()).hexdigest())

    @classmethod
    def create(cls, path: Path, config: Config, data: str, heldout: str | None, splits: Splits) -> "Run":
        """Write config.toml and run.json of a new run, and the list of rejected images if there are any."""
        train = splits.train
        info = RunInfo(
            run_id=str(uuid.uuid4()),
            data=data,
            data_fingerprint=train.fingerprint,
            class_names=train.class_names,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            code_version=VERSION,
            heldout=heldout,
        )
        run = cls(path, config, info, config_hash(config))
        durable.make_directory(path)
        durable.atomic_write(path / "config.toml", config_toml(config).encode())
        run._write_info()
        rejected = splits.index.train.rejected
        if rejected:
            durable.atomic_write(path / REJECTED, "".join(f"{image}\n" for image in rejected).encode())
        for folder in (path / "previews", path / "checkpoints"):
            durable.make_directory(folder)
        return run

    @classmethod
    def in_memory(cls, config: Config, class_names: tuple[str, ...] = (), run_id: str = "0" * 32) -> "Run":
        """A run that nothing has been written of, to describe networks of no training."""
        info = RunInfo(run_id, "", "0" * 64, class_names, "", VERSION)
        return cls(Path("nowhere"), config, info, config_hash(config))

    def _write_info(self) -> None:
        record = {"format": FORMAT, "format_version": FORMAT_VERSION, **vars(self.info)}
        durable.write_json(self.path / "run.json", record)

    def check_recipe(self, config: Config, allow: list[str]) -> None:
        """UsageError naming every key of `config` that is not the run's and not in `allow`."""
        old, new = (_flatten(c.model_dump(mode="json")) for c in (self.config, config))
        for key in allow:
            if key not in new:
                near = difflib.get_close_matches(key, list(new), 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise UsageError(f"--allow {key}: the recipe has no such key{hint}")
        differing = [key for key in new if new[key] != old.get(key) and key not in allow]
        if differing:
            shown = ", ".join(f"{key} (run {old.get(key)!r}, now {new[key]!r})" for key in differing)
            raise UsageError(f"{self.path}: the recipe is not the run's: {shown}; use the run's, or --allow FIELD")

    def check_data(self, splits: Splits) -> None:
        """UsageError if the training images are not the run's."""
        given, own = splits.train.fingerprint, self.info.data_fingerprint
        if given != own:
            raise UsageError(
                f"{self.path}: the data is not the run's: fingerprint {given[:12]}..., the run has {own[:12]}... "
                f"of {self.info.data}; give the same images, or start a new run"
            )

    def adopt(self, config: Config) -> "Run":
        """Make a recipe that `check_recipe` let pass the run's own; checkpoints of the earlier one stay known."""
        new = config_hash(config)
        if new == self.recipe_sha256:
            return self
        earlier = (*self.info.earlier_recipes, self.recipe_sha256)
        run = Run(self.path, config, replace(self.info, earlier_recipes=earlier), new)
        run._write_info()
        durable.atomic_write(self.path / "config.toml", config_toml(config).encode())
        return run

    def checkpoints(self, stage: str) -> list[Path]:
        """Committed checkpoints of a stage, oldest first."""
        return ckpt.list_checkpoints(self.path / "checkpoints", stage)

    def check_finished(self, stage: str) -> None:
        """BadInputError unless this stage has come to its last step, or --init stands for it."""
        if self.config.init and stage == Joint.name:
            return
        if not self.is_finished(stage):
            done, steps = self._steps_done(stage), self.config.of_stage(stage).steps
            raise BadInputError(
                f"{self.path}: stage {stage} is at step {done} of {steps}; finish it with ul-train {self.path} --resume"
            )

    def is_finished(self, stage: str) -> bool:
        """Whether this stage or student has come to its last step."""
        return self._steps_done(stage) >= self.config.of_stage(stage).steps

    def _steps_done(self, stage: str) -> int:
        found = self.checkpoints(stage)
        return ckpt.read_state(found[-1])[0].step if found else 0

    def after(self, stage: type[Stage], device: torch.device | str = "cpu") -> "Snapshot":
        """The averaged networks by the newest checkpoint of a stage and of those before it.

        BadInputError: one is missing, damaged, of another recipe, or was trained on the networks of another.
        """
        return self._snapshot(stage, device, ())

    def _snapshot(
        self, stage: type[Stage], device: torch.device | str, students: Sequence[type[Student]]
    ) -> "Snapshot":
        begun = self._begun(stage, device)
        found = self.checkpoints(stage.name)
        if not found:
            raise BadInputError(
                f"{self.path}: has no {stage.name} stage, so nothing to sample from; run ul-train {self.path} --resume "
                f"--stage {stage.name}"
            )
        saved = begun.add(self, stage, found[-1], device)
        for student in students:
            begun.add(self, student, self.checkpoints(student.name)[-1], device)
        return begun.snapshot(self, stage.name, saved.state.step, found[-1], saved.state_hash)

    def _begun(self, stage: type[Stage] | None, device: torch.device | str) -> "_Begun":
        """What a stage begins from, or the first. BadInputError: the stage that it needs is not finished."""
        begun = _Begun()
        if self.config.init:
            saved = ckpt.load_checkpoint(self._initial)
            begun.networks = sampled_networks(self.config, len(self.info.class_names))
            ckpt.load_tensors(begun.networks, saved.ema, str(self._initial))
            begun.networks = {name: _frozen(module, device) for name, module in begun.networks.items()}
            begun.checkpoints[Joint.name], begun.sees_labels = (self._initial, saved.state_hash), True
        stages = stages_of(self.config)
        for kind in stages[: stages.index(stage)] if stage else ():
            if stage and kind.name == stage.needs:
                self.check_finished(kind.name)
            if found := self.checkpoints(kind.name):
                begun.add(self, kind, found[-1], device)
        return begun

    @property
    def _initial(self) -> Path:
        """The checkpoint that holds what --init has begun with."""
        return self.path / "checkpoints" / f"{INIT}-{0:06d}"

    def begin_with(self, networks: dict[str, nn.Module]) -> None:
        """Keep what --init begins with: `encoder`, `prior` and `decoder` of a bundle. OutputError."""
        state = ckpt.State(INIT, 0, self.config.seed, self.recipe_sha256, self.info.data_fingerprint)
        tensors = ckpt.tensors_of(networks)
        ckpt.save_checkpoint(self._initial.parent, state, {}, tensors, {})

    def stage(self, kind: type[Stage], device: torch.device, precision: str) -> Stage:
        """A stage before its first step. BadInputError: it needs an earlier stage that is not finished."""
        begun, num_classes = self._begun(kind, device), len(self.info.class_names)
        hash = begun.checkpoints[kind.needs][1] if kind.needs else None
        return kind(self.config, device, precision, num_classes, begun.networks, hash)

    def finished(self) -> "Snapshot":
        """The averaged networks of a run whose last stage has begun, and its finished students.

        BadInputError: see `after`; a student of another teacher than the run's.
        """
        students = [kind for kind in students_of(self.config) if self.is_finished(kind.name)]
        last = own_stages(self.config)[-1]
        if self.config.init and not self.checkpoints(last.name):
            return self.newest()  # the base is that of the bundle
        return self._snapshot(last, "cpu", students)

    def newest(self) -> "Snapshot":
        """The averaged networks of a run as it stands, by its last stage that has a checkpoint. BadInputError.

        Where the prior of that stage sees no labels, the run has no classes.
        """
        begun = [stage for stage in own_stages(self.config) if self.checkpoints(stage.name)]
        if not begun:
            raise BadInputError(f"{self.path}: has no checkpoint yet; train it first: ul-train {self.path} --resume")
        return self.after(begun[-1])

    def reconstructing(self, device: torch.device | str = "cpu") -> "Snapshot":
        """The averaged networks that reconstruct, and the prior that measures their bits. BadInputError.

        By the newest stage that trains the decoder and has a checkpoint.
        """
        stages = [stage for stage in own_stages(self.config) if "decoder" in stage.places.values()]
        begun = [stage for stage in stages if self.checkpoints(stage.name)]
        if begun or not self.config.init:
            return self.after((begun or stages)[-1], device)
        initial = self._begun(None, device)
        return initial.snapshot(self, INIT, 0, *initial.checkpoints[Joint.name])

    def manifest(
        self,
        opset: int = OPSET,
        *,
        step: int = 0,
        encoder_sha256: str | None = None,
        students: Mapping[str, int] | None = None,
    ) -> BundleInfo:
        """The manifest of a bundle of this run, without hashes, quality and parity; `students`: step of each."""
        config, info, objective = self.config, self.info, self.config.make_objective()
        image = ImageFormat(
            channels=config.image.channels,
            size=config.image.size,
            background="#{:02x}{:02x}{:02x}".format(*rgb(config.image.background)),
            fit=config.image.fit,
        )
        latent = LatentFormat(channels=config.latent_channels, size=config.latent_size)
        (z_min, z_max), (x_min, x_max) = objective.schedule_z.ends, objective.schedule_x.ends
        return BundleInfo(
            name=config.name,
            image=image,
            latent=latent,
            classes=info.class_names,
            logsnr_z=LogsnrRange(min=z_min, max=z_max),
            logsnr_x=LogsnrRange(min=x_min, max=x_max),
            defaults=_sampling_defaults(config, bool(info.class_names)),
            graphs={name: _graph(name, name, image, latent, opset) for name in GRAPH_NAMES},
            students={
                name: _student(config, name, step, image, latent, opset, guided=bool(info.class_names))
                for name, step in (students or {}).items()
            },
            provenance=Provenance(
                run_id=info.run_id,
                config_sha256=self.recipe_sha256,
                data_fingerprint=info.data_fingerprint,
                step=step,
                weights="ema",
                code_version=VERSION,
                encoder_sha256=encoder_sha256,
            ),
            recipe=config.model_dump(mode="json", exclude_none=True),
        )


@dataclass
class _Begun:
    """The averaged networks of the stages of a run so far, a later one's in the place of an earlier one's."""

    networks: dict[str, nn.Module] = field(default_factory=dict)  # by place: encoder, prior, decoder
    checkpoints: dict[str, tuple[Path, str]] = field(default_factory=dict)  # of each stage, and its state hash
    sees_labels: bool = False  # the prior
    students: dict[str, int] = field(default_factory=dict)  # whose networks are there by their names, and their steps

    def add(self, run: Run, stage: type[Stage], path: Path, device: torch.device | str) -> ckpt.Checkpoint:
        """Those of this checkpoint. BadInputError: damaged, of another recipe, or trained on those of another."""
        saved = ckpt.load_checkpoint(path)
        needed, hash = self.checkpoints[stage.needs] if stage.needs else (None, None)
        if saved.state.encoder_checkpoint != hash:
            raise BadInputError(
                f"{path}: was trained on the latents of another encoder than {needed.name if needed else 'none'}; "
                f"train stage {stage.name} again"
            )
        if saved.state.config_sha256 not in (run.recipe_sha256, *run.info.earlier_recipes):
            raise BadInputError(
                f"{run.path}/config.toml: is not the recipe of the checkpoints; restore the file that ul-train wrote"
            )
        modules = stage.networks(run.config, len(run.info.class_names))
        ckpt.load_tensors(modules, saved.ema, str(path))
        if issubclass(stage, Student):
            self.networks[stage.name] = _frozen(modules["student"], device)
            self.students[stage.name] = saved.state.step
        else:
            for name, module in modules.items():
                self.networks[stage.places[name]] = _frozen(module, device)
            if "prior" in stage.places.values():
                self.sees_labels = stage.conditional
        self.checkpoints[stage.name] = path, saved.state_hash
        return saved

    def snapshot(self, run: Run, stage: str, step: int, path: Path, state_hash: str) -> "Snapshot":
        """These networks, as of a checkpoint."""
        seen = run if self.sees_labels else replace(run, info=replace(run.info, class_names=()))
        return Snapshot(seen, stage, step, self.networks, path, state_hash, self.students)


def _frozen(module: nn.Module, device: torch.device | str) -> nn.Module:
    return module.to(device).eval().requires_grad_(False)


@dataclass(frozen=True)
class Snapshot:
    """The averaged networks `encoder`, `prior`, `decoder` of a run at a step of a stage, and students, all frozen."""

    run: Run
    stage: str
    step: int
    networks: dict[str, nn.Module]
    path: Path  # of the checkpoint of that stage
    state_hash: str  # of that checkpoint
    students: Mapping[str, int] = field(default_factory=dict)  # whose networks are there too, and their steps

    def manifest(self, opset: int = OPSET) -> BundleInfo:
        """The manifest of a bundle of these networks, without hashes and parity.

        Its quality is that of the run's held-out report, if there is one.
        """
        encoder = weights_sha256(self.networks["encoder"])
        described = self.run.manifest(opset, step=self.step, encoder_sha256=encoder, students=self.students)
        report = read_if_whole(self.run.path / "report.json") or {}
        found = {f"heldout_{name}": report[name] for name in QUALITY if _is_figure(report.get(name))}
        return described.model_copy(update={"quality": found})


def _is_figure(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _read_info(path: Path) -> RunInfo:
    file = path / "run.json"
    try:
        record = read_object(file)
        if record.pop("format") != FORMAT:
            raise BadInputError(f"{file}: not a run of unified-latents; expected the file that ul-train wrote")
        version = record.pop("format_version")
        if version > FORMAT_VERSION:
            raise BadInputError(f"{file}: format version {version}, this program reads {FORMAT_VERSION}; upgrade")
        return checked(RunInfo, record)
    except (FileNotFoundError, NotADirectoryError):
        what = "no run.json in it" if path.is_dir() else "no such folder"
        if is_bundle(path):
            what = "a bundle of ul-export, and no run"
        raise BadInputError(f"{path}: {what}; expected the directory that ul-train --out wrote") from None
    except (ValueError, KeyError, TypeError) as error:
        raise BadInputError(
            f"{file}: not readable ({one_line(error)}); expected the file that ul-train wrote"
        ) from None


def _flatten(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _sampling_defaults(config: Config, has_classes: bool) -> Defaults:
    sampling = config.sampling
    return Defaults(
        prior=PriorDefaults(
            sampler=sampling.sampler,
            grid=sampling.grid,
            num_steps=sampling.steps,
            guidance=sampling.guidance if has_classes else 1.0,
            guidance_interval=sampling.guidance_interval,
            guidance_rescale=sampling.guidance_rescale,
        ),
        decoder=DecoderDefaults(
            sampler=sampling.decoder_sampler, grid=sampling.decoder_grid, num_steps=sampling.decoder_steps
        ),
    )


_NETWORKS = {"encoder": "encoder", "prior_step": "prior", "decoder_step": "decoder", "pixels": "pixels"}


def _student(
    config: Config, name: str, step: int, image: ImageFormat, latent: LatentFormat, opset: int, *, guided: bool
) -> StudentEntry:
    network, calls = name.split("-")
    of_prior = network == "prior"
    return StudentEntry(
        place="prior_step" if of_prior else "decoder_step",
        graph=_graph(name, f"{network}_step", image, latent, opset),
        sampler=sampler_of(config, name),
        grid=grid_of(config, name),
        num_steps=int(calls),
        guidance=guidance_of(config, name) if of_prior and guided else 1.0,
        method=config.students[name].method,
        step=step,
    )


def _graph(name: GraphName, place: GraphName, image: ImageFormat, latent: LatentFormat, opset: int) -> Graph:
    inputs, outputs = interface(place, image, latent)
    return Graph(
        file=f"{name}.onnx",
        weights=f"{_NETWORKS.get(name, name)}.safetensors",
        precision="fp32",
        opset=opset,
        inputs=_tensors(inputs),
        outputs=_tensors(outputs),
    )


def _tensors(shapes: dict[str, tuple[int | str, ...]]) -> tuple[TensorFormat, ...]:
    return tuple(TensorFormat(name=name, dtype=dtype_of(name), shape=shape) for name, shape in shapes.items())
