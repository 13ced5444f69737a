"""A run in the words of the bundle format: formats, schedules, classes, sampling defaults and graph interfaces."""

import difflib
import hashlib
import json
import uuid
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn

from ul_runtime import durable
from ul_runtime.errors import BadInputError, UsageError
from ul_runtime.images import rgb
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
    interface,
    is_bundle,
)
from ul_train import checkpoint as ckpt
from ul_train.config import Config, config_hash, config_toml, load_config
from ul_train.data.imageset import Splits
from ul_train.model import joint_networks, make_base, make_decoder, make_encoder

NETWORK_OF_GRAPH = {"encoder": "encoder", "prior_step": "prior", "decoder_step": "decoder"}


def _tensors(shapes: dict[str, tuple[int | str, ...]]) -> tuple[TensorFormat, ...]:
    return tuple(
        TensorFormat(name=name, dtype="int64" if name == "label" else "float32", shape=shape)
        for name, shape in shapes.items()
    )


def _graph(name: GraphName, image: ImageFormat, latent: LatentFormat, opset: int) -> Graph:
    inputs, outputs = interface(name, image, latent)
    return Graph(
        file=f"{name}.onnx",
        weights=f"{NETWORK_OF_GRAPH[name]}.safetensors",
        precision="fp32",
        opset=opset,
        inputs=_tensors(inputs),
        outputs=_tensors(outputs),
    )


def describe(
    config: Config,
    class_names: tuple[str, ...],
    run_id: str,
    data_fingerprint: str,
    step: int,
    opset: int,
    encoder_sha256: str | None = None,
) -> BundleInfo:
    """The manifest of a bundle of this run, without hashes, quality and parity."""
    objective, sampling = config.make_objective(), config.sampling
    image = ImageFormat(
        channels=config.image.channels,
        size=config.image.size,
        background="#{:02x}{:02x}{:02x}".format(*rgb(config.image.background)),
        fit=config.image.fit,
    )
    latent = LatentFormat(channels=config.latent_channels, size=config.latent_size)
    z_min, z_max = objective.schedule_z.ends
    x_min, x_max = objective.schedule_x.ends
    return BundleInfo(
        name=config.name,
        image=image,
        latent=latent,
        classes=class_names,
        logsnr_z=LogsnrRange(min=z_min, max=z_max),
        logsnr_x=LogsnrRange(min=x_min, max=x_max),
        defaults=Defaults(
            prior=PriorDefaults(
                sampler=sampling.sampler,
                grid=sampling.grid,
                num_steps=sampling.steps,
                guidance=sampling.guidance if class_names else 1.0,
                guidance_interval=sampling.guidance_interval,
                guidance_rescale=sampling.guidance_rescale,
            ),
            decoder=DecoderDefaults(
                sampler=sampling.decoder_sampler, grid=sampling.decoder_grid, num_steps=sampling.decoder_steps
            ),
        ),
        graphs={name: _graph(name, image, latent, opset) for name in GRAPH_NAMES},
        provenance=Provenance(
            run_id=run_id,
            config_sha256=config_hash(config),
            data_fingerprint=data_fingerprint,
            step=step,
            weights="ema",
            code_version=VERSION,
            encoder_sha256=encoder_sha256,
        ),
        recipe=config.model_dump(mode="json", exclude_none=True),
    )


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
        code_version=VERSION,
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
