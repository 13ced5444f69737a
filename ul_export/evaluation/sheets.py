"""The pictures of a report: samples beside real images, reconstructions, nearest training images."""

from collections.abc import Sequence

import numpy as np

from ul_export.evaluation.generation import Generated
from ul_export.evaluation.memorisation import Memorisation
from ul_export.evaluation.reconstruction import Rebuilt
from ul_export.evaluation.subject import Subject
from ul_train.heldout import contact_sheet_png

SHEETS = ("samples.png", "real.png", "reconstructions.png", "neighbours.png", "closest.png")
_TILES = 64
_ROWS = 8  # of samples with their neighbours


def draw_sheets(subject: Subject, generated: Generated, rebuilt: Rebuilt, found: Memorisation) -> dict[str, bytes]:
    """PNG by file name."""
    first = np.arange(_ROWS)[: subject.count]
    closest = np.argsort(found.nearest.distance[:, 0], kind="stable")[:_ROWS]
    real_ids = subject.pool[subject.halves(subject.seeds[0])[1]][:_TILES]
    real = np.asarray(subject.reference.images[real_ids])
    pairs = [side for pair in zip(rebuilt.originals, rebuilt.decoded, strict=True) for side in pair]
    seed = subject.seeds[0]
    matched = ", of the same classes in the same order" if subject.labels(seed) else ""
    sheets = (
        _png(generated.samples[:_TILES], f"samples, seed {seed}"),
        _png(real, f"real images, {subject.part}{matched}"),
        _png(pairs, f"held-out images beside their reconstructions, seed {seed}", ("original", "decoded") * 4),
        _neighbours(subject, generated, found, first, "the first samples and their nearest training images"),
        _neighbours(subject, generated, found, closest, "the samples nearest to a training image"),
    )
    return dict(zip(SHEETS, sheets, strict=True))


def _neighbours(subject: Subject, generated: Generated, found: Memorisation, rows: np.ndarray, title: str) -> bytes:
    """A row a sample: the sample, then its nearest training images with their distances."""
    across = found.nearest.index.shape[1]
    images: list[np.ndarray] = []
    captions = []
    for row in rows:
        near = subject.splits.train.images[found.nearest.index[row]]
        images += [generated.samples[row], *near]
        captions += [f"sample {row}", *(f"{distance:.3g}" for distance in found.nearest.distance[row])]
    names = ("sample", *(f"nearest {k + 1}" for k in range(across)))
    return _png(images, f"{title}, by {found.figures['features']}", names, captions)


def _png(
    images: Sequence[np.ndarray] | np.ndarray, title: str, columns: Sequence[str] = (), captions: Sequence[str] = ()
) -> bytes:
    """A contact sheet of images uint8 `c h w`."""
    return contact_sheet_png([image.transpose(1, 2, 0) for image in images], title, columns, captions)
