"""Images by the pipeline that is open or, with several cards, by a process for each of them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ul_runtime.batches import Images
from ul_runtime.control import Control
from ul_runtime.pipeline import Pipeline
from ul_runtime.workers import Workers


@contextmanager
def several_devices(
    pipeline: Pipeline, bundle: Path | None, cards: Sequence[int], **machine: Any
) -> Iterator[Callable[..., Iterator[Images]]]:
    """Yields what takes the arguments of Pipeline.generate. `machine`: arguments of ul_runtime.load."""
    if len(cards) < 2:
        yield pipeline.generate
        return
    opened = [{"name": f"card {card}", "path": bundle, **machine, "device": card} for card in cards]
    with by_workers(pipeline, opened) as generate:
        yield generate


@contextmanager
def by_workers(pipeline: Pipeline, opened: Sequence[dict[str, Any]]) -> Iterator[Callable[..., Iterator[Images]]]:
    """As above, by a process for each of `opened`; the pipeline itself only checks what is asked for."""
    with Workers(opened) as workers:

        def generate(
            images: np.ndarray, *, batch_size: int | None, control: Control, **options: Any
        ) -> Iterator[Images]:
            pipeline.generate(images, batch_size=batch_size, control=control, **options)
            size = batch_size or pipeline.default_batch_size
            return workers.generate(images, size, control, pipeline.remade, **options)

        yield generate
