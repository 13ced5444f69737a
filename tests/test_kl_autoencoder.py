"""tools/kl_autoencoder.py: the rival is diffusers' autoencoder itself, at equal compute, in a bundle like any other."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from exported_run import PLAIN, exported_run
from tool_module import TOOLS, load_tool

from ul_runtime.bundle import Bundle
from ul_runtime.diffusion import x_from_v
from ul_train.config import load_config

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    pytest.importorskip("diffusers")
    return load_tool("kl_autoencoder")


@pytest.mark.parametrize("logsnr", [-8.0, 0.0, 6.0])
def test_the_decoder_predicts_what_the_latent_decodes_to_whatever_the_noisy_image_is(tool, logsnr):
    config = load_config("tiny", [])
    autoencoder = tool.make_autoencoder(config, (16, 16, 16), 1).eval()
    z_0, x_t, level = (
        torch.randn(2, *config.latent_shape),
        torch.randn(2, *config.image_shape),
        torch.full((2,), logsnr),
    )
    with torch.no_grad():
        v_pred = tool.Decode(autoencoder, 3.0)(x_t, level, z_0)
        expected = autoencoder.decode(z_0 / 3.0).sample
    pred = x_from_v(x_t, v_pred, level.reshape(-1, 1, 1, 1))
    torch.testing.assert_close(pred, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_both_models_are_trained_at_equal_compute_and_measured_alike(tool, tmp_path, tmp_path_factory):
    pytest.importorskip("sklearn")
    ul = exported_run(PLAIN, tmp_path_factory)
    if not (ul.run / "bundle").exists():
        (ul.run / "bundle").symlink_to(ul.bundle)
    words = [
        "--beside",
        ul.run,
        "--data",
        "sklearn-digits",
        "--out",
        tmp_path / "kl",
        "--results",
        tmp_path / "results",
    ]
    words += ["--cache", tmp_path / "cache", "--channels", "16,16,16", "--images", "20", "--eval-seeds", "1"]
    words += ["--threads", "1", "--eval-option=--features=pixels", "--eval-option=--bits-samples=1"]
    settings = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, TOOLS / "kl_autoencoder.py", *words]
    done = subprocess.run(program, env=settings, capture_output=True, text=True, timeout=300, check=True)
    record = json.loads((tmp_path / "results" / "kl-autoencoder.json").read_text())
    first, second = record["figures"].values()
    assert second["training_flops"]["base"] == first["training_flops"]["base"]
    assert second["training_flops"]["first stage"] == pytest.approx(first["training_flops"]["first stage"], rel=0.1)
    assert first["count"] == second["count"] == 20
    assert done.stdout == (tmp_path / "results" / "kl-autoencoder.md").read_text()
    manifest = Bundle.open(tmp_path / "kl" / "bundle").manifest
    assert manifest.defaults.decoder.num_steps == 1
    assert manifest.logsnr_z.max == tool.LATENT_LOGSNR
