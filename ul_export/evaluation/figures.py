"""A figure: its value over the seeds, and what real images in the model's place score at the same count."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ul_export.evaluation.kernel import kernel_distance
from ul_export.evaluation.moments import frechet_distance, streamed
from ul_export.evaluation.neighbours import density_coverage, precision_recall
from ul_export.evaluation.sliced import sliced_distance


@dataclass(frozen=True)
class Figure:
    """One value a seed, of the model and of real images; no `real` where there is nothing to put in its place."""

    count: int  # images on either side
    values: tuple[float, ...]
    real: tuple[float, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Means and standard deviations over the seeds, JSON-ready; None for what is not known."""
        return {
            "count": self.count,
            "value": _mean(self.values),
            "spread": _spread(self.values),
            "real": _mean(self.real),
            "real_spread": _spread(self.real),
        }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values and np.isfinite(values).all() else None


def _spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation."""
    return float(np.std(values, ddof=1)) if len(values) > 1 and np.isfinite(values).all() else None


def over_seeds(
    count: int, model: Sequence[Mapping[str, float]], real: Sequence[Mapping[str, float]]
) -> dict[str, Figure]:
    """Figures by name from one mapping a seed."""
    return {
        name: Figure(count, tuple(each[name] for each in model), tuple(each[name] for each in real if name in each))
        for name in model[0]
    }


def against(features: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """All distances of features `n d` to those of real images `m d`."""
    precision, recall = precision_recall(features, real)
    density, coverage = density_coverage(features, real)
    return {
        "frechet_distance": frechet_distance(streamed(features), streamed(real)),
        "kernel_distance": kernel_distance(features, real),
        "sliced_distance": sliced_distance(features, real),
        "precision": precision,
        "recall": recall,
        "density": density,
        "coverage": coverage,
    }
