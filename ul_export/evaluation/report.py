"""The figures of ul-eval for people: a table, and one HTML file with its pictures inside."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from ul_export.evaluation.measures import Generated, Memorisation, Rebuilt
from ul_export.evaluation.subject import Subject
from ul_export.page import page, paragraph, picture, table
from ul_runtime.contact_sheet import contact_sheet_png

_WIDTH = 110  # of tables that no terminal limits
# figure -> (name, better, what it says)
FIGURES = {
    "frechet_distance": ("Frechet distance", "lower", "of two Gaussians fitted to the features; depends on the count"),
    "kernel_distance": ("kernel distance (KID)", "lower", "unbiased: 0 in the mean for real images, at any count"),
    "sliced_distance": ("sliced Wasserstein (MIND)", "lower", "Monge distance of the features, a direction at a time"),
    "precision": ("precision", "higher", "share of samples that lie near real images; 1 for noise in their midst"),
    "recall": ("recall", "higher", "share of real images that lie near samples"),
    "density": ("density", "higher", "how many real images a sample lies near, 1 for real ones"),
    "coverage": ("coverage", "higher", "share of real images with a sample among their neighbours"),
    "psnr_db": ("PSNR, dB", "higher", "of one decode; real: one held-out image for another"),
    "ssim": ("SSIM", "higher", "structural similarity; real: as above"),
    "perceptual_distance": ("perceptual distance", "lower", "ST-LPIPS, AlexNet; real: as above"),
    "bits_per_pixel": ("bits per pixel", "", "bound under the bundle's prior; real: of training images"),
    "nearer_than_heldout": (
        "nearer than held out",
        "0.5",
        "chance that a sample is nearer to training images than an unseen one",
    ),
}
_PICTURES = {
    "samples.png": "Samples",
    "real.png": "Real images",
    "reconstructions.png": "Reconstructions",
    "neighbours.png": "Nearest training images of the first samples",
    "closest.png": "Samples nearest to a training image",
}


class Row(NamedTuple):
    """A line of the tables."""

    section: str
    name: str
    better: str
    images: str
    value: str
    real: str
    about: str


def rows(result: Mapping[str, Any]) -> Iterator[Row]:
    """Every figure, in order."""
    for space, figures in result["generation"].items():
        for name, figure in figures.items():
            yield _row(f"samples, {space}", name, figure)
    reconstruction = dict(result["reconstruction"])
    frechet = reconstruction.pop("frechet_distance")
    for name, figure in reconstruction.items():
        yield _row("reconstructions", name, figure)
    for space, figure in frechet.items():
        yield _row(f"reconstructions, {space}", "frechet_distance", figure)
    yield _row("latents", "bits_per_pixel", result["bits_per_pixel"])
    found = result["memorisation"]
    share = {"value": found["nearer_than_heldout"], "real": found["real"], "count": found["count"]}
    yield _row(f"copies, {found['features']}", "nearer_than_heldout", share)


def _row(section: str, key: str, figure: Mapping[str, Any]) -> Row:
    name, better, about = FIGURES[key]
    real = _with_spread(figure["real"], figure.get("real_spread"))
    value = _with_spread(figure["value"], figure.get("spread"))
    return Row(section, name, better, str(figure["count"]), value, real, about)


def _with_spread(value: float | None, spread: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" + (f" ± {spread:.2g}" if spread is not None else "")


def said(result: Mapping[str, Any]) -> list[str]:
    """What the figures rest on, in sentences."""
    data, found = result["data"], result["memorisation"]
    return [
        f"Means ± standard deviation over seeds {', '.join(map(str, result['seeds']))}. Real: as many real images in "
        f"the model's place, {data['reference_images']} of the {data['reference']} images in two halves; for a "
        "reconstruction, another held-out image; for bits, images that were trained on.",
        f"Nearest training images, among {found['train_images']} of {found['all_train_images']}: median distance "
        f"{found['median_distance']:.3g} for samples, {found['heldout_median_distance']:.3g} for held-out images.",
        *(f"Absent: {name}: {why}." for name, why in result["absent"].items()),
        *(f"Note: {note}." for note in result["notes"]),
    ]


def print_report(result: Mapping[str, Any]) -> None:
    """The table on stdout."""
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    title = f"{result['bundle']['name']}, {result['data']['source']}"
    shown = Table("of", "figure", "better", title=title, title_justify="left")
    for name in ("count", "bundle", "real"):
        shown.add_column(name, justify="right")
    before = ""
    for row in rows(result):
        shown.add_row("" if row.section == before else row.section, *row[1:-1])
        before = row.section
    console.print(shown)
    for line in said(result):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def html_report(result: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """One page that needs no other file."""
    columns = ["of", "figure", "better", "count", "bundle", "real", ""]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    body = [
        *map(paragraph, said(result)),
        table(columns, rows(result), (3, 4, 5)),
        *(picture(_PICTURES[name], data) for name, data in pictures.items()),
        paragraph(f"Bundle {result['bundle']['hash'][:12]}; data {result['data']['fingerprint'][:12]}; {versions}"),
        f"<p><code>{escape(result['command'])}</code></p>",
    ]
    return page(f"{result['bundle']['name']}: evaluation", body)


def headline(result: Mapping[str, Any]) -> dict[str, Any]:
    """Of a result of ul-eval, in its first feature space: gFD and its floor, rFD, precision, recall, PSNR, bits."""
    space, generated = next(iter(result["generation"].items()))
    distance = generated["frechet_distance"]
    return {
        "space": space,
        "count": distance["count"],
        "gfd": distance["value"],
        "gfd_spread": distance["spread"],
        "gfd_real": distance["real"],
        "precision": generated["precision"]["value"],
        "recall": generated["recall"]["value"],
        "rfd": result["reconstruction"]["frechet_distance"][space]["value"],
        "psnr_db": result["reconstruction"]["psnr_db"]["value"],
        "bits_per_pixel": result["bits_per_pixel"]["value"],
    }


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
