"""Samples against real images: the figures of each seed, and pictures for people."""

from dataclasses import dataclass

import numpy as np

from ul_export.evaluation.features import features_of
from ul_export.evaluation.figures import Figure, against, over_seeds
from ul_export.evaluation.subject import Subject
from ul_runtime.control import Control


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
