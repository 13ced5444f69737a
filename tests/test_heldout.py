"""Held-out figures of a model that is exact on Gaussian data, and which images the Gaussian bound is made from."""

import numpy as np
import pytest
import torch
from exact_denoisers import gaussian_mean, gaussian_v, v_from_x
from tiny_run import CPU, image_set, stop_at, tiny
from torch import Tensor, nn

from ul_runtime.diffusion import NATS_PER_BIT, alpha, sigma
from ul_runtime.errors import StoppedError
from ul_runtime.images.convert import from_uint8
from ul_runtime.manifest import BundleInfo
from ul_runtime.pipeline import Pipeline
from ul_train.data.imageset import ImageSet
from ul_train.heldout import (
    DEAD_BITS_PER_VALUE,
    HeldoutFigures,
    bound_eigenvalues,
    gaussian_psnr_db,
    image_covariance_eigenvalues,
    latent_capacity_bits,
    measure,
)
from ul_train.run import Run
from ul_train.torch_backend import torch_pipeline

STD = 0.25  # of every pixel, in [-1, 1]
SCALE = 2.0  # of the encoder
LOGSNR_0 = 5.0
SIDE = 4
SPREAD = 0.3


class ScaledSubset(nn.Module):
    """The analytic encoder: every fourth pixel in both directions, scaled. 16x16 pixels -> 2x4x4 latents."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * torch.cat([x[:, :, ::4, ::4], x[:, :, 1::4, ::4]], dim=1)


class Spread(ScaledSubset):
    """The same with noise of its own, of standard deviation SPREAD."""

    learned_variance = True

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = self(x)
        return mean, torch.full_like(mean, 2 * float(np.log(SPREAD)))


class ExactPrior(nn.Module):
    """Knows that latents are N(0, std^2), independent."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.predict = gaussian_v(std)

    def forward(self, z: Tensor, logsnr: Tensor, label: Tensor) -> Tensor:
        return self.predict(z, logsnr)


class ExactDecoder(nn.Module):
    """Knows that pixels are N(0, STD^2), independent, and reads the encoded ones from z_0 as well."""

    def forward(self, x: Tensor, logsnr: Tensor, z_0: Tensor) -> Tensor:
        level = logsnr.reshape(-1, 1, 1, 1)
        pred = gaussian_mean(x, level, STD)
        noise = (sigma(LOGSNR_0) / (alpha(LOGSNR_0) * SCALE)) ** 2  # variance of a pixel read from z_0
        gain = STD**2 / (STD**2 + noise)
        mean, std = gain * z_0 / (alpha(LOGSNR_0) * SCALE), (gain * noise) ** 0.5
        for channel, row in ((0, 0), (1, 1)):
            seen = gaussian_mean(x[:, 0, row::4, ::4], level[:, 0], std, mean[:, channel])
            pred[:, 0, row::4, ::4] = seen
        return v_from_x(x, pred, level)


def gaussian_images(num: int) -> ImageSet:
    """Images of independent Gaussian pixels, rounded to 8 bits."""
    made = image_set(num)
    x = np.random.default_rng(1).normal(0.0, STD, made.images.shape)
    object.__setattr__(made, "images", np.clip(np.rint((x + 1) * 127.5), 0, 255).astype(np.uint8))
    return made


def described() -> BundleInfo:
    return Run.in_memory(tiny("sampling.decoder_steps=32"), ("a",)).manifest()


def exact(encoder: nn.Module, prior_std: float) -> dict[str, nn.Module]:
    return {"encoder": encoder, "prior": ExactPrior(prior_std), "decoder": ExactDecoder()}


def pipeline(scale: float = SCALE, prior_std: float = SCALE * STD) -> Pipeline:
    return torch_pipeline(described(), exact(ScaledSubset(scale), prior_std), CPU, "fp32")


@pytest.fixture(scope="module")
def figures() -> HeldoutFigures:
    torch.set_num_threads(1)
    return measure(pipeline(), gaussian_images(300), 256, mean_of=4, bits_samples=16)


def gaussian_bits(std: float) -> float:
    """Rate of N(0, std^2) at the noise of z_0, and what the end at logsnr_min adds, in bits a value."""
    at_end = float(np.exp(-10.0))
    nats = 0.5 * np.log1p(std**2 * np.exp(LOGSNR_0)) - 0.5 * np.log1p(std**2 * at_end)
    a, s = float(alpha(-10.0)), float(sigma(-10.0))
    terminal = 0.5 * (a**2 * std**2 + s**2 - 1.0 - np.log(s**2))
    return float((nats + terminal) / NATS_PER_BIT)


def test_bits_equal_the_closed_form_within_their_error(figures: HeldoutFigures) -> None:
    expected = gaussian_bits(SCALE * STD)
    assert figures.bits_per_value == pytest.approx(expected, rel=0.02)
    assert figures.bits_per_image == pytest.approx(32 * figures.bits_per_value)
    assert figures.bits_per_pixel == pytest.approx(figures.bits_per_image / 256)


def test_a_learned_variance_is_drawn_and_its_bits_are_counted() -> None:
    std = float(np.hypot(SCALE * STD, SPREAD))
    spread = torch_pipeline(described(), exact(Spread(SCALE), std), CPU, "fp32")
    drawn = measure(spread, gaussian_images(300), 256, mean_of=1, bits_samples=16)
    assert drawn.latent_std == pytest.approx(std, rel=0.02)
    paid = (-LOGSNR_0 - 2 * np.log(SPREAD)) / (2 * NATS_PER_BIT)
    assert drawn.bits_per_value - paid == pytest.approx(gaussian_bits(std), rel=0.02)


