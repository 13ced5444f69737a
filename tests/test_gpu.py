"""On an NVIDIA GPU: every backend against ONNX Runtime on the CPU, and replays against steps that are enqueued."""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported_run import PLAIN, Exported, exported_run

import ul_runtime
from ul_export.verify import FP32, image_psnr_db
from ul_runtime import noise
from ul_runtime.backends import ON_GPU
from ul_runtime.backends.choose import check_step, open_backend
from ul_runtime.bundle import Bundle
from ul_runtime.cli import generate
from ul_runtime.errors import UsageError
from ul_runtime.machine import gpus
from ul_runtime.pipeline import Pipeline
from ul_train.torch_backend import TorchMemory

pytestmark = pytest.mark.gpu
GUIDED = {"steps": 8, "guidance": 2.0, "guidance_interval": (-3.0, 1.5)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported_run(PLAIN, tmp_path_factory)


@pytest.fixture(scope="module")
def bundle(exported: Exported) -> Path:
    return exported.bundle


@pytest.fixture(params=[*ON_GPU, "torch"])
def pipeline(request: pytest.FixtureRequest, exported: Exported, tmp_path_factory, monkeypatch) -> Pipeline:
    monkeypatch.setenv("UL_CACHE", str(tmp_path_factory.getbasetemp()))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        if not gpus():
            pytest.skip("this machine has no NVIDIA GPU")
        where = exported.run if request.param == "torch" else exported.bundle
        return ul_runtime.load(where, backend=request.param, device=0)
    except UsageError as error:
        pytest.skip(str(error))


def pictures(pipeline: Pipeline, images: Any = 4, **options: Any) -> np.ndarray:
    return np.concatenate([each.x for each in pipeline.generate(images, **options)])


def test_pictures_are_those_of_the_cpu_within_the_published_tolerance(pipeline, bundle):
    opened = Bundle.open(bundle)
    host = Pipeline(opened.manifest, open_backend("ort-cpu", opened))
    for options in (GUIDED, {"steps": 4, "sampler": "sa2"}, {"steps": 4, "decoder_sampler": "ancestral"}):
        for batch_size in (1, 3, 16):
            expected = pictures(host, 5, batch_size=batch_size, **options)
            assert image_psnr_db(expected, pictures(pipeline, 5, batch_size=batch_size, **options)) > FP32.least_psnr_db


def test_replays_equal_steps_that_are_enqueued_byte_for_byte(pipeline):
    replayed = pictures(pipeline, **GUIDED)
    loop = pipeline.backend.loop  # type: ignore[attr-defined]
    if pipeline.backend.name != "ort-cuda":  # which captures by itself
        assert loop.captured == 3
    loop.release()
    loop.captures = False
    assert pictures(pipeline, **GUIDED).tobytes() == replayed.tobytes()


def test_changed_settings_capture_nothing_anew_and_change_the_pictures(pipeline):
    loop = pipeline.backend.loop  # type: ignore[attr-defined]
    first = pictures(pipeline, **GUIDED)
    captured = loop.captured
    for change in (
        {"seed": 1},
        {"labels": "#2"},
        {"steps": 9},
        {"sampler": "unipc2"},
        {"grid": "karras"},
        {"guidance": 3.0},
    ):
        assert not np.array_equal(first, pictures(pipeline, **(GUIDED | change)))
    assert np.array_equal(first, pictures(pipeline, **GUIDED))
    assert loop.captured == captured


def test_buckets_can_be_interleaved_and_an_image_is_the_same_bytes_in_a_bucket(pipeline):
    alone = {n: pictures(pipeline, n, batch_size=n, labels="none", **GUIDED) for n in (1, 2, 8)}
    for n in (8, 1, 2, 1, 8):
        assert pictures(pipeline, n, batch_size=n, labels="none", **GUIDED).tobytes() == alone[n].tobytes()
    assert image_psnr_db(alone[8], pictures(pipeline, 8, batch_size=2, labels="none", **GUIDED)) > FP32.least_psnr_db
    backwards = pictures(pipeline, [7, 6, 5, 4, 3, 2, 1, 0], batch_size=8, labels="none", **GUIDED)
    forwards = pictures(pipeline, 8, batch_size=8, labels="none", **GUIDED)
    assert backwards[::-1].tobytes() == forwards.tobytes()


def test_pictures_in_uint8_are_those_of_x(pipeline):
    kept, bare = (list(pipeline.generate(3, keep_x=keep, **GUIDED)) for keep in (True, False))  # type: ignore[misc]
    assert bare[0].images.tobytes() == kept[0].images.tobytes()


def test_nothing_is_allocated_or_waited_for_inside_the_loop(pipeline, monkeypatch):
    pictures(pipeline, 2, **GUIDED)
    memory: Any = pipeline.backend.loop.memory  # type: ignore[attr-defined]
    counts = dict.fromkeys(("allocate", "wait"), 0)

    def counted(name: str) -> Any:
        method = getattr(memory, name)

        def call(*arguments: Any) -> Any:
            counts[name] += 1
            return method(*arguments)

        return call

    for name in counts:
        monkeypatch.setattr(memory, name, counted(name))
    found = []
    for steps in (4, 12):
        counts |= {"allocate": 0, "wait": 0}
        pictures(pipeline, 2, **(GUIDED | {"steps": steps}))
        found.append(dict(counts))
    assert found[0] == found[1] == {"allocate": 1, "wait": 1}


@pytest.mark.parametrize(("indices", "size"), [([0], 1), ([5, 2**63 - 1, 2**32, 5], 4099)])
def test_a_gpu_makes_the_hosts_noise_byte_for_byte(pipeline, indices, size):
    memory: Any = pipeline.backend.loop.memory  # type: ignore[attr-defined]
    numbers, out = np.array(indices, np.int64), np.empty((len(indices), size), np.float32)
    memory.use()
    at, to = memory.allocate(numbers.nbytes), memory.allocate(out.nbytes)
    memory.upload(at, numbers)
    memory.normals(to, 2**64 - 5, at, len(indices), noise.decoder_step(3), size)
    memory.download(to, out)
    memory.wait()
    memory.free(at)
    memory.free(to)
    assert out.tobytes() == noise.normals(2**64 - 5, indices, noise.decoder_step(3), (size,)).tobytes()


def test_a_guide_is_asked_on_the_gpu(exported, pipeline):
    where = exported.run if pipeline.backend.name == "torch" else exported.bundle
    guided = ul_runtime.load(where, guide=where, backend=pipeline.backend.name, device=0)
    assert guided.guide is not None
    assert guided.backend.shares_order(guided.guide.backend)  # type: ignore[attr-defined]
    opened = Bundle.open(exported.bundle)
    guide = Pipeline(opened.manifest, open_backend("ort-cpu", opened))
    host = Pipeline(opened.manifest, open_backend("ort-cpu", opened), guide)
    assert image_psnr_db(pictures(host, **GUIDED), pictures(guided, **GUIDED)) > FP32.least_psnr_db


def test_a_picture_is_made_again_in_a_batch_of_its_size(exported, pipeline, command, tmp_path):
    where = exported.run if pipeline.backend.name == "torch" else exported.bundle
    machine = ("--backend", pipeline.backend.name, "--devices", 0)
    words = ("--num-images", 5, "--batch-size", 4, "--steps", 4, "--out", tmp_path / "job")
    assert command(generate.main, where, *words, *machine).code == 0
    for index in (2, 4):
        result = command(generate.main, where, "--replay", tmp_path / "job" / f"{index:06d}.png", *machine)
        assert result.code == 0, result
        assert "the same file, byte for byte" in result.out


def test_a_pipeline_that_is_dropped_gives_its_memory_back(exported, pipeline):
    if pipeline.backend.name == "torch":
        pytest.skip("torch keeps memory for its next tensors")
    from cuda.bindings import runtime

    def left() -> int:
        gc.collect()
        return runtime.cudaMemGetInfo()[1]

    found = []
    for _ in range(3):
        again = ul_runtime.load(exported.bundle, backend=pipeline.backend.name, device=0)
        pictures(again, 8, batch_size=8, **GUIDED)
        del again
        found.append(left())
    assert found[2] >= found[1] - 2**20


def test_auto_takes_a_gpu_and_its_step_is_the_cpus(pipeline, bundle):
    if pipeline.backend.name == "torch":
        pytest.skip("torch samples runs, and auto bundles")
    opened = Bundle.open(bundle)
    assert check_step(pipeline.backend, opened) < 1e-3
    assert open_backend("auto", opened).name in ON_GPU


def test_two_runs_of_one_captured_step_with_other_inputs_differ():
    if not torch.cuda.is_available():
        pytest.skip("torch finds no NVIDIA GPU")
    memory = TorchMemory()
    at = memory.allocate(64)
    to = memory.allocate(64)
    replay = memory.capture(lambda: memory.copy(to, at, 64))
    found = []
    for value in (1, 2):
        memory.upload(at, np.full(64, value, np.uint8))
        replay()
        out = np.empty(64, np.uint8)
        memory.download(to, out)
        memory.wait()
        found.append(out[0])
    assert found == [1, 2]
