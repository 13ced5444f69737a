"""Held-out figures: bits, reconstruction error, and the Gaussian bound at that rate."""

import math
from dataclasses import asdict, dataclass

import numpy as np

from ul_runtime import noise
from ul_runtime.diffusion import NATS_PER_BIT, alpha
from ul_runtime.images.convert import from_uint8
from ul_runtime.images.png import contact_sheet, png_bytes
from ul_runtime.pipeline import Encoded, Pipeline
from ul_runtime.progress import Tick, silent
from ul_train.data.imageset import Images, ImageSet


def reverse_water_filling(eigenvalues: np.ndarray, bits: float) -> float:
    """Least squared error, summed over dimensions, of a Gaussian with these variances at `bits` in all.

    D = sum min(level, lambda), R = sum max(0, 1/2 log2(lambda / level)); the water level is found in closed form.
    """
    if bits < 0:
        raise ValueError(f"bits {bits} must be 0 or more")
    variances = np.sort(np.asarray(eigenvalues, np.float64))[::-1]
    variances = variances[variances > 0]
    if bits == 0 or not len(variances):
        return float(variances.sum())
    logs = np.cumsum(np.log2(variances))
    active = np.arange(1, len(variances) + 1)
    levels = (logs - 2.0 * bits) / active  # log2 of the level if exactly the k largest are above water
    below = np.append(np.log2(variances[1:]), -np.inf)
    count = int(np.argmax(levels >= below)) + 1
    return float(count * np.exp2(levels[count - 1]) + variances[count:].sum())


def image_covariance_eigenvalues(images: Images, chunk: int = 4096) -> np.ndarray:
    """Eigenvalues `c*h*w` of the covariance of uint8 images `n c h w`, scaled to [-1, 1]; one chunk in memory."""
    num, size = len(images), int(np.prod(images.shape[1:]))
    total, second = np.zeros(size), np.zeros((size, size))
    for first in range(0, num, chunk):
        x = images[first : first + chunk].reshape(-1, size).astype(np.float64) / 127.5 - 1.0
        total += x.sum(axis=0)
        second += x.T @ x
    mean = total / num
    return np.maximum(np.linalg.eigvalsh(second / num - np.outer(mean, mean)), 0.0)


def psnr_db(mean_squared_error: float) -> float:
    """10 log10(4 / mse) for values in [-1, 1]; infinite without error."""
    return float(10.0 * np.log10(4.0 / mean_squared_error)) if mean_squared_error > 0 else float("inf")


def gaussian_psnr_db(eigenvalues: np.ndarray, bits: float) -> float:
    """PSNR of the Gaussian rate-distortion function at `bits` an image."""
    return psnr_db(reverse_water_filling(eigenvalues, bits) / len(eigenvalues))


DEAD_BITS_PER_VALUE = 0.05  # below this rate a latent carries next to nothing
MOMENTS = "moments"  # the graph of such an encoder, which only torch has
MOST_DIMENSIONS = 4096  # of an image, for its covariance
_OTHER_SEED = 1  # than that of the fixed noise
_PAIRS = 32  # on a sheet of reconstructions


@dataclass(frozen=True)
class HeldoutFigures:
    """Figures of `num_images` images. PSNRs are of the mean squared error over all of them, in dB."""

    num_images: int
    bits_per_image: float  # the prior's bound, terminal KL included
    bits_per_pixel: float
    bits_per_value: float
    latent_std: float
    decoder_steps: int
    psnr_db: float  # one decode: a draw
    mean_of: int
    psnr_mean_db: float  # of the mean of `mean_of` decodes: the distortion
    gaussian_psnr_db: float | None  # Gaussian rate-distortion function at bits_per_image
    latent_died: bool  # the latent carries next to nothing

    def as_dict(self) -> dict[str, float]:
        """The figures that are known and finite, by name; `latent_died` only if it did."""
        known = {name: value for name, value in asdict(self).items() if value is not None and math.isfinite(value)}
        return known if self.latent_died else {name: known[name] for name in known if name != "latent_died"}

    @property
    def in_short(self) -> str:
        """Rate and distortion, as a title."""
        return f"{self.bits_per_pixel:.4f} bits/pixel, PSNR {self.psnr_db:.2f} dB"

    @property
    def collapse_warning(self) -> str:
        """What to say and do when the latent has died (posterior collapse)."""
        return (
            f"the latent has died: {self.bits_per_value:.4f} bits a value, standard deviation {self.latent_std:.3f}; "
            "raise objective.loss_factor, bias or prior_ramp_steps"
        )


def latent_capacity_bits(latent_std: float, logsnr_0: float) -> float:
    """1/2 log2(1 + std^2 e^logsnr_0): most bits that a value of z_0 can carry, whatever the prior (Shannon 1948)."""
    return 0.5 * math.log2(1.0 + latent_std**2 * math.exp(logsnr_0))


