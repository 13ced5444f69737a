"""The perceptual distance: equal to that of the package its weights come from, and sensible."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_eval_similarity import pair

from ul_export.evaluation.features import open_perceptual

# The package imports what it does not need: empty modules stand in for that.
ORACLE = """
import json, sys, types
for name in ("torchsummary", "IPython", "torchvision", "torchvision.models", "cv2", "skimage", "skimage.metrics"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["torchsummary"].summary = sys.modules["IPython"].embed = None
sys.modules["torchvision"].models = sys.modules["torchvision.models"]
sys.modules["skimage.metrics"].structural_similarity = None
import numpy as np, torch
from stlpips_pytorch.stlpips import LPIPS
network = LPIPS(net="alex", variant="shift_tolerant", verbose=False)
with np.load(sys.argv[1]) as file, torch.inference_mode():
    print(json.dumps(network(torch.from_numpy(file["a"]), torch.from_numpy(file["b"])).flatten().tolist()))
"""


def test_the_package_finds_the_same_distance(tmp_path: Path) -> None:
    a, b = pair(3, size=72)
    np.savez(tmp_path / "pair.npz", a=a, b=b)
    words = [sys.executable, "-c", ORACLE, str(tmp_path / "pair.npz")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    expected = json.loads(done.stdout.splitlines()[-1])
    found = open_perceptual()
    assert found(a, b) == pytest.approx(expected, rel=1e-5)
    assert found(a, np.roll(b, 8, axis=3)) != pytest.approx(expected, rel=1e-5)  # the control


def test_images_are_at_no_distance_from_themselves_and_farther_the_more_noise_there_is() -> None:
    found = open_perceptual()
    for channels in (1, 3):
        a, little = pair(channels, size=32, noise=0.05)
        _, much = pair(channels, size=32, noise=0.5)
        assert found(a, a) == pytest.approx(np.zeros(len(a)), abs=1e-7)
        assert (found(a, much) > found(a, little)).all()
        assert (found(a, little) > 1e-4).all()


def test_a_shift_by_one_pixel_counts_for_less_than_noise_of_the_same_error() -> None:
    a, _ = pair(3, size=64)
    shifted = np.roll(a, 1, axis=3)
    error = np.sqrt(np.square(shifted - a).mean(axis=(1, 2, 3), keepdims=True))
    noisy = a + error * np.random.default_rng(0).normal(size=a.shape).astype(np.float32)
    found = open_perceptual()
    assert (found(a, shifted) < found(a, noisy.astype(np.float32))).all()
