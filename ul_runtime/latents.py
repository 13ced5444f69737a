"""Files of latents: safetensors or npz, with the bundle they belong to. Never a pickle."""

import hashlib
import io
import json
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from ul_runtime.errors import BadInputError, UsageError, one_line
from ul_runtime.files.npz import DAMAGED, check_expanded, npz_array
from ul_runtime.files.safe_tensors import reading_safetensors

SUFFIXES = (".safetensors", ".npz")
_FORMAT = "unified-latents-latents"


@dataclass(frozen=True)
class Latents:
    """What a file of latents holds; only z_0 is needed to decode."""

    arrays: dict[str, np.ndarray]  # z_0 and z_clean `n c h w` f32, label `n` i64, bits `n` f64
    info: dict[str, Any]  # format, bundle (hash), seed, names of the images, ...
    sha256: str


def latents_bytes(suffix: str, arrays: dict[str, np.ndarray], info: dict[str, Any]) -> bytes:
    """The file's bytes for `.safetensors` or `.npz`; UsageError for another suffix."""
    text = json.dumps({"format": _FORMAT, **info})
    if suffix == ".safetensors":
        return save(arrays, metadata={"info": text})
    if suffix == ".npz":
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, info=np.array(text), **arrays)
        return buffer.getvalue()
    raise UsageError(f"latents are written as {' or '.join(SUFFIXES)}, not {suffix or 'without a suffix'}")


def read_latents(path: Path) -> Latents:
    """A file of `latents_bytes`, or any that has z_0 `n c h w`. BadInputError, UntrustedError; UsageError: suffix."""
    if not path.is_file():
        raise BadInputError(f"{path}: no such file; expected one that ul-encode wrote")
    read = {".safetensors": _read_safetensors, ".npz": _read_npz}.get(path.suffix)
    if read is None:
        raise UsageError(f"{path}: latents are read from {' or '.join(SUFFIXES)}")
    check_expanded(str(path), path.stat().st_size, path.stat().st_size)
    try:
        data = path.read_bytes()
        arrays, text = read(data, str(path))
        info = json.loads(text)
    except (*DAMAGED, KeyError, OSError, RecursionError) as error:
        raise BadInputError(f"{path}: is not a whole file of latents: {one_line(error)}; write it again") from error
    z_0 = arrays.get("z_0")
    if z_0 is None or z_0.ndim != 4 or z_0.dtype.kind != "f" or not z_0.size:
        raise BadInputError(f"{path}: has no z_0 of shape n c h w, as ul-encode writes it")
    bad = np.flatnonzero(~np.isfinite(z_0).reshape(len(z_0), -1).all(axis=1))
    if len(bad):
        raise BadInputError(f"{path}: z_0 is not finite at {bad[:10].tolist()}; encode these images again")
    return Latents(arrays, info if isinstance(info, dict) else {}, hashlib.sha256(data).hexdigest())


def _read_safetensors(data: bytes, where: str) -> tuple[dict[str, np.ndarray], str]:
    with reading_safetensors(data, where, "write it again"):
        arrays = load(data)  # checks the header
    (length,) = struct.unpack("<Q", data[:8])
    metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    return arrays, metadata.get("info", "{}")


def _read_npz(data: bytes, where: str) -> tuple[dict[str, np.ndarray], str]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        if len(set(names)) != len(names):
            raise ValueError("two arrays have the same name")
        check_expanded(where, len(data), sum(member.file_size for member in archive.infolist()))
        arrays = {name: npz_array(archive, name, where) for name in names}
    return arrays, str(arrays.pop("info", "{}"))
