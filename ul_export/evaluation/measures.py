"""The figures: of samples, of reconstructions, of bits, and of samples that are copies of training images."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np

from ul_export.evaluation.comparison import Comparison
from ul_export.evaluation.features import EXTRACT_BATCH, PERCEPTUAL, features_of, open_perceptual
from ul_export.evaluation.statistics import (
    SMALLEST_PX,
    distances,
    figure,
    figures,
    frechet_distance,
    nearest,
    share_nearer,
    squared_error,
    ssim,
)
from ul_runtime.errors import UsageError
from ul_runtime.images.convert import from_uint8
from ul_runtime.install import install
from ul_runtime.progress import Tick, progress
from ul_runtime.settings import Overrides
from ul_train.data.imageset import ImageSet, epoch_order
from ul_train.heldout import psnr_db

Compare = Callable[[np.ndarray, np.ndarray], np.ndarray]  # two x `b c h w` in [-1, 1] -> `b`
NEIGHBOURS = 5  # of each sample
_TELLING_SHARE = 0.2  # of samples nearer than held-out images; below it samples are unlike all real images


def measure_samples(comparison: Comparison) -> tuple[dict[str, Any], np.ndarray, dict[str, np.ndarray]]:
    """Figures of the samples of all seeds, by space and name. NonFiniteError.

    Also the first seed's samples, uint8 `n c h w`, and their features `n d` by space.
    """
    count, real = comparison.options.images, comparison.real_features
    drawn: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []
    model: dict[str, list[dict[str, float]]] = {name: [] for name in real}
    floor: dict[str, list[dict[str, float]]] = {name: [] for name in real}
    with progress("sampling", count * len(comparison.seeds), "images") as tick:
        for seed in comparison.seeds:
            images, features = comparison.sampled(seed, count, comparison.overrides, tick)
            drawn = drawn or [(images, features)]
            first, second = comparison.halves(seed)
            for name in real:
                tick(0)
                model[name].append(distances(features[name], real[name][first]))
                floor[name].append(distances(real[name][second], real[name][first]))
    return {name: figures(count, model[name], floor[name]) for name in real}, *drawn[0]


def find_neighbours(
    comparison: Comparison, features: dict[str, np.ndarray]
) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """How near samples are to training images, in the first space.

    Also the nearest training images of each sample, nearest first: index and distance, both `n k`.
    """
    space, train = comparison.spaces[0], comparison.splits.train
    ids = epoch_order(len(train), 0, 0)[: comparison.options.train_images or len(train)]
    generated, heldout = features[space.name], comparison.heldout_features[space.name]
    with progress("searching training images", len(ids), "images") as tick:
        chunks = (features_of(space, train.images, ids[part], tick) for part in _parts(len(ids), EXTRACT_BATCH))
        index, distance = nearest(np.concatenate([generated, heldout]), chunks, min(NEIGHBOURS, len(ids)))
    count = len(generated)
    of_samples, of_heldout = distance[:count, 0], distance[count:, 0]
    record = {
        "features": space.name,
        "count": count,
        "heldout_count": len(heldout),
        "train_images": len(ids),
        "all_train_images": len(train),
        "median_distance": float(np.median(of_samples)),
        "heldout_median_distance": float(np.median(of_heldout)),
        "nearer_than_heldout": share_nearer(of_samples, of_heldout),
        "real": share_nearer(of_heldout[::2], of_heldout[1::2]),
    }
    return record, ids[index[:count]], distance[:count]


def note_of_copies(memorisation: dict[str, Any]) -> list[str]:
    """What to say where the search for copies says nothing: the samples are too far from all real images."""
    if memorisation["nearer_than_heldout"] >= _TELLING_SHARE:
        return []
    samples, heldout = memorisation["median_distance"], memorisation["heldout_median_distance"]
    return [
        f"the search for copies says nothing: samples are farther from training images ({samples:.3g} in the median) "
        f"than unseen real images are ({heldout:.3g}), so the nearest ones shown are not alike; make better samples "
        "first (docs/bad-pictures.md)"
    ]


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
        absent["perceptual_distance"] = f"stlpips-pytorch is not installed; {install('perceptual')}"
    return measures, absent


def measure_reconstructions(comparison: Comparison, measures: dict[str, Compare]) -> tuple[dict[str, Any], np.ndarray]:
    """One decode of every held-out image and seed; real: of one held-out image to another.

    Also the first seed's decoded images, uint8 `n c h w`.
    """
    ids = comparison.heldout_ids
    if len(ids) < 2:
        raise UsageError("one image is held out, and reconstructions need two or more; name more with --heldout")
    real, originals = comparison.real_features, comparison.heldout_features
    shown: list[np.ndarray] = []
    model, chance, rfd, rfd_real = [], [], [], []
    with progress("reconstructing", len(ids) * len(comparison.seeds), "images") as tick:
        for k, seed in enumerate(comparison.seeds):
            partners = np.roll(ids, 1 + k % (len(ids) - 1))
            decoded, similar, unrelated = _reconstruct(comparison, partners, seed, measures, tick)
            model.append(similar)
            chance.append(unrelated)
            shown = shown or [decoded]
            features = comparison.features(decoded, np.arange(len(ids)), lambda _: tick(0))
            rfd.append({name: frechet_distance(features[name], originals[name]) for name in real})
            first, second = (half[: len(ids)] for half in comparison.halves(seed))
            rfd_real.append({name: frechet_distance(real[name][second], real[name][first]) for name in real})
    record = figures(len(ids), model, chance) | {"frechet_distance": figures(len(ids), rfd, rfd_real)}
    return record, shown[0]


def _reconstruct(
    comparison: Comparison, partners: np.ndarray, seed: int, measures: dict[str, Compare], tick: Tick
) -> tuple[np.ndarray, dict[str, float], dict[str, float]]:
    """(decoded uint8 `n c h w`, its likeness to the originals, that of the held-out images `partners` to them)."""
    ids, images, pipeline = comparison.heldout_ids, comparison.splits.heldout, comparison.pipeline
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
    pipeline, num_samples, bits = comparison.pipeline, comparison.options.bits_samples, []
    for part in _parts(len(ids), pipeline.default_batch_size):
        z_clean = pipeline.encode(from_uint8(images.batch(ids[part])[0]), seed=seed, indices=ids[part]).z_clean
        bits.append(pipeline.bits(z_clean, seed=seed, indices=ids[part], num_samples=num_samples, tick=tick))
    return float(np.concatenate(bits).mean()) / float(np.prod(pipeline.image_shape[1:]))


def _parts(count: int, size: int) -> Iterator[slice]:
    return (slice(first, first + size) for first in range(0, count, size))
