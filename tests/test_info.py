"""ul-info: what a bundle is. ul_runtime.read_images: files as encode takes them."""

import json

import numpy as np
import pytest
from analytic_bundle import write_analytic_bundle
from PIL import Image

import ul_runtime
from ul_runtime.cli.info import main
from ul_runtime.errors import BadInputError


@pytest.mark.case(
    "N15",
    "which classes has a bundle; a picture file into pipeline.encode",
    "ul-info shows classes, sizes, precision, settings, origin and hash; ul_runtime.read_images reads files",
)
def test_info_says_what_a_bundle_is(command, analytic_bundle):
    result = command(main, analytic_bundle, "--json")
    assert result.code == 0, result
    facts = json.loads(result.out)
    assert facts["classes"] == ["red", "green", "blue"]
    assert facts["image"] == [3, 8, 8]
    assert facts["hash"] == ul_runtime.load(analytic_bundle, threads=1).hash
    assert facts["settings"]["prior_sampler"] == "dpmpp2m"
    assert set(facts["precision"].values()) == {"fp32"}
    shown = command(main, analytic_bundle).out.splitlines()
    assert "classes       red, green, blue" in shown
    assert "image         3 x 8 x 8" in shown


def test_info_shortens_a_thousand_classes_and_refuses_what_is_no_bundle(command, tmp_path):
    write_analytic_bundle(tmp_path / "many", classes=tuple(f"c{i}" for i in range(1000)))
    line = next(line for line in command(main, tmp_path / "many").out.splitlines() if line.startswith("classes "))
    assert line.endswith("c29, and 970 more")
    command.fails(main, 65, "no such folder", tmp_path / "nowhere")


@pytest.mark.case("N15")
def test_files_and_folders_are_read_as_encode_takes_them(analytic_bundle, tmp_path):
    pipeline = ul_runtime.load(analytic_bundle, threads=1)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    for name, image in zip("ab", pixels, strict=True):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    x = ul_runtime.read_images(tmp_path, pipeline)
    assert x.dtype == np.float32
    assert np.array_equal(x, pixels.transpose(0, 3, 1, 2) / np.float32(127.5) - 1)
    assert np.array_equal(ul_runtime.read_images(str(tmp_path / "b.png"), pipeline), x[1:])
    assert np.array_equal(ul_runtime.read_images([tmp_path / "b.png", tmp_path / "a.png"], pipeline), x[::-1])
    assert pipeline.encode(x).z_clean.shape == (2, *pipeline.latent_shape)


@pytest.mark.case("N15")
def test_a_file_that_cannot_be_read_is_named(analytic_bundle, tmp_path):
    pipeline = ul_runtime.load(analytic_bundle, threads=1)
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(BadInputError, match=r"bad\.png: not an image"):
        ul_runtime.read_images(tmp_path / "bad.png", pipeline)
    with pytest.raises(BadInputError, match="no such file"):
        ul_runtime.read_images(tmp_path / "none.png", pipeline)
    with pytest.raises(BadInputError, match="no images are given"):
        ul_runtime.read_images([], pipeline)
