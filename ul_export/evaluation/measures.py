"""The figures: of samples, of reconstructions, of bits, and of samples that are copies of training images."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from ul_export.evaluation.comparison import Comparison
from ul_export.evaluation.features import EXTRACT_BATCH, PERCEPTUAL, features_of, open_perceptual
from ul_export.evaluation.statistics import (
    SMALLEST_PX,
    Nearest,
    distances,
    figure,
    figures,
    frechet_distance,
    share_nearer,
    squared_error,
    ssim,
)
from ul_runtime.errors import UsageError
from ul_runtime.images import from_uint8
from ul_runtime.progress import Tick, progress
from ul_runtime.settings import Overrides
from ul_train.data.imageset import ImageSet, epoch_order
from ul_train.heldout import psnr_db

Compare = Callable[[np.ndarray, np.ndarray], np.ndarray]  # two x `b c h w` in [-1, 1] -> `b`
NEIGHBOURS = 5  # of each sample
MOST_SHOWN = 32  # reconstructions


@dataclass(frozen=True)
class Samples:
    """Images uint8 `n c h w` of a seed, and their features `n d` by space."""

    images: np.ndarray
    features: dict[str, np.ndarray]


@dataclass(frozen=True)
class Reconstructions:
    """The first held-out images, and what they decode to by the first seed, both uint8 `n c h w`."""

    originals: np.ndarray
    decoded: np.ndarray


def measure_samples(comparison: Comparison) -> tuple[dict[str, Any], Samples]:
    """Figures of the samples of all seeds, by space and name; and the samples of the first. NonFiniteError."""
    real = comparison.real_features  # with a progress bar of its own: one at a time
    drawn: list[Samples] = []
    model: dict[str, list[dict[str, float]]] = {space.name: [] for space in comparison.spaces}
    floor: dict[str, list[dict[str, float]]] = {space.name: [] for space in comparison.spaces}
    with progress("sampling", comparison.count * len(comparison.seeds), "images") as tick:
        for seed in comparison.seeds:
            samples = _draw(comparison, seed, tick)
            drawn = drawn or [samples]
            first, second = (_chosen(real, half) for half in comparison.halves(seed))
            for name in model:
                tick(0)
                model[name].append(distances(samples.features[name], first[name]))
                floor[name].append(distances(second[name], first[name]))
    return {name: figures(comparison.count, model[name], floor[name]) for name in model}, drawn[0]


def _draw(comparison: Comparison, seed: int, tick: Tick) -> Samples:
    batches = comparison.pipeline.generate(
        comparison.count, seed=seed, labels=comparison.labels(seed), tick=tick, **comparison.overrides
    )
    images = np.ascontiguousarray(np.concatenate([batch.images for batch in batches]).transpose(0, 3, 1, 2))
    return Samples(images, _features(comparison, images, tick))


def _features(comparison: Comparison, images: np.ndarray, tick: Tick) -> dict[str, np.ndarray]:
    """By space, of images uint8 `n c h w` that are counted already."""
    ids = np.arange(len(images))
    return {space.name: features_of(space, images, ids, lambda _: tick(0)) for space in comparison.spaces}


def find_neighbours(comparison: Comparison, samples: Samples) -> tuple[dict[str, Any], Nearest]:
    """How near samples are to training images, in the first space; and the nearest training images of each."""
    space, train = comparison.spaces[0], comparison.splits.train
    ids = epoch_order(len(train), 0, 0)[: comparison.options.train_images or len(train)]
    generated, heldout = samples.features[space.name], comparison.heldout_features[space.name]
    queries = np.concatenate([generated, heldout])
    nearest = Nearest.none(len(queries), min(NEIGHBOURS, len(ids)))
    with progress("searching training images", len(ids), "images") as tick:
        for part in _parts(len(ids), EXTRACT_BATCH):
            nearest = nearest.among(queries, features_of(space, train.images, ids[part], tick), part.start)
    of_samples, of_heldout = np.split(nearest.distance[:, 0], [len(generated)])
    record = {
        "features": space.name,
        "count": len(generated),
        "heldout_count": len(heldout),
        "train_images": len(ids),
        "all_train_images": len(train),
        "median_distance": float(np.median(of_samples)),
        "heldout_median_distance": float(np.median(of_heldout)),
        "nearer_than_heldout": share_nearer(of_samples, of_heldout),
        "real": share_nearer(of_heldout[::2], of_heldout[1::2]),
    }
    index = ids[nearest.index]
    return record, Nearest(index[: len(generated)], nearest.distance[: len(generated)])


def image_measures(size: int) -> tuple[dict[str, Compare], dict[str, str]]:
    """What compares two images of that size, by name; and what is absent, with the reason.

    `psnr_db` stands for the squared error until all images are in.
    """
    measures: dict[str, Compare] = {"psnr_db": squared_error}
    absent = {}
    if size >= SMALLEST_PX:
        measures["ssim"] = ssim
    else:
        absent["ssim"] = f"images of {size} px, {SMALLEST_PX} or more are needed"
    if find_spec(PERCEPTUAL) is not None:
        measures["perceptual_distance"] = open_perceptual()
    else:
        absent["perceptual_distance"] = "stlpips-pytorch is not installed; pip install 'unified-latents[perceptual]'"
    return measures, absent


def measure_reconstructions(
    comparison: Comparison, measures: dict[str, Compare]
) -> tuple[dict[str, Any], Reconstructions]:
    """One decode of every held-out image and seed; real: of one held-out image to another. And the first images."""
    ids, heldout = comparison.heldout_ids, comparison.splits.heldout
    if len(ids) < 2:
        raise UsageError("one image is held out, and reconstructions need two or more; name more with --heldout")
    real, originals = comparison.real_features, comparison.heldout_features
    shown: list[np.ndarray] = []
    model, chance, rfd, rfd_real = [], [], [], []
    with progress("reconstructing", len(ids) * len(comparison.seeds), "images") as tick:
        for k, seed in enumerate(comparison.seeds):
            partners = np.roll(ids, 1 + k % (len(ids) - 1))
            decoded, similar, unrelated = _reconstruct(comparison, ids, partners, seed, measures, tick)
            model.append(similar)
            chance.append(unrelated)
            shown = shown or [decoded[:MOST_SHOWN]]
            features = _features(comparison, decoded, tick)
            rfd.append(_frechet_distances(features, originals))
            first, second = (_chosen(real, half[: len(ids)]) for half in comparison.halves(seed))
            rfd_real.append(_frechet_distances(second, first))
    record = figures(len(ids), model, chance) | {"frechet_distance": figures(len(ids), rfd, rfd_real)}
    return record, Reconstructions(np.asarray(heldout.images[ids[:MOST_SHOWN]]), shown[0])


def _chosen(features: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    return {name: values[rows] for name, values in features.items()}


def _frechet_distances(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: frechet_distance(a[name], b[name]) for name in a}


def _reconstruct(
    comparison: Comparison,
    ids: np.ndarray,
    partners: np.ndarray,
    seed: int,
    measures: dict[str, Compare],
    tick: Tick,
) -> tuple[np.ndarray, dict[str, float], dict[str, float]]:
    """(decoded uint8 `n c h w`, its likeness to the originals, that of the held-out images `partners` to them)."""
    images, pipeline = comparison.splits.heldout, comparison.pipeline
    decoder = Overrides(decoder_steps=comparison.overrides.get("decoder_steps"))
    decoded: list[np.ndarray] = []
    similar: dict[str, list[np.ndarray]] = {name: [] for name in measures}
    unrelated: dict[str, list[np.ndarray]] = {name: [] for name in measures}
    for part in _parts(len(ids), pipeline.default_batch_size):
        x, other = (from_uint8(images.batch(of[part])[0]) for of in (ids, partners))
        z_0 = pipeline.encode(x, seed=seed, indices=ids[part]).z_0
        for batch in pipeline.decode(z_0, seed=seed, indices=ids[part], tick=tick, **decoder):
            decoded.append(batch.images.transpose(0, 3, 1, 2))
            for name, compare in measures.items():
                similar[name].append(compare(batch.x.clip(-1.0, 1.0), x))
                unrelated[name].append(compare(other, x))
    return np.concatenate(decoded), _averaged(similar), _averaged(unrelated)


def _averaged(values: dict[str, list[np.ndarray]]) -> dict[str, float]:
    """Means over all images; PSNR is of the mean squared error, as in ul-train report."""
    means = {name: float(np.concatenate(parts).mean()) for name, parts in values.items()}
    return means | {"psnr_db": psnr_db(means["psnr_db"])}


def measure_bits(comparison: Comparison) -> dict[str, Any]:
    """Bits per pixel of held-out images under the bundle's prior. Real: of as many training images."""
    ids, train = comparison.heldout_ids, comparison.splits.train
    trained_on = epoch_order(len(train), 0, 0)[: len(ids)]
    with progress("bits", (len(ids) + len(trained_on)) * len(comparison.seeds), "images") as tick:
        of_heldout, of_train = (
            [_bits_per_pixel(comparison, images, chosen, seed, tick) for seed in comparison.seeds]
            for images, chosen in ((comparison.splits.heldout, ids), (train, trained_on))
        )
    return figure(len(ids), of_heldout, of_train) | {"num_samples": comparison.options.bits_samples}


def _bits_per_pixel(comparison: Comparison, images: ImageSet, ids: np.ndarray, seed: int, tick: Tick) -> float:
    pipeline, bits = comparison.pipeline, []
    for part in _parts(len(ids), pipeline.default_batch_size):
        z_clean = pipeline.encode(from_uint8(images.batch(ids[part])[0]), seed=seed, indices=ids[part]).z_clean
        num_samples = comparison.options.bits_samples
        bits.append(pipeline.bits(z_clean, seed=seed, indices=ids[part], num_samples=num_samples, tick=tick))
    return float(np.concatenate(bits).mean()) / float(np.prod(pipeline.image_shape[1:]))


def _parts(count: int, size: int) -> Iterator[slice]:
    return (slice(first, first + size) for first in range(0, count, size))
