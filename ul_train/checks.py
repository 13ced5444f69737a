"""What is looked at before the first step of a training, so that it is not found out at its end."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from ul_runtime.errors import OutputError, UsageError
from ul_runtime.machine import in_units
from ul_runtime.manifest import MAX_MANIFEST_BYTES, first_error
from ul_train import checkpoint as ckpt
from ul_train.account import checkpoint_bytes
from ul_train.config import Config
from ul_train.run import Run
from ul_train.stage import Stage

MAX_DESCRIPTION = MAX_MANIFEST_BYTES - (1 << 16)  # bytes; the rest is for hashes, quality and differences of an export


def check_description(config: Config, class_names: tuple[str, ...]) -> None:
    """UsageError if no bundle could say what such a run is."""
    try:
        description = Run.in_memory(config, class_names).manifest().model_dump(mode="json")
    except ValidationError as error:
        raise UsageError(f"no bundle can be made of this recipe: {first_error(error)}") from None
    size = len(json.dumps(description, indent=1, ensure_ascii=False).encode())
    if size > MAX_DESCRIPTION:
        raise UsageError(
            f"{len(class_names):,} class names take {in_units(size)}, a bundle has room for "
            f"{in_units(MAX_DESCRIPTION)}; give fewer or shorter names, or --set image.labels=false"
        )


def check_disk(config: Config, class_names: tuple[str, ...], out: Path, stages: Sequence[type[Stage]]) -> None:
    """OutputError if there is no room for the checkpoints of these stages: those that are kept, and one more."""
    sizes, needed = checkpoint_bytes(config, len(class_names)), 0
    for stage in stages:
        saved = -(-config.of_stage(stage.name).steps // config.run.checkpoint_every)
        there = len(ckpt.list_checkpoints(out / "checkpoints", stage.name))
        needed += sizes[stage.name] * max(0, min(saved, config.run.keep_checkpoints) - there)
    needed += max(sizes[stage.name] for stage in stages)
    free = shutil.disk_usage(next(each for each in (out, *out.absolute().parents) if each.exists())).free
    if needed > free:
        raise OutputError(
            f"{out}: the checkpoints take {in_units(needed)}, {in_units(free)} are free; free space, choose "
            "another --out, or keep fewer: --set run.keep_checkpoints=1"
        )
