"""Checkpoints: a directory of safetensors and one JSON file, whole or absent, hashed. No pickle.

checkpoints/joint-001400/   weights.safetensors  ema.safetensors  optimizer.safetensors  state.json
state.json holds the SHA-256 of the tensor files, and of itself with that hash written as zeros.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict
from safetensors.torch import load, save
from torch import Tensor, nn

from ul_runtime.errors import BadInputError, one_line
from ul_runtime.files import durable
from ul_runtime.files.closed_folder import ClosedFolder, Kind, closed_folder
from ul_runtime.files.json_file import MAX_BYTES, checked, parse_object
from ul_runtime.files.safe_tensors import reading_safetensors
from ul_runtime.manifest import FileEntry

FORMAT, FORMAT_VERSION = "unified-latents-checkpoint", 1
NAME = re.compile(r"([a-z]+(?:-[1-9]\d{0,3})?)-(\d{6,})")  # stage or student, step
UNFINISHED = re.compile(rf"\.({NAME.pattern})\.[0-9a-f]{{16}}\.tmp")
_NO_HASH = "0" * 64
_INSTEAD = "remove {} and resume from the checkpoint before"
STATE = "state.json"
TENSOR_FILES = ("weights.safetensors", "ema.safetensors", "optimizer.safetensors")


@dataclass(frozen=True)
class State:
    """What a checkpoint says of itself. Noise and order derive from (seed, stage, step): `seed` is the RNG state."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    stage: str
    step: int  # optimiser steps done, skipped ones included
    seed: int
    config_sha256: str
    data_fingerprint: str
    counters: dict[str, int] = field(default_factory=dict)
    encoder_checkpoint: str | None = None  # state hash of the stage before, whose latents this one learns
    rate_control: dict[str, float] = field(default_factory=dict)  # of a run with a target for its bits
    log_sums: dict[str, tuple[float, int]] = field(default_factory=dict)  # (sum, number) since the log's last line


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory; tensors by name, `network.parameter`."""

    state: State
    weights: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state_hash: str


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
        foreign = {name for name in tensors if name.startswith(f"{network}.")} - {f"{network}.{name}" for name in own}
        if foreign:
            raise BadInputError(f"{where}: {min(foreign)} is not in the recipe's network; use the run's own recipe")
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
    """The inverse of `optimizer_tensors`. A fused optimiser walks memory, so its averages get the weight's layout."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, parameter in zip(names, parameters, strict=True):
        if f"step.{name}" not in tensors:  # of a weight that has not been updated yet
            continue
        step = tensors[f"step.{name}"].to(parameter.device if optimizer.defaults["fused"] else "cpu", copy=True)
        averages = {key: torch.empty_like(parameter, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
        for key, average in averages.items():
            average.copy_(tensors[f"{key}.{name}"])
        optimizer.state[parameter] = {"step": step, **averages}


def save_checkpoint(
    folder: Path, state: State, weights: dict[str, Tensor], ema: dict[str, Tensor], optimizer: dict[str, Tensor]
) -> Path:
    """Write `folder/<stage>-<step>`, whole or absent; an existing one of this name is replaced. OutputError."""
    final = folder / f"{state.stage}-{state.step:06d}"
    files: dict[str, dict[str, Any]] = {}
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    for name in {match[1] for name in names if (match := UNFINISHED.fullmatch(name))}:
        durable.sweep(folder, name)  # what saves and prunings that were killed have left
    with durable.temporary_directory_beside(final) as temporary:
        for file, tensors in zip(TENSOR_FILES, (weights, ema, optimizer), strict=True):
            data = save(tensors)
            durable.write_file(temporary / file, [data])
            files[file] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        record = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(state), "files": files}
        durable.write_file(temporary / STATE, [_sealed(record)])
        if final.exists():
            durable.replace_directory(temporary, final)
        else:
            durable.commit_directory(temporary, final)
    return final


def _sealed(record: dict[str, Any]) -> bytes:
    """JSON whose last value is the SHA-256 of all of it, taken with zeros in that place."""
    data = (json.dumps({**record, "sha256": _NO_HASH}, indent=1) + "\n").encode()
    return data.replace(_NO_HASH.encode(), hashlib.sha256(data).hexdigest().encode())


def list_checkpoints(folder: Path, stage: str) -> list[Path]:
    """Committed checkpoints of a stage, oldest first."""
    paths = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    found = [(int(match[2]), path) for path in paths if (match := NAME.fullmatch(path.name)) and match[1] == stage]
    return [path for _, path in sorted(found)]


def prune(folder: Path, stage: str, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints of a stage, each whole until it is gone."""
    for path in list_checkpoints(folder, stage)[:-keep]:
        leaving = folder / f".{path.name}.{secrets.token_hex(8)}.tmp"
        with durable.as_output_error(path):
            os.rename(path, leaving)
            shutil.rmtree(leaving)


def read_state(path: Path) -> tuple[State, str]:
    """(state, SHA-256 of state.json) of a checkpoint; BadInputError if it is not one that this program reads."""
    with closed_folder(path, _kind(path), follow=False) as folder:
        state, _, state_hash = _read_state(folder)
    return state, state_hash


def _read_state(folder: ClosedFolder) -> tuple[State, dict[str, FileEntry], str]:
    file = folder.path / STATE
    data = folder.read(STATE, MAX_BYTES)
    try:
        record = parse_object(data)
        version = record.pop("format_version")
        if record.pop("format") != FORMAT:
            raise BadInputError(f"{file}: not a checkpoint of unified-latents; choose another one")
        if version > FORMAT_VERSION:
            raise BadInputError(f"{file}: format version {version}, this program reads up to {FORMAT_VERSION}; upgrade")
        seal: str = record.pop("sha256")
        found = hashlib.sha256(data.replace(seal.encode(), _NO_HASH.encode())).hexdigest()
        if found != seal:
            raise BadInputError(f"{file}: SHA-256 is {found}, state.json says {seal}; {folder.kind.again}")
        files = {name: checked(FileEntry, entry) for name, entry in record.pop("files").items()}
        if sorted(files) != sorted(TENSOR_FILES):
            raise ValueError(f"files are {', '.join(map(ascii, files))}; expected {', '.join(TENSOR_FILES)}")
        return checked(State, record), files, hashlib.sha256(data).hexdigest()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInputError(f"{file}: not readable ({one_line(error)}); {folder.kind.again}") from None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify. BadInputError: damaged, the file and both hashes are named. UntrustedError: links, pickles."""
    with closed_folder(path, _kind(path), follow=False) as folder:
        state, entries, state_hash = _read_state(folder)
        folder.check_closed(folder.names(), [*entries, STATE])
        folder.check_memory(sum(entry.size for entry in entries.values()))
        files = {name: folder.read_entry(name, entry) for name, entry in entries.items()}
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, data in files.items():
        assert data is not None
        with reading_safetensors(data, str(path / name), folder.kind.again):
            tensors[name.partition(".")[0]] = load(data)
    return Checkpoint(state=state, state_hash=state_hash, **tensors)


def _kind(path: Path) -> Kind:
    return Kind("checkpoint", "a checkpoint of ul-train", STATE, _INSTEAD.format(path.name))
