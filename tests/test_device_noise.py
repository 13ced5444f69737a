"""Noise that a device makes is, byte for byte, that of ul_runtime.noise: by torch, and by the kernel for GPUs."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ptx import Machine

from ul_runtime import noise
from ul_runtime.backends import gpu
from ul_runtime.backends.gpu import KERNEL, PTX_FILE, SOURCE_FILE
from ul_train import torch_backend

CASES = [
    (0, [0], noise.PRIOR_START, 1),
    (1, [0, 1, 2**32 - 1, 2**32, 2**63 - 1], noise.DECODER_START, 4 * 700 + 3),
    (2**64 - 1, [5, 5, 3], noise.prior_step(7), 1024),
    (2**33 + 5, [9], noise.decoder_step(2**28 - 1), 4099),
]
THREADS = 64
OUT, TABLE, INDICES = 2**40, 2**41, 2**42


def by_the_kernel(ptx: str, seed: int, indices: list[int], stream: int, size: int) -> np.ndarray:
    out = np.full(len(indices) * size, np.nan, np.float32)
    memory = {OUT: out, TABLE: np.stack(noise.quantile_table()), INDICES: np.array(indices, np.int64)}
    values = (OUT, TABLE, INDICES, seed & 0xFFFFFFFF, seed >> 32, stream, size)
    Machine(ptx, memory).run(values, (len(indices), -(-size // (4 * THREADS))), THREADS)
    return out


@pytest.mark.parametrize(("seed", "indices", "stream", "size"), CASES)
def test_noise_by_torch_is_the_hosts_byte_for_byte(seed, indices, stream, size, monkeypatch):
    expected = noise.normals(seed, indices, stream, (size,))
    for chunk in (7, torch_backend._CHUNK):
        monkeypatch.setattr(torch_backend, "_CHUNK", chunk)
        made = torch_backend.normals(seed, torch.tensor(indices), stream, size)
        assert made.numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize(("seed", "indices", "stream", "size"), CASES)
def test_the_kernels_instructions_make_the_hosts_noise_byte_for_byte(seed, indices, stream, size):
    expected = noise.normals(seed, indices, stream, (size,))
    assert by_the_kernel(PTX_FILE.read_text(), seed, indices, stream, size).tobytes() == expected.tobytes()


def test_one_bit_of_the_kernel_is_seen():
    """Negative control: a multiplier, a key's step, and a constant of the quantile."""
    ptx, expected = PTX_FILE.read_text(), noise.normals(0, [0], 0, (64,))
    for was, now in (("-766435501", "-766435502"), ("-1640531527", "-1640531528"), ("0dBFF04", "0dBFF05")):
        assert was in ptx
        assert by_the_kernel(ptx.replace(was, now), 0, [0], 0, 64).tobytes() != expected.tobytes()


def test_what_could_be_fused_into_other_roundings_is_refused():
    """Negative control: mul.f64 without .rn may become part of a fused multiply-add."""
    with pytest.raises(AssertionError, match="may be fused"):
        by_the_kernel(PTX_FILE.read_text().replace("mul.rn.f64", "mul.f64"), 0, [0], 0, 64)


def test_the_kernel_is_compiled_from_its_source():
    digest = hashlib.sha256(SOURCE_FILE.read_bytes()).hexdigest()
    assert f"noise.cu, SHA-256 {digest}" in PTX_FILE.read_text(), "run tools/compile_noise.py"


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="ptxas, of CUDA's compiler, is not installed here")
@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_the_kernel_assembles_for_every_gpu(architecture, tmp_path):
    words = ["ptxas", f"-arch={architecture}", "-o", str(tmp_path / "noise.cubin"), str(PTX_FILE)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


CALLS = """
import numpy as np
from ul_runtime import noise
from ul_runtime.backends.gpu import NoiseKernel
from ul_runtime.errors import ULError

table = np.stack(noise.quantile_table())
kernel = NoiseKernel(table.ctypes.data)
for seed, indices, stream, size in ((0, [0], 0, 1), (2**64 - 1, [5, 2**63 - 1, 2**32], noise.decoder_step(3), 4099)):
    out, at = np.full((len(indices), size), np.nan, np.float32), np.array(indices, np.int64)
    kernel.enqueue(out.ctypes.data, seed, at.ctypes.data, len(indices), stream, size, 77)
    assert out.tobytes() == noise.normals(seed, indices, stream, (size,)).tobytes()
for stream, size, what in ((78, 64, "CUDA_ERROR_INVALID_VALUE"), (77, 2**31, "a GPU makes at most")):
    try:
        kernel.enqueue(out.ctypes.data, 0, at.ctypes.data, 1, 0, size, stream)
    except ULError as error:
        assert what in str(error), error
    else:
        raise AssertionError(what)
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed here")
def test_the_bindings_pass_the_kernel_what_it_takes(tmp_path):
    """The real bindings over a stand-in for the driver, which runs the kernel's source on the CPU."""
    pytest.importorskip("cuda.bindings.driver")
    built = ["g++", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-I", str(SOURCE_FILE.parent)]
    source = Path(__file__).with_name("cuda_driver.cpp")
    subprocess.run([*built, "-o", str(tmp_path / "libcuda.so.1"), str(source), "-ldl"], check=True)
    there = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", CALLS], env=there, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_kernels_parameters_are_what_is_passed():
    declared = re.findall(r"\.param \.u(\d\d)", PTX_FILE.read_text())
    assert declared == [str(8 * np.dtype(kind).itemsize) for kind in gpu._TYPES]
    assert f".entry {KERNEL}(" in PTX_FILE.read_text()
