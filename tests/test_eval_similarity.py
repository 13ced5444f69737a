"""PSNR's error and SSIM of reconstructions, beside torchmetrics."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from ul_export.evaluation.statistics import squared_error, ssim
from ul_train.heldout import psnr_db


def pair(channels: int, size: int = 24, noise: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Smooth pictures in [-1, 1] and noisy ones."""
    random = np.random.default_rng(channels)
    coarse = torch.from_numpy(random.uniform(-1, 1, (4, channels, 4, 4)))
    a = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").numpy().clip(-1, 1)
    b = (a + noise * random.normal(size=a.shape)).clip(-1, 1)
    return a.astype(np.float32), b.astype(np.float32)


def torchmetrics_ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of the places whose window lies within the image; torchmetrics itself mirrors the borders."""
    given = torch.from_numpy(a).double(), torch.from_numpy(b).double()
    _, full = structural_similarity_index_measure(*given, data_range=2.0, reduction="none", return_full_image=True)
    return full[:, :, 5:-5, 5:-5].mean(dim=(1, 2, 3)).numpy()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [11, 24])
def test_torchmetrics_finds_the_same_ssim(channels, size):
    a, b = pair(channels, size)
    assert ssim(a, b) == pytest.approx(torchmetrics_ssim(a, b), abs=1e-6)
    assert ssim(a, b) != pytest.approx(torchmetrics_ssim(a, np.roll(b, 1, axis=3)), abs=1e-6)  # the control


def test_an_image_is_like_itself_and_less_so_the_more_noise_there_is():
    a, little = pair(3, noise=0.05)
    _, much = pair(3, noise=0.5)
    assert ssim(a, a) == pytest.approx(1.0)
    assert (ssim(a, little) > ssim(a, much) + 0.1).all()


def test_torchmetrics_finds_the_same_psnr():
    a, b = pair(3)
    expected = peak_signal_noise_ratio(torch.from_numpy(a), torch.from_numpy(b), data_range=2.0)
    assert psnr_db(float(squared_error(a, b).mean())) == pytest.approx(float(expected), abs=1e-4)
    assert psnr_db(float(squared_error(a, a).mean())) == float("inf")
