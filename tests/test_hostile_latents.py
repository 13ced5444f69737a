"""Files of latents from others: damaged, lying or hostile ones are refused, in little memory."""

import io
import json
import os
import random
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ul_runtime.errors import BadInputError, UntrustedError
from ul_runtime.latents import latents_bytes, read_latents

ARRAYS: dict[str, np.ndarray] = {
    "z_0": np.random.default_rng(0).normal(size=(3, 2, 4, 4)).astype("f4"),
    "z_clean": np.zeros((3, 2, 4, 4), "f4"),
    "label": np.array([0, 1, 3]),
    "bits": np.ones(3),
}
INFO: dict[str, Any] = {"bundle": "a" * 64, "seed": 0, "classes": ["a", "b"], "names": ["x"] * 3}


def npy(descr: str, shape: str, data: bytes = b"", header: str = "") -> bytes:
    text = (header or f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}").encode()
    text += b" " * (63 - (10 + len(text)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def npz(*members: tuple[str, bytes], flags: int = 0, method: int = 0) -> bytes:
    """An archive whose first member claims these flags and this compression."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members:
            archive.writestr(name, data)
    made = bytearray(out.getvalue())
    at = made.find(b"PK\x01\x02")
    for place, value in ((6, flags), (at + 8, flags), (8, method), (at + 10, method)):
        made[place] |= value
    return bytes(made)


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def z_0(dtype: str, shape: list[int], size: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}


WHOLE = npy("'<f4'", "(1, 2, 4, 4)", b"\0" * 128)
F32 = z_0("F32", [1, 2, 4, 4], 128)
NPZ: dict[str, bytes] = {
    "a header of 10^13 values": npz(("z_0.npy", npy("'<f4'", "(10000000000000,)"))),
    "a header of 10^9 rows": npz(("z_0.npy", npy("'<f4'", "(1000000000, 2, 4, 4)"))),
    "a header of 2^63 values": npz(("z_0.npy", npy("'<f4'", "(9223372036854775808,)"))),
    "a negative size": npz(("z_0.npy", npy("'<f4'", "(-1, 2, 4, 4)"))),
    "objects": npz(("z_0.npy", npy("'|O'", "(1, 2, 4, 4)", b"\x80\x04."))),
    "records": npz(("z_0.npy", npy("[('a', '<f4')]", "(1, 2, 4, 4)", b"\0" * 128))),
    "text of 10^9 letters": npz(("z_0.npy", npy("'<U1000000000'", "(1,)"))),
    "a deep header": npz(("z_0.npy", npy("", "", header="(" * 5000 + ")" * 5000))),
    "code in the header": npz(("z_0.npy", npy("", "", header="{'descr': __import__('os'), 'shape': (1,)}"))),
    "no rows": npz(("z_0.npy", npy("'<f4'", "(0, 2, 4, 4)"))),
    "no channels": npz(("z_0.npy", npy("'<f4'", "(1, 0, 4, 4)"))),
    "complex numbers": npz(("z_0.npy", npy("'<c16'", "(1, 2, 4, 4)", b"\0" * 512))),
    "not finite": npz(("z_0.npy", npy("'<f4'", "(1, 2, 4, 4)", np.full(32, np.nan, "f4").tobytes()))),
    "a member twice": npz(("z_0.npy", WHOLE), ("z_1.npy", WHOLE)).replace(b"z_1", b"z_0"),
    "a member that leaves": npz(("../../z_0.npy", WHOLE)),
    "a member that is no array": npz(("z_0", b"hello"), ("z_0.npy", WHOLE)),
    "deep info": npz(("z_0.npy", WHOLE), ("info.npy", npy("'<U20000'", "()", ("[" * 20000).encode("utf-32-le")))),
    "encrypted": npz(("z_0.npy", WHOLE), flags=1),
    **{f"compression {method}": npz(("z_0.npy", WHOLE), method=method) for method in (8, 9, 12, 14, 97)},
}
SAFETENSORS: dict[str, bytes] = {
    "bfloat16": safetensors({"z_0": z_0("BF16", [1, 2, 4, 4], 64)}, b"\0" * 64),
    "float8": safetensors({"z_0": z_0("F8_E4M3", [1, 2, 4, 4], 32)}, b"\0" * 32),
    "float4": safetensors({"z_0": z_0("F4", [1, 2, 4, 4], 16)}, b"\0" * 16),
    "complex": safetensors({"z_0": z_0("C64", [1, 2, 4, 4], 256)}, b"\0" * 256),
    "0 x 2^63": safetensors({"z_0": z_0("F32", [0, 2**63], 0)}),
    "0 x 2^40 x 2^40 beside": safetensors(
        {"z_0": F32, "e": {"dtype": "F32", "shape": [0, 2**40, 2**40], "data_offsets": [128, 128]}}, b"\0" * 128
    ),
    "deep info": safetensors({"__metadata__": {"info": "[" * 100_000}, "z_0": F32}, b"\0" * 128),
    "info of a huge number": safetensors({"__metadata__": {"info": "9" * 5000}, "z_0": F32}, b"\0" * 128),
    "a header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
}


@pytest.mark.case(
    "A11",
    "2,000 damaged files of latents, and hand-made ones: zlib, zip version, encrypted, 10^13 values",
    "each is refused with exit code 65, in less than a megabyte",
)
@pytest.mark.parametrize(
    ("suffix", "data"),
    [(".npz", data) for data in NPZ.values()] + [(".safetensors", data) for data in SAFETENSORS.values()],
    ids=[*NPZ, *SAFETENSORS],
)
def test_a_hostile_file_of_latents_is_refused_in_little_memory(tmp_path: Path, suffix: str, data: bytes) -> None:
    path = tmp_path / f"latents{suffix}"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(BadInputError, match=path.name) as caught:
            read_latents(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20 + 8 * len(data)
    finally:
        tracemalloc.stop()
    assert all(letter.isprintable() for letter in str(caught.value))


@pytest.mark.case("A11")
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_damaged_file_of_latents_is_refused_or_read(tmp_path: Path, suffix: str) -> None:
    draw, good, path = random.Random(1), latents_bytes(suffix, ARRAYS, INFO), tmp_path / f"latents{suffix}"
    refused = 0
    for _ in range(1000):
        bad = bytearray(good)
        at, other = draw.randrange(len(bad)), draw.randrange(len(bad))
        kind = draw.randrange(4)
        if kind == 0:
            bad[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del bad[at:]
        elif kind == 2:
            bad[at : at + 4] = draw.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"])
        else:
            bad[at : at + 16] = bad[other : other + 16]
        path.write_bytes(bad)
        try:
            read_latents(path)
        except BadInputError:
            refused += 1
    assert refused > 300  # the others changed a number


@pytest.mark.case("A11")
def test_a_pickle_for_latents_is_not_trusted_and_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"\x80\x04.")
    with pytest.raises(UntrustedError, match="pickle"):
        read_latents(tmp_path / "a.safetensors")
    os.mkfifo(tmp_path / "b.npz")
    with pytest.raises(BadInputError, match=r"b\.npz"):
        read_latents(tmp_path / "b.npz")
