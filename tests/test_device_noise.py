"""Noise that a device makes is, byte for byte, that of ul_runtime.noise: by the kernel for GPUs."""

import hashlib
import re
import shutil
import subprocess

import numpy as np
import pytest
from ptx import Machine

from ul_runtime import noise
from ul_runtime.backends.gpu import KERNEL, PTX_FILE, SOURCE_FILE

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


def test_the_kernels_parameters_are_what_is_passed():
    declared = re.findall(r"\.param \.u(\d\d)", PTX_FILE.read_text())
    assert declared == ["64"] * 3 + ["32"] * 4
    assert f".entry {KERNEL}(" in PTX_FILE.read_text()
