"""Are samples copies? Their nearest training images, and their distance beside that of unseen real images."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ul_export.evaluation.features import EXTRACT_BATCH, features_of
from ul_export.evaluation.generation import Generated
from ul_export.evaluation.neighbours import Nearest, share_nearer
from ul_export.evaluation.subject import Subject
from ul_runtime.control import Control
from ul_train.data import epoch_order

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
