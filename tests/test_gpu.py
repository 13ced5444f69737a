"""On an NVIDIA card: every backend against ONNX Runtime on the CPU, and replays against steps that are enqueued."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported_run import PLAIN, exported_run

from ul_export.compare import FP32, image_psnr_db
from ul_runtime.backends import ON_A_CARD, open_backend
from ul_runtime.bundle import Bundle
from ul_runtime.cards import cards
from ul_runtime.errors import UsageError
from ul_runtime.pipeline import Pipeline

pytestmark = pytest.mark.gpu
GUIDED = {"steps": 8, "guidance": 2.0, "guidance_interval": (-3.0, 1.5)}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_run(PLAIN, tmp_path_factory).bundle


@pytest.fixture(params=ON_A_CARD)
def pipeline(request: pytest.FixtureRequest, bundle: Path, tmp_path_factory, monkeypatch) -> Pipeline:
    monkeypatch.setenv("UL_CACHE", str(tmp_path_factory.getbasetemp()))
    try:
        if not cards():
            pytest.skip("this machine has no NVIDIA card")
        opened = Bundle.open(bundle)
        return Pipeline(opened, open_backend(request.param, opened))
    except UsageError as error:
        pytest.skip(str(error))


def pictures(pipeline: Pipeline, images: Any = 4, **options: Any) -> np.ndarray:
    return np.concatenate([each.x for each in pipeline.generate(images, **options)])


def test_pictures_are_those_of_the_cpu_within_the_published_tolerance(pipeline, bundle):
    opened = Bundle.open(bundle)
    host = Pipeline(opened, open_backend("ort-cpu", opened))
    for options in (GUIDED, {"steps": 4, "sampler": "sa2"}, {"steps": 4, "decoder_sampler": "ancestral"}):
        for batch_size in (1, 3, 16):
            expected = pictures(host, 5, batch_size=batch_size, **options)
            assert image_psnr_db(expected, pictures(pipeline, 5, batch_size=batch_size, **options)) > FP32.least_psnr_db


def test_replays_equal_steps_that_are_enqueued_byte_for_byte(pipeline):
    replayed = pictures(pipeline, **GUIDED)
    loop = pipeline.backend.loop  # type: ignore[attr-defined]
    if pipeline.backend.name == "tensorrt":
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
        {"labels": 2},
        {"steps": 9},
        {"sampler": "unipc2"},
        {"grid": "karras"},
        {"guidance": 3.0},
    ):
        assert not np.array_equal(first, pictures(pipeline, **(GUIDED | change)))
    assert np.array_equal(first, pictures(pipeline, **GUIDED))
    assert loop.captured == captured


def test_buckets_can_be_interleaved_and_an_image_is_the_same_bytes_in_a_bucket(pipeline):
    alone = {n: pictures(pipeline, n, batch_size=n, **GUIDED) for n in (1, 2, 8)}
    for n in (8, 1, 2, 1, 8):
        assert pictures(pipeline, n, batch_size=n, **GUIDED).tobytes() == alone[n].tobytes()
    backwards = pictures(pipeline, [7, 6, 5, 4, 3, 2, 1, 0], batch_size=8, labels="none", **GUIDED)
    forwards = pictures(pipeline, 8, batch_size=8, labels="none", **GUIDED)
    assert backwards[::-1].tobytes() == forwards.tobytes()