def test_a_wrong_prior_costs_more_bits(figures: HeldoutFigures) -> None:
    wrong = measure(pipeline(prior_std=2 * SCALE * STD), gaussian_images(300), 64, mean_of=1)
    assert wrong.bits_per_value > 1.05 * gaussian_bits(SCALE * STD)


def test_the_mean_of_decodes_is_closer_than_one_by_the_closed_form(figures: HeldoutFigures) -> None:
    hidden = 1 - 32 / 256  # share of pixels that z_0 says nothing of: a draw errs twice their variance
    one, mean = (4 / (hidden * STD**2 * factor) for factor in (2.0, 1.25))
    assert figures.psnr_db == pytest.approx(10 * np.log10(one), abs=0.2)
    assert figures.psnr_mean_db == pytest.approx(10 * np.log10(mean), abs=0.2)
    assert figures.psnr_mean_db > figures.psnr_db + 1.5
    assert (figures.num_images, figures.mean_of, figures.decoder_steps) == (256, 4, 32)


def test_the_standard_deviation_is_that_of_the_latents(figures: HeldoutFigures) -> None:
    assert figures.latent_std == pytest.approx(SCALE * STD, rel=0.02)


def test_figures_do_not_depend_on_the_batch(figures: HeldoutFigures) -> None:
    other = pipeline()
    other.default_batch_size = 37
    again = measure(other, gaussian_images(300), 256, mean_of=4, bits_samples=16)
    assert again.bits_per_image == pytest.approx(figures.bits_per_image, rel=1e-5)
    assert again.psnr_mean_db == pytest.approx(figures.psnr_mean_db, rel=1e-5)


def test_fewer_images_than_asked_for_are_counted() -> None:
    assert measure(pipeline(), gaussian_images(5), 100, mean_of=1).num_images == 5


@pytest.mark.parametrize(("scale", "died"), [(1e-4, True), (0.05, True), (0.5, False), (SCALE, False)])
def test_a_latent_below_its_noise_is_dead_whatever_the_prior_has_learned(scale: float, died: bool) -> None:
    untrained = pipeline(scale, prior_std=1.0)
    figures = measure(untrained, gaussian_images(32), 32, mean_of=1)
    assert figures.latent_died == died
    assert ("latent_died" in figures.as_dict()) == died
    assert figures.bits_per_value > DEAD_BITS_PER_VALUE  # the bound of a prior that has learned nothing yet


def test_the_capacity_of_a_latent_is_shannon_s() -> None:
    assert latent_capacity_bits(1.0, 0.0) == pytest.approx(0.5)
    assert latent_capacity_bits(0.5, LOGSNR_0) == pytest.approx(gaussian_bits(0.5), rel=1e-3)
    assert latent_capacity_bits(0.0, LOGSNR_0) == 0.0


def test_a_measurement_stops_when_asked_and_counts_decodes() -> None:
    done: list[float] = []
    measure(pipeline(), gaussian_images(5), 5, mean_of=2, tick=done.append)
    assert sum(done) == pytest.approx(10)
    with pytest.raises(StoppedError):
        measure(pipeline(), gaussian_images(5), 5, tick=stop_at(1))


def test_the_bound_is_that_of_the_rate(figures: HeldoutFigures) -> None:
    images = gaussian_images(300)
    eigenvalues = image_covariance_eigenvalues(images.images[:, :, :SIDE, :SIDE])
    bounded = measure(pipeline(), images, 16, mean_of=1, eigenvalues=eigenvalues)
    assert bounded.gaussian_psnr_db == gaussian_psnr_db(eigenvalues, bounded.bits_per_image)
    assert figures.gaussian_psnr_db is None
    assert "gaussian_psnr_db" not in figures.as_dict()


def small(num: int) -> ImageSet:
    made = gaussian_images(num)
    object.__setattr__(made, "images", made.images[:, :, :SIDE, :SIDE])
    return made


def test_the_bound_is_of_the_measured_images_or_of_the_training_images_if_those_are_few() -> None:
    size = SIDE * SIDE
    many, few = small(5 * size), small(3 * size)
    eigenvalues, of_what = bound_eigenvalues(many, few, 4 * size)
    assert of_what == f"{4 * size} held-out images"
    assert eigenvalues == pytest.approx(image_covariance_eigenvalues(many.images[: 4 * size]))
    eigenvalues, of_what = bound_eigenvalues(many, many, 4 * size - 1)
    assert of_what == "training images"
    assert eigenvalues == pytest.approx(image_covariance_eigenvalues(many.images))
    assert bound_eigenvalues(few, few, 3 * size) == (None, f"not computed: fewer than {4 * size} images")


def test_the_bound_is_not_computed_for_large_images() -> None:
    large = image_set(2, size=80)
    assert bound_eigenvalues(large, large, 2) == (None, "not computed: 6400 values an image, at most 4096")


def test_pixels_map_to_both_ends() -> None:
    assert from_uint8(np.array([0, 255], np.uint8)).tolist() == [-1.0, 1.0]
