"""The memory of a GPU by the real cuda.core, over a stand-in for the driver whose device is the host."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from exported_run import PLAIN, exported_run

from ul_runtime.backends.gpu import SOURCE_FILE

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed here")
START = """
import ctypes, gc, sys
import numpy as np
from ul_runtime import noise
from ul_runtime.backends import gpu
from ul_runtime.errors import OutOfMemoryError, ULError
from ul_runtime.machine import Gpu

gpu.gpus = lambda: [Gpu(0, "Host", "sm89", 2**30)]
driver = ctypes.CDLL("libcuda.so.1")
held, limit, launches = (ctypes.c_long.in_dll(driver, name) for name in ("held", "limit", "launches"))
memory = gpu.CudaMemory()

def there(array):
    at = memory.allocate(array.nbytes)
    memory.upload(at, array)
    return at

def back(at, like):
    made = np.empty_like(like)
    memory.download(at, made)
    memory.wait()
    return made

def raises(kind, work):
    try:
        work()
    except ULError as error:
        assert type(error) is kind, repr(error)
        return str(error)
    raise AssertionError("no error")
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with libcuda.so.1."""
    pytest.importorskip("cuda.core")
    folder = tmp_path_factory.mktemp("driver")
    built = ["g++", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-I", str(SOURCE_FILE.parent)]
    source = Path(__file__).with_name("cuda_driver.cpp")
    subprocess.run([*built, "-o", str(folder / "libcuda.so.1"), str(source), "-ldl"], check=True)
    return folder


def run(driver: Path, code: str, *arguments: object) -> None:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(driver)}
    words = [sys.executable, "-c", START + code, *map(str, arguments)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_bytes_go_there_and_back_and_are_made_zero(driver):
    run(driver, """
x = np.arange(1, 65, dtype=np.uint8)
a, b = there(x), there(x[::-1].copy())
memory.copy(b + 8, a, 16)
assert back(b, x).tolist() == [*x[::-1][:8], *x[:16], *x[::-1][24:]]
memory.clear(b + 60, 4)
assert back(b, x)[58:].tolist() == [6, 5, 0, 0, 0, 0]
""")  # fmt: skip


def test_noise_is_the_hosts_byte_for_byte(driver):
    run(driver, """
cases = ((0, [0], 0, 1), (2**64 - 1, [5, 2**63 - 1, 2**32], noise.decoder_step(3), 4099), (3, [7, 7], 2**32 - 1, 64))
for seed, indices, stream, size in cases:
    out = np.full((len(indices), size), np.nan, np.float32)
    to = there(out)
    memory.normals(to, seed, there(np.array(indices, np.int64)), len(indices), stream, size)
    assert back(to, out).tobytes() == noise.normals(seed, indices, stream, (size,)).tobytes()
    memory.normals(to, seed ^ 1, there(np.array(indices, np.int64)), len(indices), stream, size)  # the control
    assert back(to, out).tobytes() != noise.normals(seed, indices, stream, (size,)).tobytes()
assert "a GPU makes at most" in raises(ULError, lambda: memory.normals(to, 0, to, 1, 0, 2**31))
""")  # fmt: skip


def test_a_capture_runs_nothing_and_its_replays_read_what_is_there_then(driver):
    run(driver, """
x = np.arange(64, dtype=np.uint8)
a, b = there(x), there(0 * x)
out, indices = there(np.zeros(9, np.float32)), there(np.array([4], np.int64))

def work():
    assert not gc.isenabled(), "what is collected may free memory, which would end the capture"
    memory.copy(b, a, 64)
    memory.normals(out, 5, indices, 1, 6, 9)

memory.normals(out, 0, indices, 1, 0, 9)  # loads the kernel, which is a wait
replay = memory.capture(work)
assert gc.isenabled()
assert not back(b, x).any()
for x in (x, x + 1):
    memory.upload(a, x)
    replay()
    assert back(b, x).tolist() == x.tolist()
assert back(out, np.zeros(9, np.float32)).tobytes() == noise.normals(5, [4], 6, (9,)).tobytes()
assert launches.value == 2
""")  # fmt: skip


def test_a_capture_that_fails_is_an_error_and_the_stream_takes_work_again(driver):
    run(driver, """
x = np.arange(8, dtype=np.uint8)
a, b = there(x), there(0 * x)
assert "STREAM_CAPTURE_UNSUPPORTED" in raises(ULError, lambda: memory.capture(memory.wait))

def full():
    raise OutOfMemoryError("of the work")

assert raises(OutOfMemoryError, lambda: memory.capture(full)) == "of the work"
assert gc.isenabled()
memory.copy(b, a, 8)
assert back(b, x).tolist() == x.tolist()
""")  # fmt: skip


def test_memory_that_is_short_is_said_and_a_memory_that_nobody_holds_gives_all_back(driver):
    run(driver, """
at = memory.allocate(100)
memory.allocate(20)
limit.value = 150
assert "GPU 0 has no memory left; give a smaller --batch-size" in raises(OutOfMemoryError, lambda: memory.allocate(40))
memory.free(at)
assert held.value == 20
memory.allocate(40)
cycle = [memory, memory.capture(lambda: memory.clear(at, 1))]
cycle.append(cycle)
del cycle, memory
gc.collect()
assert held.value == 0
""")  # fmt: skip


LOOPS = """
from ul_runtime.backends.ort_cpu import OrtCpuBackend
from ul_runtime.backends.ort_cuda import OrtDeviceBackend
from ul_runtime.bundle import Bundle
from ul_runtime.pipeline import Pipeline

class OnHost(gpu.CudaMemory):
    kind = "cpu"  # as ONNX Runtime calls the stand-in's device

def pipelines(path):
    bundle = Bundle.open(path)
    device = OrtDeviceBackend(bundle, OnHost(), ["CPUExecutionProvider"])
    return [Pipeline(bundle.manifest, each) for each in (device, OrtCpuBackend(bundle, threads=1))]

def images(pipeline, **options):
    return np.concatenate([each.x for each in pipeline.generate(5, batch_size=3, seed=4, **options)])

there, host = pipelines(sys.argv[1])
for options in (
    {"steps": 6, "guidance": 2.0, "guidance_interval": (-3.0, 1.5)},
    {"steps": 4, "sampler": "sa2", "guidance": 1.5},
    {"steps": 4, "sampler": "ab3", "decoder_sampler": "ancestral", "decoder_steps": 4},
):
    expected = images(host, **options)
    assert images(there, **options).tobytes() == expected.tobytes()
    assert images(there, **(options | {"steps": 7})).tobytes() != expected.tobytes()  # the control
    bare = [each.images for each in there.generate(5, batch_size=3, seed=4, keep_x=False, **options)]
    kept = [each.images for each in host.generate(5, batch_size=3, seed=4, **options)]
    assert np.concatenate(bare).tobytes() == np.concatenate(kept).tobytes()
there.backend.loop.release()
assert held.value == np.stack(noise.quantile_table()).nbytes, "the table of the noise alone"
"""


def test_images_of_the_loop_in_this_memory_are_the_hosts_byte_for_byte(driver, tmp_path_factory):
    run(driver, LOOPS, exported_run(PLAIN, tmp_path_factory).bundle)
