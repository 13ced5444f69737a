"""Held-out images through encoder and decoder: how close they come back, and what they cost in bits."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ul_export.evaluation.distances import (
    SMALLEST_PX,
    Nearest,
    frechet_distance,
    share_nearer,
    squared_error,
    ssim,
    streamed,
)
from ul_export.evaluation.features import EXTRACT_BATCH, features_of
from ul_export.evaluation.subject import Figure, Subject, against, over_seeds
from ul_runtime.errors import UsageError
from ul_runtime.images import from_uint8
from ul_runtime.progress import Control
from ul_runtime.settings import Overrides
from ul_train.data.imageset import ImageSet, epoch_order
from ul_train.heldout import psnr_db


@dataclass(frozen=True)
class Generated:
    """Figures by space and name; samples `n c h w` uint8, their labels and their features by space, of seed 1."""

    figures: dict[str, dict[str, Figure]]
    samples: np.ndarray
    labels: np.ndarray
    features: dict[str, np.ndarray]


def measure_generation(subject: Subject) -> Generated:
    """Draws and measures the samples of every seed. StoppedError, NonFiniteError."""
    real = subject.pool_features
    model: dict[str, list[dict[str, float]]] = {space.name: [] for space in subject.spaces}
    floor: dict[str, list[dict[str, float]]] = {space.name: [] for space in subject.spaces}
    kept: list[tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]] = []
    with subject.watched("sampling", subject.count * len(subject.seeds)) as control:
        for seed in subject.seeds:
            samples, labels = _draw(subject, seed, control)
            quiet, everything = Control(subject.stop), np.arange(len(samples))
            features = {space.name: features_of(space, samples, everything, quiet) for space in subject.spaces}
            kept = kept or [(samples, labels, features)]
            first, second = subject.halves(seed)
            for name in model:
                control.check()
                model[name].append(against(features[name], real[name][first]))
                floor[name].append(against(real[name][second], real[name][first]))
    figures = {name: over_seeds(subject.count, model[name], floor[name]) for name in model}
    return Generated(figures, *kept[0])


def _draw(subject: Subject, seed: int, control: Control) -> tuple[np.ndarray, np.ndarray]:
    """Samples uint8 `n c h w` and their labels."""
    drawn = list(
        subject.pipeline.generate(
            subject.count, seed=seed, labels=subject.labels(seed), control=control, **subject.overrides
        )
    )
    images = np.concatenate([batch.images for batch in drawn]).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(images), np.concatenate([batch.labels for batch in drawn])


NEIGHBOURS = 5  # of each sample


@dataclass(frozen=True)
class Memorisation:
    """Nearest training images of the samples `n k` (indices of the training images) and the statistic."""

    nearest: Nearest
    figures: dict[str, Any]


def measure_memorisation(subject: Subject, generated: Generated, train_images: int | None) -> Memorisation:
    """In the first space, among all training images or `train_images` of them. StoppedError."""
    space, train = subject.spaces[0], subject.splits.train
    ids = epoch_order(len(train), 0, 0)[: train_images or len(train)]
    samples, heldout = generated.features[space.name], subject.heldout_features[space.name]
    queries = np.concatenate([samples, heldout])
    nearest = Nearest.none(len(queries), min(NEIGHBOURS, len(ids)))
    with subject.watched("searching training images", len(ids)) as control:
        for first in range(0, len(ids), EXTRACT_BATCH):
            part = features_of(space, train.images, ids[first : first + EXTRACT_BATCH], Control(subject.stop))
            nearest = nearest.among(queries, part, first)
            control.progress(len(part))
    index, closest = ids[nearest.index], nearest.distance[:, 0]
    of_samples, of_heldout = closest[: len(samples)], closest[len(samples) :]
    figures = {
        "features": space.name,
        "count": len(samples),
        "heldout_count": len(heldout),
        "train_images": len(ids),
        "all_train_images": len(train),
        "median_distance": float(np.median(of_samples)),
        "heldout_median_distance": float(np.median(of_heldout)),
        "nearer_than_heldout": share_nearer(of_samples, of_heldout),
        "real": share_nearer(of_heldout[::2], of_heldout[1::2]),
    }
    return Memorisation(Nearest(index[: len(samples)], nearest.distance[: len(samples)]), figures)


Compare = Callable[[np.ndarray, np.ndarray], np.ndarray]  # two x `b c h w` in [-1, 1] -> `b`
MOST_PICTURES = 32


@dataclass(frozen=True)
class Rebuilt:
    """Figures by name, the Frechet distance by space, and the first pictures `n c h w` uint8, of seed 1."""

    figures: dict[str, Figure]
    frechet: dict[str, Figure]
    originals: np.ndarray
    decoded: np.ndarray


def measure_reconstruction(subject: Subject, perceptual: Compare | None) -> Rebuilt:
    """One decode of every held-out image and seed. Real: of one held-out image to another. StoppedError."""
    ids = subject.heldout_ids
    if len(ids) < 2:
        raise UsageError("one image is held out, and reconstructions need two or more; name more with --heldout")
    measures = _measures(subject.pipeline.image_shape[1], perceptual)
    model, chance, rfd, rfd_real = [], [], [], []
    pictures: list[np.ndarray] = []
    with subject.watched("reconstructing", len(ids) * len(subject.seeds)) as control:
        for k, seed in enumerate(subject.seeds):
            decoded, figures, unrelated = _reconstruct(subject, ids, 1 + k % (len(ids) - 1), seed, measures, control)
            model.append(figures)
            chance.append(unrelated)
            pictures = pictures or [decoded[:MOST_PICTURES]]
            distances = _frechet(subject, decoded, seed)
            rfd.append({name: pair[0] for name, pair in distances.items()})
            rfd_real.append({name: pair[1] for name, pair in distances.items()})
    originals = np.asarray(subject.splits.heldout.images[ids[:MOST_PICTURES]])
    frechet = over_seeds(len(ids), rfd, rfd_real)
    return Rebuilt(over_seeds(len(ids), model, chance), frechet, originals, pictures[0])


def _measures(size: int, perceptual: Compare | None) -> dict[str, Compare]:
    """By name; `psnr_db` stands for the squared error until all images are in."""
    measures: dict[str, Compare] = {"psnr_db": squared_error}
    if size >= SMALLEST_PX:
        measures["ssim"] = ssim
    if perceptual is not None:
        measures["perceptual_distance"] = perceptual
    return measures


def _reconstruct(
    subject: Subject, ids: np.ndarray, apart: int, seed: int, measures: dict[str, Compare], control: Control
) -> tuple[np.ndarray, dict[str, float], dict[str, float]]:
    """(decoded uint8 `n c h w`, figures, figures of each original beside the original `apart` places on)."""
    images, pipeline = subject.splits.heldout, subject.pipeline
    decoder = Overrides(decoder_steps=subject.overrides.get("decoder_steps"))
    kept: list[np.ndarray] = []
    found: dict[str, list[np.ndarray]] = {name: [] for name in measures}
    other: dict[str, list[np.ndarray]] = {name: [] for name in measures}
    partners = np.roll(ids, apart)
    for part in _parts(len(ids), pipeline.default_batch_size):
        x = from_uint8(images.batch(ids[part])[0])
        unrelated = from_uint8(images.batch(partners[part])[0])
        z_0 = pipeline.encode(x, seed=seed, indices=ids[part]).z_0
        for batch in pipeline.decode(z_0, seed=seed, indices=ids[part], control=control, **decoder):
            kept.append(batch.images.transpose(0, 3, 1, 2))
            for name, compare in measures.items():
                found[name].append(compare(batch.x.clip(-1.0, 1.0), x))
                other[name].append(compare(unrelated, x))
    return np.concatenate(kept), _averaged(found), _averaged(other)


def _averaged(found: dict[str, list[np.ndarray]]) -> dict[str, float]:
    """Means over all images; PSNR is of the mean squared error, as in ul-train report."""
    means = {name: float(np.concatenate(parts).mean()) for name, parts in found.items()}
    return means | {"psnr_db": psnr_db(means["psnr_db"])}


def _frechet(subject: Subject, decoded: np.ndarray, seed: int) -> dict[str, tuple[float, float]]:
    """By space: (distance of the reconstructions to their originals, of as many real images to as many others)."""
    found = {}
    first, second = (half[: len(decoded)] for half in subject.halves(seed))
    for space in subject.spaces:
        features = features_of(space, decoded, np.arange(len(decoded)), Control(subject.stop))
        real = subject.pool_features[space.name]
        found[space.name] = (
            frechet_distance(streamed(features), streamed(subject.heldout_features[space.name])),
            frechet_distance(streamed(real[second]), streamed(real[first])),
        )
    return found


def measure_bits(subject: Subject) -> Figure:
    """Bits per pixel of held-out images under the bundle's prior. Real: of as many training images."""
    ids, train = subject.heldout_ids, subject.splits.train
    trained_on = epoch_order(len(train), 0, 0)[: len(ids)]
    with subject.watched("bits", (len(ids) + len(trained_on)) * len(subject.seeds)) as control:
        values = [_bits_per_pixel(subject, subject.splits.heldout, ids, seed, control) for seed in subject.seeds]
        real = [_bits_per_pixel(subject, train, trained_on, seed, control) for seed in subject.seeds]
    return Figure(len(ids), tuple(values), tuple(real))


def _bits_per_pixel(subject: Subject, images: ImageSet, ids: np.ndarray, seed: int, control: Control) -> float:
    pipeline, bits = subject.pipeline, []
    for part in _parts(len(ids), pipeline.default_batch_size):
        z_clean = pipeline.encode(from_uint8(images.batch(ids[part])[0]), seed=seed, indices=ids[part]).z_clean
        bits.append(
            pipeline.bits(z_clean, seed=seed, indices=ids[part], num_samples=subject.bits_samples, control=control)
        )
    return float(np.concatenate(bits).mean()) / float(np.prod(pipeline.image_shape[1:]))


def _parts(count: int, size: int) -> Iterator[slice]:
    return (slice(first, first + size) for first in range(0, count, size))
