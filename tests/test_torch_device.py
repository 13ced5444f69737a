"""A run sampled by torch as it is: the loop on a device is the host's, and the pictures are those of its bundle."""

from typing import Any

import numpy as np
import pytest
import torch
from exported_run import PLAIN, Exported, exported_run
from host_memory import HostMemory

import ul_runtime
from ul_export.verify import FP32, image_psnr_db
from ul_runtime.cli import generate
from ul_runtime.errors import BadInputError, UsageError
from ul_runtime.pipeline import Pipeline
from ul_train.run import Run
from ul_train.torch_backend import TorchDeviceBackend

LOOPS = (
    {"steps": 5, "guidance": 2.0, "guidance_interval": (-3.0, 1.5)},
    {"steps": 4, "sampler": "sa2", "guidance": 1.5, "guidance_rescale": 0.5},
    {"steps": 4, "sampler": "ab3", "guidance": 1.0, "decoder_sampler": "ancestral", "decoder_steps": 4},
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.set_num_threads(1)
    return exported_run(PLAIN, tmp_path_factory)


def pictures(pipeline: Pipeline, images: object = 5, **options: object) -> np.ndarray:
    return np.concatenate([each.x for each in pipeline.generate(images, **options)])  # type: ignore[arg-type]


@pytest.mark.parametrize("options", LOOPS)
def test_pictures_are_those_of_the_bundle(exported, options):
    bundle, run = (
        ul_runtime.load(exported.bundle, threads=1),
        ul_runtime.load(exported.run, backend="torch", threads=1),
    )
    for images, batch_size in ((5, 3), ([7, 2], 2)):
        how = {"seed": 4, "labels": ["#1", "#2", "none"], "batch_size": batch_size, **options}
        expected = pictures(bundle, images, **how)
        assert image_psnr_db(expected, pictures(run, images, **how)) > FP32.least_psnr_db
    assert np.abs(pictures(run, 2, seed=5, **options) - pictures(run, 2, seed=6, **options)).max() > 0.01


def on_device(exported: Exported, memory: HostMemory, *, captured: bool = False, **options: Any) -> TorchDeviceBackend:
    """Torch's networks behind the loop of a device, whose memory is the host's."""
    trained = Run.open(exported.run).finished()
    backend = TorchDeviceBackend(trained.networks, trained.manifest(), memory, **options)
    if captured:
        backend.loop.captures = True
        backend.loop.bind = memory.recording(backend.loop.bind)
    return backend


@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loop_on_a_device_is_the_hosts_byte_for_byte(exported, precision, captured):
    run = ul_runtime.load(exported.run, backend="torch", threads=1, precision=precision)
    memory = HostMemory()
    there = Pipeline(run.manifest, on_device(exported, memory, captured=captured, precision=precision))
    for options in LOOPS:
        expected = pictures(run, 4, **options)
        assert pictures(there, 4, **options).tobytes() == expected.tobytes()
        (bare,) = there.generate(4, keep_x=False, **options)
        (kept,) = run.generate(4, **options)
        assert bare.images.tobytes() == kept.images.tobytes()
    assert (memory.replays > 0) == captured


def test_pictures_in_uint8_are_the_hosts_without_x(exported):
    run = ul_runtime.load(exported.run, backend="torch", threads=1)
    kept, bare = (list(run.generate(3, steps=3, keep_x=keep)) for keep in (True, False))
    assert bare[0].images.tobytes() == kept[0].images.tobytes()
    assert bare[0].kept_x is None


def test_bfloat16_is_another_precision_and_said(exported):
    exact, half = (ul_runtime.load(exported.run, backend="torch", threads=1, precision=p) for p in (None, "bf16"))
    assert half.computed_by == {"backend": "torch", "precision": "bf16", "threads": 1}
    assert 20 < image_psnr_db(pictures(exact, 4), pictures(half, 4)) < FP32.least_psnr_db


def test_encoder_bits_and_a_guide_work(exported):
    run = ul_runtime.load(exported.run, guide=exported.run, backend="torch", threads=1)
    bundle = ul_runtime.load(exported.bundle, guide=exported.bundle, threads=1)
    x = np.random.default_rng(0).uniform(-1, 1, (3, *run.image_shape)).astype(np.float32)
    np.testing.assert_allclose(run.encode(x).z_clean, bundle.encode(x).z_clean, atol=1e-5)
    assert image_psnr_db(pictures(bundle, 2, guidance=1.5), pictures(run, 2, guidance=1.5)) > FP32.least_psnr_db


def test_a_command_samples_a_run_and_replays_its_picture(exported, command, tmp_path):
    words = ["--backend", "torch", "--threads", 1]
    made = command(generate.main, exported.run, "--out", tmp_path / "out", "-n", 2, "--steps", 3, *words)
    assert made.code == 0, made
    assert len(list((tmp_path / "out").glob("0*.png"))) == 2
    picture = min((tmp_path / "out").glob("0*.png"))
    again = command(generate.main, exported.run, "--replay", picture)
    assert again.code == 0, again
    assert "byte for byte" in again.out
    command.fails(generate.main, 65, "made by backend torch from a run", exported.bundle, "--replay", picture)


def test_a_run_without_torch_and_a_bundle_with_it_are_refused(exported):
    with pytest.raises(BadInputError, match="is a run of ul-train; ul-export makes a bundle of it, --backend torch"):
        ul_runtime.load(exported.run)
    with pytest.raises(BadInputError, match="a bundle of ul-export, and no run"):
        ul_runtime.load(exported.bundle, backend="torch")
    for options in ({"precision": "fp16"}, {"engines": "engines"}, {"require_graphs": True, "threads": 1}):
        with pytest.raises(UsageError):
            ul_runtime.load(exported.run, backend="torch", **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="give its folder"):
        ul_runtime.load(backend="torch")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_an_error(exported):
    with pytest.raises(UsageError, match="device cuda:3 cannot be used"):
        ul_runtime.load(exported.run, backend="torch", device=3)


def test_a_guides_prior_is_asked_on_the_device(exported):
    memory = HostMemory()
    guide, main = (on_device(exported, memory) for _ in range(2))
    assert main.shares_order(guide)
    run = ul_runtime.load(exported.run, guide=exported.run, backend="torch", threads=1)
    there = Pipeline(run.manifest, main, Pipeline(run.manifest, guide))
    options = {"steps": 5, "guidance": 2.0, "guidance_interval": (-3.0, 1.5)}
    assert pictures(there, 4, **options).tobytes() == pictures(run, 4, **options).tobytes()
