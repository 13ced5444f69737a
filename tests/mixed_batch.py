"""Images that differ in all that an image can: label, seed, index, sampler, grid, steps, guidance and its interval."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ul_runtime.pipeline import Pipeline
from ul_runtime.progress import silent


@dataclass(frozen=True)
class Wanted:
    """One image."""

    index: int
    label: int
    seed: int
    overrides: dict[str, Any] = field(default_factory=dict)


EVERYWHERE = (-np.inf, np.inf)
MIXED = (
    Wanted(5, 0, 0, {"steps": 7, "sampler": "ab3", "guidance": 2.0, "guidance_interval": (-3.0, 1.5)}),
    Wanted(5, 1, 2**64 - 1, {"steps": 3, "sampler": "sa2", "guidance": 1.0, "decoder_sampler": "ancestral"}),
    Wanted(2**40, 2, 7, {"steps": 4, "sampler": "heun", "guidance": 3.0, "guidance_interval": EVERYWHERE}),
    Wanted(1, 3, 7, {"steps": 2, "guidance": 2.0, "decoder_steps": 7, "decoder_sampler": "ab2"}),
    Wanted(0, 1, 7, {"steps": 7, "sampler": "ancestral", "guidance": 1.5, "guidance_rescale": 0.7, "grid": "karras"}),
    Wanted(3, 0, 7, {"steps": 5, "sampler": "unipc2", "guidance": 0.5, "decoder_steps": 1}),
)


def draw(pipeline: Pipeline, wanted: Sequence[Wanted]) -> list[np.ndarray]:
    """z_0 and x of these images as one batch."""
    settings = [pipeline.settings(**each.overrides) for each in wanted]
    indices, labels = (np.array([getattr(each, name) for each in wanted]) for name in ("index", "label"))
    seeds = np.array([each.seed for each in wanted], np.uint64)
    prior = pipeline.prior_loop(indices, labels, seeds, settings)
    decoder = pipeline.decoder_loop(indices, seeds, [each.decoder for each in settings])
    return pipeline.backend.run_loops([prior, decoder], silent)