def measure(
    pipeline: Pipeline,
    images: ImageSet,
    num_images: int,
    *,
    mean_of: int = 4,
    bits_samples: int = 16,
    eigenvalues: np.ndarray | None = None,
    tick: Tick = silent,
) -> HeldoutFigures:
    """Figures of the first `num_images` images, batch by batch; each decode of an image is a tick.

    `pipeline.backend` must hold the prior of stage 1.
    """
    num_images = min(num_images, len(images))
    batch, bits, one, mean = pipeline.default_batch_size, 0.0, 0.0, 0.0
    sums = np.zeros(2)  # of the latent's values and their squares
    num_values = int(np.prod(pipeline.latent_shape))

    def look(amount: float) -> None:
        tick(0)

    for first in range(0, num_images, batch):
        ids = np.arange(first, min(first + batch, num_images))
        x = from_uint8(images.batch(ids)[0])
        latent, bits_variance = _encode(pipeline, x, ids)
        bits += bits_variance
        bits += float(pipeline.bits(latent.z_clean, indices=ids, num_samples=bits_samples, tick=look).sum())
        sums += latent.z_clean.sum(dtype=np.float64), np.square(latent.z_clean, dtype=np.float64).sum()
        total = np.zeros(x.shape, np.float64)
        for k in range(mean_of):
            (decoded,) = pipeline.decode(latent.z_0, seed=k, indices=ids, batch_size=batch, tick=tick)
            total += decoded.x.clip(-1.0, 1.0)
            if k == 0:
                one += float(np.square(total - x).sum())
        mean += float(np.square(total / mean_of - x).sum())
    pixels, values = pipeline.image_shape[1] * pipeline.image_shape[2], num_images * int(np.prod(pipeline.image_shape))
    bits_per_image = bits / num_images
    latent_mean, latent_square = sums / (num_images * num_values)
    latent_std = math.sqrt(max(0.0, latent_square - latent_mean**2))
    capacity = latent_capacity_bits(latent_std, pipeline.manifest.logsnr_z.max)
    return HeldoutFigures(
        num_images=num_images,
        bits_per_image=bits_per_image,
        bits_per_pixel=bits_per_image / pixels,
        bits_per_value=bits_per_image / num_values,
        latent_std=latent_std,
        decoder_steps=pipeline.settings().decoder.num_steps,
        psnr_db=psnr_db(one / values),
        mean_of=mean_of,
        psnr_mean_db=psnr_db(mean / values),
        gaussian_psnr_db=None if eigenvalues is None else gaussian_psnr_db(eigenvalues, bits_per_image),
        latent_died=min(bits_per_image / num_values, capacity) < DEAD_BITS_PER_VALUE,
    )


def _encode(pipeline: Pipeline, x: np.ndarray, ids: np.ndarray) -> tuple[Encoded, float]:
    """(latents, bits in all beyond those of z_clean): drawn as in training if the encoder has a learned variance."""
    latent, backend = pipeline.encode(x, indices=ids), pipeline.backend
    if MOMENTS not in getattr(backend, "graphs", {}):
        return latent, 0.0
    log_variance = backend.run(MOMENTS, {"x": x})["log_variance"]
    schedule = pipeline.manifest.logsnr_z
    apart = np.exp(0.5 * log_variance) * noise.normals(_OTHER_SEED, ids, noise.ENCODER, pipeline.latent_shape)
    nats = 0.5 * float((-schedule.max - log_variance.astype(np.float64)).sum())
    return Encoded(latent.z_clean + apart, latent.z_0 + np.float32(alpha(schedule.max)) * apart), nats / NATS_PER_BIT


def bound_eigenvalues(heldout: ImageSet, train: ImageSet, num_images: int) -> tuple[np.ndarray | None, str]:
    """(covariance eigenvalues for the Gaussian bound, of which images).

    Of the images measured, or of the training images if those are few.

    None where an image has more than MOST_DIMENSIONS values, or there are fewer than four images a dimension.
    """
    size = int(np.prod(heldout.images.shape[1:]))
    if size > MOST_DIMENSIONS:
        return None, f"not computed: {size} values an image, at most {MOST_DIMENSIONS}"
    for what, images in (
        (f"{num_images} held-out images", heldout.images[:num_images]),
        ("training images", train.images),
    ):
        if len(images) >= 4 * size:
            return image_covariance_eigenvalues(images), what
    return None, f"not computed: fewer than {4 * size} images"


def reconstruction_sheet(pipeline: Pipeline, images: ImageSet, title: str, tick: Tick = silent) -> bytes:
    """PNG: originals, each beside its reconstruction."""
    ids = np.arange(min(_PAIRS, len(images)))
    pixels = images.batch(ids)[0]
    latent = pipeline.encode(from_uint8(pixels), indices=ids)
    decoded = [image for batch in pipeline.decode(latent.z_0, indices=ids, tick=tick) for image in batch.images]
    pairs = [
        side
        for original, other in zip(pixels.transpose(0, 2, 3, 1), decoded, strict=True)
        for side in (original, other)
    ]
    return png_bytes(contact_sheet(pairs, title, ("original", "decoded") * 4))


def sample_sheet(pipeline: Pipeline, title: str, tick: Tick = silent) -> bytes:
    """PNG: 8 samples of each of the first ten classes, or 64 without classes."""
    names = pipeline.manifest.classes[:10]
    num = 8 * len(names) if names else 64
    batches = pipeline.generate(num, labels=names or None, tick=tick)
    return png_bytes(contact_sheet([image for batch in batches for image in batch.images], title, names))
