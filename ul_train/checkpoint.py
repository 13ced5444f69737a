"""Checkpoints: a directory of safetensors and one JSON file, whole or absent, hashed. No pickle.

checkpoints/joint-001400/   weights.safetensors  ema.safetensors  optimizer.safetensors  state.json
"""

import hashlib
import json
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from ul_runtime import durable
from ul_runtime.errors import BadInputError

FORMAT, FORMAT_VERSION = "unified-latents-checkpoint", 1
NAME = re.compile(r"(joint|base)-(\d{6,})")
TENSOR_FILES = ("weights.safetensors", "ema.safetensors", "optimizer.safetensors")


@dataclass(frozen=True)
class State:
    """What a checkpoint says of itself. Noise and order derive from (seed, stage, step): `seed` is the RNG state."""

    stage: str
    step: int  # optimiser steps done, skipped ones included
    seed: int
    config_sha256: str
    data_fingerprint: str
    counters: dict[str, int] = field(default_factory=dict)
    encoder_checkpoint: str | None = None  # stage base: state hash of the joint checkpoint whose latents it learns


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory; tensors by name, `network.parameter`."""

    state: State
    weights: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state_hash: str


def name_of(stage: str, step: int) -> str:
    """Directory name of a checkpoint."""
    return f"{stage}-{step:06d}"


def tensors_of(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """All parameters of the networks by name, detached, on the CPU."""
    return {
        f"{network}.{name}": tensor.detach().cpu().contiguous()
        for network, module in modules.items()
        for name, tensor in module.state_dict().items()
    }


def load_tensors(modules: dict[str, nn.Module], tensors: dict[str, Tensor], where: str) -> None:
    """Put tensors back into the networks; BadInputError if a name or shape differs."""
    for network, module in modules.items():
        own = module.state_dict()
        for name, target in own.items():
            given = tensors.get(f"{network}.{name}")
            if given is None or given.shape != target.shape:
                found = "missing" if given is None else f"{list(given.shape)}"
                raise BadInputError(
                    f"{where}: {network}.{name} is {found}, expected {list(target.shape)}; use the run's own recipe"
                )
        module.load_state_dict({name: tensors[f"{network}.{name}"] for name in own})


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """The optimiser's state by parameter name; `names` in the order of its parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"{key}.{name}": value.detach().cpu().contiguous()
        for name, parameter in zip(names, parameters, strict=True)
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, parameter in zip(names, parameters, strict=True):
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors]
        optimizer.state[parameter] = {
            key: tensors[f"{key}.{name}"].to("cpu" if key == "step" else parameter.device) for key in keys
        }


def save_checkpoint(
    folder: Path, state: State, weights: dict[str, Tensor], ema: dict[str, Tensor], optimizer: dict[str, Tensor]
) -> Path:
    """Write `folder/<stage>-<step>`, whole or absent; an existing one of this name is replaced. OutputError."""
    final = folder / name_of(state.stage, state.step)
    files: dict[str, dict[str, Any]] = {}
    durable.sweep(folder, final.name)
    with durable.temporary_directory_beside(final) as temporary:
        for file, tensors in zip(TENSOR_FILES, (weights, ema, optimizer), strict=True):
            data = save(tensors)
            durable.write_file(temporary / file, [data])
            files[file] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        record = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(state), "files": files}
        durable.write_file(temporary / "state.json", [(json.dumps(record, indent=1) + "\n").encode()])
        if final.exists():
            durable.replace_directory(temporary, final)
        else:
            durable.commit_directory(temporary, final)
    return final


def list_checkpoints(folder: Path, stage: str) -> list[Path]:
    """Committed checkpoints of a stage, oldest first."""
    names = folder.iterdir() if folder.is_dir() else ()
    found = [(int(match[2]), path) for path in names if (match := NAME.fullmatch(path.name)) and match[1] == stage]
    return [path for _, path in sorted(found)]


def prune(folder: Path, stage: str, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints of a stage."""
    for path in list_checkpoints(folder, stage)[:-keep]:
        shutil.rmtree(path)


def read_state(path: Path) -> tuple[State, dict[str, Any], str]:
    """(state, files, SHA-256 of state.json) of a checkpoint; BadInputError if it is not one that this program reads."""
    file = path / "state.json"
    try:
        data = file.read_bytes()
        record = json.loads(data)
        version = record.pop("format_version")
        if record.pop("format") != FORMAT:
            raise BadInputError(f"{file}: not a checkpoint of unified-latents")
        if version > FORMAT_VERSION:
            raise BadInputError(f"{file}: format version {version}, this program reads up to {FORMAT_VERSION}; upgrade")
        files = record.pop("files")
        return State(**record), files, hashlib.sha256(data).hexdigest()
    except FileNotFoundError:
        raise BadInputError(f"{file}: missing; this is no checkpoint, choose another one") from None
    except (ValueError, KeyError, TypeError) as error:
        raise BadInputError(
            f"{file}: not readable ({error}); remove this checkpoint and resume from the one before"
        ) from None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify; BadInputError names the file and both hashes."""
    state, files, state_hash = read_state(path)
    tensors: dict[str, dict[str, Tensor]] = {}
    for file in TENSOR_FILES:
        if file not in files or not (path / file).is_file():
            raise BadInputError(f"{path / file}: missing; remove {path.name} and resume from the checkpoint before")
        data = (path / file).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if digest != files[file]["sha256"]:
            raise BadInputError(
                f"{path / file}: SHA-256 is {digest[:16]}..., state.json says {files[file]['sha256'][:16]}...; "
                f"the file was changed or damaged: remove {path.name} and resume from the checkpoint before"
            )
        tensors[file.partition(".")[0]] = load(data)
    return Checkpoint(state=state, state_hash=state_hash, **tensors)
